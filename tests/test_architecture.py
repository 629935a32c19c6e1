"""The rooms of the package: light to import, one direction, no name that says nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import twotower

SOURCE = Path(twotower.__file__).parent
ROOT = SOURCE.parent.parent


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, twotower\n"
        "heavy = {'torch', 'polars', 'numpy', 'plotly', 'faiss', 'fastapi', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_schema_config_and_tables_work_without_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "import twotower.schema, twotower.config, twotower.encoders, twotower.data.tables, twotower.data.movielens"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", twotower.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(twotower, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        twotower.fitt  # noqa: B018


def test_modules_are_nouns_of_the_field() -> None:
    for path in SOURCE.rglob("*.py"):
        assert path.stem not in {"utils", "common", "core", "base", "helpers", "misc"}


def test_imports_point_down() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_no_file_of_the_repository_names_a_folder_of_one_machine_or_carries_data() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        assert path.suffix not in {".zip", ".dat", ".parquet", ".safetensors"}, name
        if path.suffix in {".py", ".md", ".toml", ".yml"} or path.name in {"Makefile", "run"}:
            text = path.read_text(encoding="utf-8")
            for folder in ("/work" + "/", "/root" + "/", "/home" + "/"):
                assert folder not in text, f"{name}: {folder}"
