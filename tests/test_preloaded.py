"""Processes that are loaded already behave as processes of `python`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('Ä', 1)", (0, "Ä 1\n", "")),
        ("import sys; sys.exit(3)", (3, "", "")),
        ("raise SystemExit('no')", (1, "", "no\n")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", (-9, "", "")),
        (
            "import atexit, threading; atexit.register(print, 'last'); "
            "threading.Timer(0.05, print, ['thread']).start()",
            (0, "thread\nlast\n", ""),
        ),
        (
            "import os, sys; print(os.environ['OWN'], os.getcwd(), sys.argv[1:], __name__)",
            (0, "x {here} ['a', 'b c'] __main__\n", ""),
        ),
    ],
)  # fmt: skip
def test_a_command_does_what_it_does_in_a_new_process(
    code: str, expected: tuple[int, str, str], tmp_path: Path
) -> None:
    arguments, env = ("-c", code, "a", "b c"), {"OWN": "x"}
    done = preloaded.run(*arguments, env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout.replace(str(tmp_path), "{here}"), done.stderr) == expected
    twin = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (twin.returncode, twin.stdout, twin.stderr) == (done.returncode, done.stdout, done.stderr)


def test_a_traceback_is_told_with_code_1() -> None:
    done = preloaded.run("-c", "1 / 0")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_process_is_read_stopped_and_ended() -> None:
    code = "import time; print('here', flush=True); time.sleep(60)"
    with preloaded.start("-c", code, stdout=preloaded.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        process.wait_stopped()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_a_module_and_a_script_are_run(tmp_path: Path) -> None:
    assert "Usage" in preloaded.run("-m", "twotower", "--help").stdout
    (tmp_path / "near.py").write_text("ANSWER = 42\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, near\nprint(near.ANSWER, sys.argv)\n")
    assert preloaded.run(script, "x").stdout == f"42 ['{script}', 'x']\n"
