"""Long arrays in pieces give what whole arrays give, and lie on a disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.arrays.pieces import gathered, mean_of, pieces, selected, temporary_array
from twotower.errors import RunError


@pytest.mark.parametrize("n", [0, 1, 7, 8, 129, 5_000])
@pytest.mark.parametrize("size", [128, 1_000, 5_000])
def test_a_mean_in_pieces_has_the_bits_of_the_mean_of_all(n: int, size: int) -> None:
    values = np.random.default_rng(n).standard_normal(n) * 1e3
    longest = 0

    def some(part: slice) -> Any:
        nonlocal longest
        longest = max(longest, part.stop - part.start)
        return values[part]

    found = mean_of(n, some, size)
    assert found == values.mean() if n else np.isnan(found)
    assert longest <= size


def test_pieces_cover_each_place_once() -> None:
    assert [range(*part.indices(7)) for part in pieces(7, 3)] == [range(3), range(3, 6), range(6, 7)]
    assert list(pieces(0)) == []


@pytest.mark.parametrize("memory_bytes", [0, 2**20])
def test_a_long_temporary_array_is_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = temporary_array(1_000, np.int64, memory_bytes)
    assert isinstance(made.base, np.memmap) == (memory_bytes == 0)
    made[:] = np.arange(1_000)
    assert made.sum() == 499_500
    assert not list(tmp_path.iterdir())
    values, rows = np.random.default_rng(0).random(50).astype(np.float32), np.random.default_rng(1).integers(0, 50, 999)
    assert gathered(values, rows, memory_bytes).tolist() == values[rows].tolist()
    keep = rows % 3 == 0
    assert selected(rows, keep, memory_bytes).tolist() == rows[keep].tolist()
    assert selected(rows, np.zeros(999, bool), memory_bytes).shape == (0,)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve room")
def test_a_full_disk_for_temporary_arrays_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"no room for 8 MB of temporary arrays \(No space left on device\); free some"):
        temporary_array(1_000_000, np.int64, 0)
