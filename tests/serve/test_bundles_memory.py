"""The memory that a process may still take (row E5 of the faults)."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.errors import BundleError
from twotower.serve import bundles


def test_fault_E5_the_limit_of_every_control_group_counts(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "sys"
    inner = root / "system.slice" / "twotower.service"
    inner.mkdir(parents=True)
    proc.write_text("0::/system.slice/twotower.service\n")
    for folder, most in ((inner, "max"), (inner.parent, "1000000")):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text("400000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    groups = bundles.control_groups(proc, root)
    assert groups == [inner, inner.parent, root]
    assert [bundles.free_in_group(group) for group in groups] == [None, 700_000, None]
    old = root / "memory" / "docker"
    old.mkdir(parents=True)
    proc.write_text("7:cpu:/docker\n5:memory:/docker\n")
    (old / "memory.limit_in_bytes").write_text("500")
    (old / "memory.usage_in_bytes").write_text("100")
    (old / "memory.stat").write_text("total_inactive_file 7\n")
    assert bundles.control_groups(proc, root) == [old, old.parent]
    assert bundles.free_in_group(old) == 407


def test_fault_E5_workers_share_the_memory() -> None:
    bundles.check_memory(600, 0, 1, available=lambda: 1_000)
    with pytest.raises(BundleError, match="MB are free"):
        bundles.check_memory(600, 0, 2, available=lambda: 1_000)
