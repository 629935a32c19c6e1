"""Key files: who is let in, and while the file changes, is damaged or hangs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.errors import ConfigError
from twotower.serve.api_keys import ApiKey, ApiKeys, make_key, read_keys


def test_a_key_is_found_by_what_it_is_and_never_stored(tmp_path: Path) -> None:
    shop, shop_lines = make_key("shop", admin=False)
    boss, boss_lines = make_key("operations", admin=True)
    file = tmp_path / "keys.toml"
    file.write_text(shop_lines + boss_lines)
    keys = ApiKeys(file)
    found = keys.find(boss)
    assert found is not None
    assert (found.name, found.admin) == ("operations", True)
    assert getattr(keys.find(shop), "admin", None) is False
    for wrong in ("", shop[:-1], shop + "x", hashlib.sha256(shop.encode()).hexdigest(), "\udc80"):
        assert keys.find(wrong) is None
    assert shop not in file.read_text()


def test_every_key_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_key(f"k{n}", False) for n in range(5)]
    (tmp_path / "keys.toml").write_text("".join(lines for _, lines in made))
    keys = ApiKeys(tmp_path / "keys.toml")
    compared: list[bytes] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for token in (made[0][0], made[4][0], "none of them"):
        compared.clear()
        keys.find(token)
        assert len(compared) == 5


def test_fault_G13_a_file_of_keys_that_hangs_lets_nobody_in(tmp_path: Path) -> None:
    file, hang, failures = tmp_path / "keys.toml", threading.Event(), [0]
    key, lines = make_key("shop", False)
    file.write_text(lines)
    reads = 0

    def read(path: Path) -> list[ApiKey]:
        nonlocal reads
        reads += 1
        if reads > 1:
            hang.wait(20)
        return read_keys(path)

    def count_failure() -> None:
        failures[0] += 1

    keys = ApiKeys(file, poll=0.01, read_timeout=0.05, read=read)

    async def until(found: bool) -> None:
        while (keys.find(key) is not None) != found:
            await asyncio.sleep(0.01)

    async def go() -> None:
        task = asyncio.create_task(keys.watch(count_failure))
        async with asyncio.timeout(10):
            await until(False)
            assert keys.busy
            assert "does not answer" in keys.error
            hang.set()
            await until(True)
        task.cancel()

    asyncio.run(go())
    assert failures[0]


def test_a_changed_file_of_keys_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    old, lines = make_key("old", False)
    file.write_text(lines)
    keys = ApiKeys(file)
    assert not keys.apply(keys.read())
    new, more = make_key("new", False)
    file.write_text(more)
    assert keys.apply(keys.read())
    assert keys.find(old) is None
    assert keys.find(new) is not None


def _replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BROKEN: dict[str, Callable[[Path], object]] = {
    "emptied": lambda file: file.write_text(""),
    "deleted": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "not TOML": lambda file: file.write_text("[[keys]]\nname = 3\n"),
    "not UTF-8": lambda file: file.write_bytes(b"\xff" + file.read_bytes()),
    "a folder": _replace_by_folder,
    "a pipe": _replace_by_pipe,
    "huge": lambda file: file.write_bytes(file.read_bytes() + b"\n" * (1 << 20)),
    "nobody's": lambda file: file.write_text("# no keys\n"),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_fault_G13_a_file_of_keys_that_cannot_be_used_lets_nobody_in_until_it_can(
    tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    file = tmp_path / "keys.toml"
    shop, lines = make_key("shop", False)
    boss, more = make_key("boss", True)
    file.write_text(lines + more)
    keys = ApiKeys(file)
    harm(file)
    assert keys.apply(keys.read())
    assert keys.find(shop) is keys.find(boss) is None
    assert str(file) in keys.error
    assert not keys.apply(keys.read())
    assert ApiKeys(file).find(shop) is None  # a worker that begins now
    (tmp_path / "new.toml").write_text(lines + more)
    if file.is_dir():
        file.rmdir()
    (tmp_path / "new.toml").replace(file)
    assert keys.apply(keys.read())
    assert keys.error == ""
    assert keys.find(shop) is not None
    assert keys.find(boss) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "keys = 3",
        "[[keys]]",
        '[[keys]]\nname = "a"\nsha256 = "00"',
        f'[[keys]]\nname = "a"\nsha256 = "{"0" * 64}"\nscope = "all"',
        f'[[keys]]\nname = "a"\nsha256 = "{"0" * 64}"\nkey = "a"',
        "no toml",
    ],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.toml"):
        read_keys(tmp_path / "keys.toml")


def test_a_missing_file_of_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key file cannot be read"):
        read_keys(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="printable"):
        make_key('a"b', False)
