"""The machine of a measurement."""

from __future__ import annotations

from benchmarks.lib import machine


def test_the_kernels_of_every_openblas_in_the_process_are_told() -> None:
    from twotower.index.faiss import setup

    setup.faiss()
    assert set(machine.blas()) >= {"faiss", "numpy"}
    assert machine.machine()["blas"] == machine.blas()


def test_the_machine_is_told() -> None:
    found = machine.machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["versions"]["torch"]
    assert machine.tool("torch").startswith("torch 2")
    assert machine.tool("no-such-package") == "no-such-package"
