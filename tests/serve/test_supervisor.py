"""Workers as processes, and what keeps a service from its start (rows E3, E4 and E7 of the faults)."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import hostile_towers
import httpx
import pytest
from server_process import Start, wait_until

import twotower
from twotower.cli.app import run_command
from twotower.errors import ConfigError
from twotower.serve import api_keys, supervisor
from twotower.serve.settings import METRICS_FOLDER, ServeSettings


@pytest.mark.parametrize("sig", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.system)])
def test_fault_E3_a_signal_to_the_whole_group_drains_as_one_to_the_first(serve: Start, sig: int) -> None:
    """As systemd and a terminal send it: to the process that watches and to every worker."""
    served = serve("--workers", "2", "--drain", "0.8", "--grace", "5", group=True).wait()
    started = time.monotonic()
    os.killpg(served.process.pid, sig)
    time.sleep(0.3)
    assert httpx.get(served.url + "/livez").status_code == 200  # everything is answered while it drains
    served.process.wait(timeout=20)
    assert 0.8 <= time.monotonic() - started < 6
    assert served.end()[0] == 0


@pytest.mark.parametrize("pause", [0.0, 0.3, 0.6, 1.2])
def test_fault_E3_a_signal_while_workers_begin_ends_them_all(serve: Start, pause: float) -> None:
    served = serve("--workers", "3")
    time.sleep(pause)
    code, log = served.end()
    assert code == 0, log
    assert "Traceback" not in log, log
    assert served.workers() == []


def test_fault_E4_a_worker_that_is_killed_is_replaced_and_the_others_answer(serve: Start) -> None:
    served = serve("--workers", "2", "--no-access-log").wait()
    wait_until(lambda: len(served.workers()) == 2)
    first = served.workers()
    for _ in range(20):
        assert httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}).status_code == 200
    os.kill(first[0], signal.SIGKILL)
    failed = 0
    for _ in range(40):
        try:
            assert httpx.post(served.url + "/v1/recommend", json={"user_id": "u1"}).status_code == 200
        except httpx.HTTPError:
            failed += 1  # requests that the killed worker had accepted
        time.sleep(0.02)
    assert failed <= 2
    wait_until(lambda: len(served.workers()) == 2 and first[0] not in served.workers())
    text = httpx.get(served.url + "/metrics").text
    counted = sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("twotower_requests_total{") and '"/v1/recommend"' in line and '"200"' in line
    )
    assert counted >= 60 - failed - 2  # those of the killed worker too
    assert float(re.search(r"^twotower_in_flight_requests (\S+)", text, re.M)[1]) == 1  # type: ignore[index]
    code, log = served.end()
    assert code == 0
    assert "worker died" in log


@pytest.mark.system
def test_workers_end_with_the_process_that_watches_them(serve: Start) -> None:
    served = serve("--workers", "2").wait()
    workers = served.workers()
    assert workers
    served.end(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.fixture
def _signals_of_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])
    os.environ.pop(METRICS_FOLDER, None)


class Spawns(SpawnContext):
    """Stands for a context whose first process is as far as a test goes."""

    def Process(self, **_: Any) -> SpawnProcess:  # type: ignore[override]
        raise KeyboardInterrupt


@pytest.mark.usefixtures("_signals_of_before")
def test_fault_E7_workers_are_spawned_and_never_forked(store: Path) -> None:
    methods: list[str] = []

    def get_context(method: str) -> Spawns:
        methods.append(method)
        return Spawns()

    with pytest.raises(KeyboardInterrupt):
        supervisor.supervise_workers(ServeSettings(store=store, workers=2), [], get_context)
    assert methods == ["spawn"]


@pytest.mark.usefixtures("_signals_of_before")
def test_fault_E3_a_signal_that_came_before_starts_no_worker(store: Path) -> None:
    """As one whose exception is lost, because it came while an object was collected."""
    settings = ServeSettings(store=store, workers=2)
    assert supervisor.supervise_workers(settings, [], lambda _: Spawns(), signals=[signal.SIGTERM]) == 0


class DiesAtOnce:
    """A process that has died when it is looked at."""

    pid, exitcode = 1, 1

    def __init__(self, started: list[float], sentinel: int) -> None:
        self.started, self.sentinel = started, os.dup(sentinel)

    def start(self) -> None:
        self.started.append(time.monotonic())

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        os.close(self.sentinel)


@pytest.mark.usefixtures("_signals_of_before")
def test_workers_that_die_at_once_are_started_after_longer_and_longer_pauses_and_then_given_up(store: Path) -> None:
    started: list[float] = []
    ended, end = os.pipe()
    os.close(end)

    class Short(SpawnContext):
        def Process(self, **_: Any) -> Any:  # type: ignore[override]
            return DiesAtOnce(started, ended)

    try:
        assert supervisor.supervise_workers(ServeSettings(store=store, workers=2), [], lambda _: Short()) == 1
    finally:
        os.close(ended)
    assert len(started) == 2 * supervisor.MAX_SHORT_LIVES
    pauses = [b - a for a, b in itertools.pairwise(started[::2])]
    assert all(b > 1.5 * a for a, b in itertools.pairwise(pauses))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--host", "no.such.name.invalid"], "no such address"),
        (["--workers", "0"], "--workers: input should be greater than or equal to 1, got 0"),
        (["--workers", "100000"], "--workers is 100,000, at most"),
        (["--threads", "100000"], "--threads is 100,000, at most"),
        (["--max-connections", "1000000000"], "the limit of open files"),
        (["--max-connections", "10", "--max-per-address", "11"], "at most the 10 of --max-connections"),
        (["--event-store", "http://x"], "allowed: memory"),
        (["--unknown-user", "maybe"], "--unknown-user: input should be 'popular' or '404', got 'maybe'"),
        (["--admin-port", "0"], "--admin-port needs --keys"),
        (["--keys", "none.toml"], "none.toml"),
        (["--burst", "3"], "--burst goes with --rate"),
        (["--max-k", "20000"], "at most 10,000"),
        (["--target-wait", "200"], "at most --max-wait"),
        (["--trusted-proxies", "nonsense/33"], "no address or network"),
    ],
)
def test_settings_that_cannot_be_end_with_one_line_and_code_2(
    two_bundles: Path, flags: list[str], said: str, capfd: pytest.CaptureFixture[str], open_files: None
) -> None:
    code = run_command(["serve", "--store", str(two_bundles), "--port", "0", *flags])
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert said in err


@pytest.fixture
def open_files() -> Iterator[None]:
    """The limit of open files as it was, after a test that raises it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_fault_G28_a_module_of_kinds_that_does_not_exist_ends_the_service_before_it_listens(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "No module named 'no_such_kinds'; name an installed module, such as mypackage.losses"
    said = f"error: --kinds no_such_kinds: {reason}\n"
    for words in (["serve"], ["recommend", "--user", "1"], ["evaluate"], ["search", "x"]):
        at = [str(store)] if words[0] == "evaluate" else ["--store", str(store)]
        assert run_command([*words, *at, "--kinds", "json", "--kinds", "no_such_kinds"]) == 2
        assert capsys.readouterr().err == said


def test_fault_G29_a_bundle_that_names_code_imports_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, ran = "code_of_a_bundle", tmp_path / "ran"
    (tmp_path / f"{module}.py").write_text(f"open({str(ran)!r}, 'w').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mine = Path(shutil.copytree(store, tmp_path / "store"))
    facts = json.loads((mine / "bundles" / (mine / "CURRENT").read_text().strip() / "MANIFEST.json").read_text())
    schema, index = facts["schema"], facts["index"]
    strange = {"kind": f"{module}:Mine", "name": "strange", "side": "user"}
    for minute, changed in enumerate(
        (
            {"index": index | {"kind": f"{module}:Mine"}},
            {"schema": schema | {"features": [*schema["features"], strange]}},
        )
    ):
        name = hostile_towers.forged(mine, {}, minute, **changed)
        (mine / "CURRENT").write_text(name + "\n")
        outside = f"kind '{module}:Mine' is code outside twotower"
        said = f"{outside}, and {module} is not imported; import it, or pass --kinds {module}"
        for words in (["serve"], ["recommend", "--user", "u1"]):
            assert run_command([*words, "--store", str(mine)]) == 2
            assert capsys.readouterr().err == f"error: bundle {name}: {said}\n"
        assert run_command(["bundles", "--store", str(mine)]) == 0
        assert re.search(rf"^{name} .* current$", capsys.readouterr().out, re.M)
        (mine / "CURRENT").write_text(facts["bundle"] + "\n")
    assert not ran.exists()


def test_no_store_and_a_taken_port_are_told_at_once(store: Path, tmp_path: Path) -> None:
    with pytest.raises(twotower.TwoTowerError, match="not a store"):
        supervisor.run_service(ServeSettings(store=tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen on"):
            supervisor.listen("127.0.0.1", taken.getsockname()[1])


def test_a_key_is_made_by_a_verb(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["key", "shop", "--admin"]) == 0
    out, err = capfd.readouterr()
    secret = err.split()[-1]
    (tmp_path / "keys.toml").write_text(out)
    found = api_keys.ApiKeys(tmp_path / "keys.toml").find(secret)
    assert found is not None
    assert (found.name, found.admin) == ("shop", True)
