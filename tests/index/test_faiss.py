"""FAISS as it is set up, and its files."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vector_worlds import N, users, world

import twotower
from twotower import limited_process
from twotower.errors import RunError, TwoTowerError
from twotower.index import Index, Similarity, build_index, load_index
from twotower.index.faiss import setup
from twotower.index.faiss.faiss_index import VERIFY_FUNCTION, read_faiss, verify_file
from twotower.index.faiss.setup import choose_coretype


def made(kind: str, metric: Similarity, n: int) -> Index:
    return build_index(kind, *world(metric, n), metric)


ZEN4 = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: {}\n\nvendor_id\t: other\nflags\t\t: none\n"
XEON = ZEN4.replace("AuthenticAMD", "GenuineIntel").replace("25", "6")
AVX512 = "fma avx2 avx512f avx512dq avx512bw avx512vl avx512cd"


@pytest.mark.parametrize(
    ("cpuinfo", "wanted"),
    [
        (XEON.format(AVX512), "SKYLAKEX"),
        (XEON.format("sse2 avx2 fma avx512f"), "HASWELL"),
        (ZEN4.format(AVX512), "HASWELL"),
        (ZEN4.replace("25", "26").format(AVX512), "SKYLAKEX"),
    ],
)
def test_the_kernels_of_openblas_follow_the_flags_and_only_where_nobody_chose(cpuinfo: str, wanted: str | None) -> None:
    assert choose_coretype(cpuinfo, {"PATH": "/bin"}) == wanted
    for name, value in (
        ("OPENBLAS_CORETYPE", "ZEN"),
        ("OPENBLAS_CORETYPE", ""),
        ("CI", "true"),
        ("PYTEST_VERSION", "9"),
    ):
        assert choose_coretype(cpuinfo, {name: value}) is None


def test_kernels_with_wrong_products_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong:
        """FAISS whose products of matrices are off by a percent."""

        METRIC_INNER_PRODUCT = setup.faiss().METRIC_INNER_PRODUCT
        cvar = SimpleNamespace(distance_compute_blas_threshold=128_000)

        def knn(self, queries: np.ndarray, items: np.ndarray, k: int, metric: int) -> tuple[np.ndarray, np.ndarray]:
            found, at = setup.faiss().knn(queries, items, k, metric=metric)
            return found * 1.01 if self.cvar.distance_compute_blas_threshold < queries.size else found, at

    assert setup.blas_is_correct(setup.faiss())
    for name in ("CI", "PYTEST_VERSION", "OPENBLAS_CORETYPE"):
        monkeypatch.delenv(name, raising=False)
    wrong: Any = Wrong()
    monkeypatch.setitem(sys.modules, "faiss", wrong)
    loaded, correct = setup.load_faiss("")
    assert loaded is wrong
    assert correct, "nothing was chosen, so nothing is compared"
    loaded, correct = setup.load_faiss(XEON.format("avx2 fma"))
    assert loaded is wrong
    assert not correct
    assert "OPENBLAS_CORETYPE=HASWELL" in caplog.text
    assert "OPENBLAS_CORETYPE" not in os.environ
    real = setup.faiss()
    monkeypatch.setattr(setup, "_load", lambda: (real, False))
    with setup.faiss_settings(1, 64):
        assert real.cvar.distance_compute_blas_threshold > 10**9


def test_faiss_is_imported_in_one_place() -> None:
    sources = Path(twotower.__file__).parent
    importing = re.compile(r"^\s*(import|from) faiss\b", re.MULTILINE)
    assert [p.name for p in sources.rglob("*.py") if importing.search(p.read_text())] == ["setup.py"]


def test_an_index_of_another_folder_is_refused(tmp_path: Path) -> None:
    for kind, n in (("ivf", N), ("hnsw", N), ("ivfpq", 300)):
        made(kind, "dot", n).save(tmp_path / kind)
    for stranger in ("hnsw", "ivfpq"):
        (tmp_path / "ivf/index.faiss").write_bytes((tmp_path / stranger / "index.faiss").read_bytes())
        with pytest.raises(RunError, match="not the ivf index"):
            load_index(tmp_path / "ivf", verify=False)
    (tmp_path / "ivf/index.faiss").unlink()
    with pytest.raises(RunError, match="no such file"):
        load_index(tmp_path / "ivf")


def test_fault_A4_hostile_faiss_files_end_a_child_not_us(tmp_path: Path) -> None:
    """Each file loads and can be searched, or is refused with one line; this process lives to see it."""
    rng, files = np.random.default_rng(0), []
    for kind in ("ivf", "hnsw", "ivfpq"):
        made(kind, "dot", 300).save(tmp_path / kind)
        good = (tmp_path / kind / "index.faiss").read_bytes()
        for case in range(10):
            bad = bytearray(good)
            if case == 0:
                bad = bad[: len(bad) // 2]
            elif case == 1:
                bad = bad[:20]
            elif case < 7:  # one number of the header
                place = 4 + 4 * int(rng.integers(0, 30))
                bad[place : place + 4] = bytes([[0, 1, 127, 128, 255][case - 2]] * 4)
            else:
                for place in rng.integers(0, len(bad), 20):
                    bad[place] = rng.integers(0, 256)
            files.append(tmp_path / f"{kind}-{case}.faiss")
            files[-1].write_bytes(bad)
    seen = limited_process.run_limited(VERIFY_FUNCTION, files, timeout=120, memory=3 << 30)
    errors = {file: seen[file].error for file in files}
    assert sum(map(bool, errors.values())) >= 12
    assert all(len(error.splitlines()) <= 1 for error in errors.values())
    for file in files:
        if not errors[file]:
            engine = read_faiss(file)
            engine.search(users(3, width=engine.d), 10)
    for kind in ("ivf", "hnsw"):
        (tmp_path / kind / "index.faiss").write_bytes((tmp_path / f"{kind}-0.faiss").read_bytes())
        with pytest.raises(TwoTowerError):
            load_index(tmp_path / kind)
    with pytest.raises(RunError, match="no such file"):
        verify_file(tmp_path / "none.faiss")


def test_fault_A4_a_file_passes_by_a_search_and_not_beside_an_index_that_leaves_it_alone(tmp_path: Path) -> None:
    for kind in ("ivf", "exact"):
        made(kind, "dot", 300).save(tmp_path / kind)
    hostile = (tmp_path / "ivf" / "index.faiss").read_bytes()[:-100]
    for kind in ("exact", "ivf"):
        (tmp_path / kind / "index.faiss").write_bytes(hostile)
    assert load_index(tmp_path / "exact").kind == "exact"
    with pytest.raises(RunError, match="not a usable FAISS index"):
        load_index(tmp_path / "ivf")


def test_fault_A4_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("ivf", "dot", 301).save(tmp_path / "ivf")
    path, look = tmp_path / "ivf" / "index.faiss", limited_process.run_limited
    sound = path.read_bytes()

    def replaced(*words: Any, **limits: Any) -> Any:
        path.write_bytes(sound)
        return look(*words, **limits)

    path.write_bytes(sound[:-100])
    monkeypatch.setattr(limited_process, "run_limited", replaced)
    with pytest.raises(RunError, match=r"index.faiss: not a usable FAISS index \(it was changed while it was read\)"):
        verify_file(path)
    path.write_bytes(sound[:-100])
    monkeypatch.setattr(limited_process, "run_limited", look)
    with pytest.raises(RunError, match="not a usable FAISS index"):
        verify_file(path)


def test_fault_A4_a_child_that_dies_or_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x")
    (tmp_path / "work.py").write_text(
        "import os, time\n"
        "def dies(path): os.abort()\n"
        "def hangs(path): time.sleep(60)\n"
        "def computes(path):\n    while True: pass\n"
        "def grows(path): bytes(10**10)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match="a: not a usable FAISS index .* ended a process with code -6"):
        verify_file(file, function="work:dies")
    with pytest.raises(RunError, match=r"more than 0\.3 seconds"):
        verify_file(file, timeout=0.3, function="work:hangs")
    (seen,) = limited_process.run_limited("work:computes", [file], timeout=60, cpu_seconds=1, memory=1 << 30).values()
    assert seen.error == "loading it takes more than 1 seconds"
    with pytest.raises(RunError, match="a: not a usable FAISS index .loading it takes more than 2,147 MB"):
        verify_file(file, function="work:grows")
