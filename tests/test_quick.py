"""The choice of tests of `make quick`."""

from __future__ import annotations

from pathlib import Path

import pytest
import quick


def names(paths: list[Path]) -> set[str]:
    return {str(path.relative_to(quick.TESTS)) for path in paths}


def test_a_changed_file_selects_the_tests_of_its_room() -> None:
    assert names(quick.tests_of("src/twotower/store/manifest.py")) >= {"store/test_store.py", "store/test_bundle.py"}
    assert names(quick.tests_of("src/twotower/index/faiss/setup.py")) == names(
        quick.tests_of("tests/index/test_exact.py")
    )
    assert names(quick.tests_of("src/twotower/kinds.py")) == {"test_kinds.py", "test_kinds_code.py"}
    assert {"test_runs.py", "test_runs_shared.py"} <= names(quick.tests_of("src/twotower/runs/shared.py"))
    assert names(quick.tests_of("docs/scale.md")) == {"test_docs.py"} == names(quick.tests_of("README.zh-CN.md"))
    assert quick.tests_of("tests/worlds.py") == quick.tests_of("LICENSE") == []


def test_a_test_file_whose_packages_are_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick.missing_packages(quick.TESTS / "store" / "test_store.py") == set()
    monkeypatch.setattr(quick, "_is_installed", lambda name: name not in ("ray", "moto", "pymilvus", "playwright"))
    assert quick.missing_packages(quick.TESTS / "store" / "test_store.py") == set()
    assert quick.missing_packages(quick.TESTS / "engines" / "test_ray.py") == {"ray"}
    assert quick.missing_packages(quick.TESTS / "store" / "test_object_place.py") == {"moto"}
    assert "pymilvus" in quick.missing_packages(quick.TESTS / "index" / "test_milvus.py")
    assert quick.missing_packages(quick.TESTS / "test_docs.py") == set(), (
        "its test with a browser is run by make test-system"
    )
