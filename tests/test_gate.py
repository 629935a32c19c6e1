"""Turns, limits of clients and keys."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import ConfigError
from twotower.serve import keys as api_keys
from twotower.serve.gate import CALM, Gate
from twotower.serve.limiter import Limiter
from twotower.serve.problem import Problem


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_turns_are_taken_one_at_a_time_in_the_order_of_coming() -> None:
    async def world() -> list[str]:
        gate, said = Gate(), []

        async def one(name: str) -> None:
            async with gate:
                said.append(f"{name} in")
                await asyncio.sleep(0)
                said.append(f"{name} out")

        await asyncio.gather(*(one(n) for n in "abc"))
        return said

    assert asyncio.run(world()) == ["a in", "a out", "b in", "b out", "c in", "c out"]


def test_a_width_of_two_lets_two_in_and_no_third() -> None:
    async def world() -> int:
        gate, inside, most = Gate(width=2), 0, 0

        async def one() -> None:
            nonlocal inside, most
            async with gate:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.001)
                inside -= 1

        await asyncio.gather(*(one() for _ in range(7)))
        assert gate.wait == 0
        return most

    assert asyncio.run(world()) == 2


def test_who_gives_up_waiting_keeps_nobody_from_a_turn() -> None:
    async def world() -> list[int]:
        gate, done = Gate(), []

        async def one(number: int) -> None:
            async with gate:
                await asyncio.sleep(0.001)
                done.append(number)

        tasks = [asyncio.create_task(one(n)) for n in range(6)]
        await asyncio.sleep(0)
        for n in (0, 2, 5):
            tasks[n].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with gate:
            done.append(99)
        return done

    assert asyncio.run(world()) == [1, 3, 4, 99]


def test_a_turn_given_and_cancelled_at_the_same_time_is_passed_on() -> None:
    async def world() -> list[str]:
        gate, done = Gate(), []

        async def one(name: str) -> None:
            async with gate:
                done.append(name)

        await gate.__aenter__()
        second, third = asyncio.create_task(one("second")), asyncio.create_task(one("third"))
        await asyncio.sleep(0)
        await gate.__aexit__(None, None, None)  # the turn is the second's, which has not woken up yet
        second.cancel()
        await asyncio.gather(second, third, return_exceptions=True)
        return done

    assert asyncio.run(world()) == ["third"]


def test_a_burst_may_wait_long_and_an_overload_only_shortly() -> None:
    clock = Clock()

    async def world() -> None:
        gate = Gate(burst=0.1, target=0.005, clock=clock)
        gate._pace = 0.0101  # a turn takes 10 ms
        assert not gate.full()
        await gate.__aenter__()
        waiting = []
        for _ in range(9):
            assert not gate.full()
            waiting.append(asyncio.create_task(gate.__aenter__()))
            await asyncio.sleep(0)
        assert gate.wait == pytest.approx(0.101)
        assert gate.full()
        clock.now += 0.02
        gate._refused -= CALM  # long ago

        async def leave(n: int) -> None:
            for _ in range(n):
                gate._ended = clock.now - 0.0101
                await gate.__aexit__(None, None, None)

        await leave(7)  # three remain
        assert not gate.full()  # there was nobody less than 100 ms ago
        clock.now += 0.11
        assert gate.full()
        gate._empty = clock.now
        assert gate.full()  # somebody has just been refused
        gate._refused -= CALM
        assert not gate.full()
        await leave(3)
        assert not gate.full()
        await asyncio.gather(*waiting)

    asyncio.run(world())


def test_the_pace_is_what_lies_between_the_ends_of_turns_while_somebody_waits() -> None:
    clock = Clock()

    async def world() -> Gate:
        gate = Gate(clock=clock)

        async def one() -> None:
            async with gate:
                clock.now += 0.002
                await asyncio.sleep(0)
                clock.now += 0.001  # others' work meanwhile

        for _ in range(20):
            await asyncio.gather(*(one() for _ in range(20)))
            clock.now += 5.0  # nobody is there
        return gate

    gate = asyncio.run(world())
    assert gate._pace == pytest.approx(0.003, rel=0.02)
    assert gate.wait == 0


def test_a_client_has_its_rate_and_its_burst() -> None:
    clock = Clock()
    limiter = Limiter(rate=2, burst=3, clients=2, clock=clock)
    for _ in range(3):
        limiter.take("a")
    limiter.take("b")
    with pytest.raises(Problem, match="more than 2 requests a second") as refused:
        limiter.take("a")
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    clock.now += 0.5
    limiter.take("a")
    with pytest.raises(Problem):
        limiter.take("a")
    limiter.take("c")  # the third client; b is the one that was quiet longest
    assert len(limiter._buckets) == 2
    assert "b" not in limiter._buckets


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.1, 20), st.integers(1, 20))
def test_no_client_gets_more_than_its_burst_and_its_rate(gaps: list[float], rate: float, burst: int) -> None:
    clock = Clock()
    limiter = Limiter(rate, burst, clock=clock)
    let_in = 0
    for gap in gaps:
        clock.now += gap
        with contextlib.suppress(Problem):
            limiter.take("a")
            let_in += 1
    assert let_in <= burst + rate * sum(gaps) + 1e-6


def test_a_key_is_found_by_what_it_is_and_never_stored(tmp_path: Path) -> None:
    shop, shop_lines = api_keys.make("shop", admin=False)
    boss, boss_lines = api_keys.make("operations", admin=True)
    file = tmp_path / "keys.toml"
    file.write_text(shop_lines + boss_lines)
    keys = api_keys.Keys(file)
    found = keys.find(boss)
    assert found is not None
    assert (found.name, found.admin) == ("operations", True)
    assert getattr(keys.find(shop), "admin", None) is False
    for wrong in ("", shop[:-1], shop + "x", hashlib.sha256(shop.encode()).hexdigest(), "\udc80"):
        assert keys.find(wrong) is None
    assert shop not in file.read_text()


def test_every_key_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [api_keys.make(f"k{n}", False) for n in range(5)]
    (tmp_path / "keys.toml").write_text("".join(lines for _, lines in made))
    keys = api_keys.Keys(tmp_path / "keys.toml")
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    for token in (made[0][0], made[4][0], "none of them"):
        compared.clear()
        keys.find(token)
        assert len(compared) == 5


def test_a_changed_file_of_keys_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    old, lines = api_keys.make("old", False)
    file.write_text(lines)
    keys = api_keys.Keys(file)
    assert not keys.look()
    new, more = api_keys.make("new", False)
    file.write_text(more)
    assert keys.look()
    assert keys.find(old) is None
    assert keys.find(new) is not None


BROKEN = {
    "emptied": lambda file: file.write_text(""),
    "deleted": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "not TOML": lambda file: file.write_text("[[keys]]\nname = 3\n"),
    "not UTF-8": lambda file: file.write_bytes(b"\xff" + file.read_bytes()),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "huge": lambda file: file.write_bytes(file.read_bytes() + b"\n" * (1 << 20)),
    "nobody's": lambda file: file.write_text("# no keys\n"),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_fault_G13_a_file_of_keys_that_cannot_be_used_lets_nobody_in_until_it_can(
    tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    file = tmp_path / "keys.toml"
    shop, lines = api_keys.make("shop", False)
    boss, more = api_keys.make("boss", True)
    file.write_text(lines + more)
    keys = api_keys.Keys(file)
    harm(file)
    assert keys.look()
    assert keys.find(shop) is keys.find(boss) is None
    assert str(file) in keys.why
    assert not keys.look()
    assert api_keys.Keys(file).find(shop) is None  # a worker that begins now
    (tmp_path / "new.toml").write_text(lines + more)
    if file.is_dir():
        file.rmdir()
    (tmp_path / "new.toml").replace(file)
    assert keys.look()
    assert keys.why == ""
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
        api_keys.read(tmp_path / "keys.toml")


def test_a_missing_file_of_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no keys can be read"):
        api_keys.read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="printable"):
        api_keys.make('a"b', False)
