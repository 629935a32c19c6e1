"""Signals are requests to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import preloaded
import pytest

from twotower.train.stopping import StopNow, StopSignals, at_once


def test_signals_are_noted_and_other_threads_leave_the_handlers_alone() -> None:
    before, signals = signal.getsignal(signal.SIGTERM), StopSignals()
    with signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere() -> None:
        with StopSignals().handled():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[object] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]


ANSWER = "stopping after this step …; a second signal ends now"


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_ends_a_block_at_once_and_is_answered(messages: list[str]) -> None:
    signals, reached = StopSignals(), list[str]()
    with at_once():  # nothing handles them
        reached.append("outside")
    with signals.handled():
        with pytest.raises(StopNow), at_once():  # noqa: PT012
            with at_once():
                reached.append("inside")
            interrupt()
            reached.append("after the signal")
        with pytest.raises(StopNow), at_once():
            reached.append("after an earlier signal")
    assert reached == ["outside", "inside"]
    assert signals.received == signal.SIGINT
    assert messages == [ANSWER]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_signal_does_what_it_did_before_unless_ranks_stop_together(ranks: int, messages: list[str]) -> None:
    reached = list[int]()
    before = signal.signal(signal.SIGTERM, lambda *_: reached.append(0))
    try:
        with StopSignals(ranks=ranks).handled():
            for n, number in enumerate(
                (signal.SIGINT, signal.SIGINT, signal.SIGTERM)
            ):  # the same one at once is a repeat
                interrupt(number)
                reached.append(n + 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached == ([1, 2, 0, 3] if ranks == 1 else [1, 2, 3])
    assert messages == [ANSWER if ranks == 1 else ANSWER.partition(";")[0]]


def test_a_process_that_is_forked_in_the_block_delays_no_end() -> None:
    with StopSignals().handled():
        descriptor = signal.set_wakeup_fd(-1)
        of_child = os.dup(descriptor)
        signal.set_wakeup_fd(descriptor)
        late = threading.Timer(20, os.close, [of_child])
        late.start()
    assert not late.finished.is_set()
    late.cancel()
    os.close(of_child)


BUSY = """
import ctypes, sys, threading
from twotower.reports.terminal import printed_messages
from twotower.train.stopping import StopSignals, at_once
sys.setswitchinterval(1000)  # so that the other thread runs when this one is in the operation, and not before
about_to = threading.Event()
threading.Thread(target=lambda: (about_to.wait(), print("busy", flush=True)), daemon=True).start()
lock = ctypes.create_string_buffer(256)
wait = ctypes.CDLL(None).pthread_mutex_lock  # an operation that no signal ends, as one of LAPACK
with printed_messages(), StopSignals(ends_process=True).handled(), at_once():
    wait(lock)
    about_to.set()
    wait(lock)
"""


def busy_process() -> tuple[preloaded.Process, list[str]]:
    """Start a process in a long operation, send it SIGINT, and return it with its answer."""
    process = preloaded.start("-c", BUSY, stdout=preloaded.PIPE)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    process.send_signal(signal.SIGINT)
    return process, [*lines, process.stdout.readline()]


def test_fault_B2_a_long_operation_delays_no_answer_and_a_second_signal_ends_the_process() -> None:
    process, lines = busy_process()
    with process:
        process.send_signal(signal.SIGINT)  # a repeat
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert lines == ["busy\n", f"{ANSWER}\n"]


@pytest.mark.system  # it waits for four seconds
def test_fault_B2_a_longer_operation_ends_with_the_process() -> None:
    process, _ = busy_process()
    out, _ = process.communicate(60)
    assert (process.returncode, out) == (128 + signal.SIGINT, "stopped; `resume=True` goes on\n")


ENDLESS = """
scorers = [{ kind = "ials", width = 4, sweeps = 1_000_000_000 }]
[data]
interactions = "log.csv"
[schema]
features = [
  { kind = "categorical", side = "user", name = "user_id" },
  { kind = "categorical", side = "item", name = "item_id" },
]
[model]
width = 4
similarity = "dot"
[loss]
kind = "softmax"
[negatives]
full = true
[train]
epochs = 0
device = "cpu"
precision = "fp32"
"""
"""A training whose start does not end."""


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGTERM)])
def test_fault_B2_a_signal_ends_a_start_of_one_process_and_of_ranks_together(
    ranks: int, number: signal.Signals, tmp_path: Path
) -> None:
    rows = "".join(f"{user},{(user * 3 + n) % 8}\n" for user in range(20) for n in range(6))
    (tmp_path / "log.csv").write_text(f"user_id,item_id\n{rows}", encoding="utf-8")
    (tmp_path / "endless.toml").write_text(ENDLESS, encoding="utf-8")
    command = ["-m", "twotower", "train", tmp_path / "endless.toml", "-r", tmp_path / "run"]
    processes = (
        [preloaded.start(*command, stdout=preloaded.PIPE, stderr=preloaded.STDOUT)]
        if ranks == 1
        else preloaded.start_ranks(ranks, *command)
    )
    first = processes[0]
    assert first.stdout is not None
    for line in first.stdout:
        if line == "phase 2 of 4: closed forms\n":
            break
    first.send_signal(number)
    said = [process.communicate(120)[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + number] * ranks, said
    assert said[0].startswith("stopping after this step …")
    assert "stopped before the first step; no checkpoint is written; go on: `twotower train " in said[0]
    assert "Traceback" not in "".join(said)
