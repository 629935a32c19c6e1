"""Engine `ray`: refusals, errors and lost processes in a Ray of this machine, which listens only on loopback."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import preloaded
import psutil
import pytest
from messages import collected_messages
from ray_worlds import address_of, imported_ray, running_ray

from twotower.engines import open_engine
from twotower.engines.ray import CLUSTER_SWITCH, RayEngine
from twotower.errors import ConfigError, DataError, RunError, Unavailable


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    with running_ray() as found:
        yield found


# ---- what is refused


def test_one_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # as if no test had begun one
    with pytest.raises(ConfigError, match="has 1: .* wait for each other for ever; set `threads=2` or more"):
        open_engine("ray", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ConfigError, match="set `threads=2` or more, or choose `engine='local'`"):
        open_engine("ray")
    open_engine("ray", 2)


def test_a_missing_ray_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine 'ray' is not installed; .*pip install -e '\.\[ray\]'") as e:
        open_engine("ray", 2)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("failures", [2, 3])
def test_a_cluster_that_cannot_start_a_process_is_asked_three_times(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, asked = imported_ray(), list[str]()

    def init(address: str, **_: object) -> None:
        asked.append(address)
        if len(asked) <= failures:
            raise ConnectionAbortedError("Initialization failure from server:\nTraceback")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    engine = open_engine("ray://head:10001")
    assert isinstance(engine, RayEngine)
    if failures < 3:
        with engine.started():
            assert asked == ["ray://head:10001"] * 3
    else:
        told = r"ray://head:10001 does not answer \(Initialization failure from server:\); start it"
        with pytest.raises(Unavailable, match=told), engine.started():
            raise AssertionError("no Ray is there")
        assert len(asked) == 3


# ---- a Ray that is lost


class Clock:
    """Stands for the module `time` of the engine: its seconds pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class LostRay:
    """Stands for the Ray of this process: its call `at` fails with `error`, and so does each cancel. A wait without a
    finished task takes its whole timeout, by a clock of its own."""

    def __init__(self, at: str, error: Exception) -> None:
        self.clock = Clock()
        self._at, self._error, self._silent = at, error, at == "available_resources"
        self.cancels, self.gcs_address = 0, ""

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ray = imported_ray()
        names = "is_initialized remote put wait get available_resources cluster_resources cancel get_runtime_context"
        for name in names.split():
            call = self._fail if name == self._at else getattr(self, name)
            monkeypatch.setattr(ray, name, call)
        monkeypatch.setattr("twotower.engines.ray.time", self.clock)

    def _fail(self, *_: object, **__: object) -> Any:
        raise self._error

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> LostRay:
        return self

    def put(self, job: object) -> object:
        return job

    def remote(self, first: object, *shards: int) -> Any:
        """Return the function of Ray; called on that, a reference to the result for a shard."""
        return shards[0] if shards else self

    def options(self, **_: object) -> LostRay:
        return self

    def wait(self, waiting: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return self.waited([] if self._silent else waiting[:1], waiting, timeout)

    def waited(self, ready: list[int], waiting: list[int], timeout: float) -> tuple[list[int], list[int]]:
        self.clock.now += 0.0 if ready else timeout
        return ready, [task for task in waiting if task not in ready]

    def get(self, shard: int) -> int:
        """Return what a shard gives."""
        return shard

    def available_resources(self) -> dict[str, float]:
        return {}

    def cluster_resources(self) -> dict[str, float]:
        return {}

    def cancel(self, shard: int, force: bool) -> None:
        self.cancels += 1
        raise ConnectionError("Client is shutting down.")


class RayWithHead(LostRay):
    """A Ray on whose head's host this process is not: a shard takes `seconds`, one after another."""

    def __init__(self, address: str, seconds: float) -> None:
        super().__init__("", ConnectionError())
        self.gcs_address, self._seconds, self._end = address, seconds, seconds

    def wait(self, waiting: list[int], timeout: float) -> tuple[list[int], list[int]]:
        self.clock.now = min(self.clock.now + timeout, max(self.clock.now, self._end))
        if self.clock.now < self._end:
            return [], waiting
        self._end = self.clock.now + self._seconds
        return waiting[:1], waiting[1:]


@pytest.mark.parametrize("seconds", [1.0, 3600.0])
def test_fault_C18_a_head_that_is_lost_ends_the_job(
    seconds: float, held: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the other hosts make shards, and before Ray would end the process, after a minute."""
    ray = RayWithHead(address_of(held), seconds)
    ray.put_in_place(monkeypatch)
    monkeypatch.setattr(imported_ray(), "available_resources", lambda: pytest.fail("Ray is asked"))
    told = rf"the Ray of this process answers no more \({ray.gcs_address} takes no connection: .*refused\); see"
    with pytest.raises(Unavailable, match=told):
        RayEngine("", 2, timeout=20.0).run(lambda: abs, range(100), lambda _: None)
    assert ray.clock.now == 40.0


def test_a_cluster_that_is_not_there_is_said_at_once(held: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """For which Ray itself waits minutes."""
    address = address_of(held)
    monkeypatch.setenv("RAY_ADDRESS", address)
    ray = imported_ray()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray is asked"))
    with pytest.raises(Unavailable, match=rf"^engine 'ray': {address} does not answer \(.*refused\); start it"):
        RayEngine("", 2).run(*doubles(3), print)


def run_lost(at: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> LostRay:
    """Run a job of three shards on a Ray that is lost."""
    lost = LostRay(at, error)
    lost.put_in_place(monkeypatch)
    RayEngine("", 2).run(*doubles(3), print)
    return lost


@pytest.mark.parametrize("at", ["put", "wait", "get", "available_resources"])
def test_a_ray_that_is_lost_within_a_job_is_unavailable(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an OSError, which would be one of the folder of the results, nor that of a cancel."""
    import grpc

    errors = [ConnectionError("no way")]
    errors += [] if at == "get" else [imported_ray().exceptions.RaySystemError("no way"), grpc.RpcError("no way")]
    said = r"^engine 'ray': the Ray of this process answers no more \(.*no way\); see .*, then call again to go on$"
    for error in errors:
        with pytest.raises(Unavailable, match=said):
            run_lost(at, error, monkeypatch)


def test_a_failing_call_of_the_user_cancels_the_shards_and_stays_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(made: int) -> None:
        raise BrokenPipeError("of the caller")

    lost = LostRay("", ConnectionError())
    lost.put_in_place(monkeypatch)
    with pytest.raises(BrokenPipeError, match="of the caller"):
        RayEngine("", 2).run(*doubles(3), failing)
    assert lost.cancels


def test_only_a_lost_process_is_called_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = imported_ray().exceptions
    lost: list[Exception] = [exceptions.WorkerCrashedError(), exceptions.LocalRayletDiedError()]
    lost += [exceptions.OutOfMemoryError("full"), exceptions.NodeDiedError("gone")]
    for error in lost:
        with pytest.raises(RunError, match=r"its process was lost 4 times \(.+\); give its hosts more memory"):
            run_lost("get", error, monkeypatch)
    others: list[tuple[Exception, str]] = [
        (
            exceptions.RuntimeEnvSetupError("no room"),
            r" \(Failed to set up runtime environment.*\); call again to go on",
        ),
        (
            exceptions.UnserializableException("Traceback:\n  line 7\nmine.Odd: no number"),
            r", after an error \(mine.Odd: no number\)",
        ),
    ]
    for error, told in others:
        with pytest.raises(RunError, match=f"^engine 'ray': a shard is given up{told}$"):
            run_lost("get", error, monkeypatch)


# ---- jobs


def doubles(shards: int) -> tuple[Callable[[], Callable[[int], int]], list[int]]:
    return lambda: lambda shard: 2 * shard, list(range(shards))


def collect(engine: RayEngine, job: Callable[[], Callable[[Any], Any]], shards: list[Any]) -> list[Any]:
    made: list[Any] = []
    engine.run(job, shards, made.append)
    return made


@pytest.mark.system  # Ray starts
def test_every_shard_is_made_once_with_one_thread_a_process(engine: RayEngine) -> None:
    assert sorted(collect(engine, *doubles(20))) == [2 * i for i in range(20)]
    variables = collect(engine, lambda: lambda name: os.environ[name], ["OMP_NUM_THREADS", "POLARS_MAX_THREADS"])
    assert variables == ["1", "1"]
    assert collect(engine, lambda: 1 / 0, []) == []  # type: ignore[arg-type, return-value]


@pytest.mark.system
def test_a_failing_shard_raises_its_own_error(engine: RayEngine) -> None:
    def job() -> Callable[[int], int]:
        def make(shard: int) -> int:
            if shard == 2:
                raise DataError("c.parquet: line 7: no number; correct it")
            return shard

        return make

    with pytest.raises(DataError) as e:
        collect(engine, job, list(range(6)))
    assert type(e.value) is DataError
    assert str(e.value) == "c.parquet: line 7: no number; correct it"
    assert sorted(collect(engine, *doubles(3))) == [0, 2, 4]


@pytest.mark.system
def test_fault_C18_a_lost_process_is_replaced_and_its_shard_made_again(engine: RayEngine, tmp_path: Path) -> None:
    def job() -> Callable[[int], int]:
        def make(shard: int) -> int:
            with (tmp_path / str(shard)).open("a") as tries:
                tries.write("x")
            if shard == 3 and (tmp_path / "3").read_text() == "x":
                os.kill(os.getpid(), signal.SIGKILL)
            return shard

        return make

    assert sorted(collect(engine, job, list(range(8)))) == list(range(8))
    assert (tmp_path / "3").read_text() == "xx"


@pytest.mark.system
def test_fault_C18_a_shard_that_always_loses_its_process_ends_the_job(engine: RayEngine, tmp_path: Path) -> None:
    def job() -> Callable[[int], int]:
        def make(shard: int) -> int:
            with (tmp_path / "tries").open("a") as tries:
                tries.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
            return shard

        return make

    with pytest.raises(RunError, match="a shard is given up, after its process was lost 4 times"):
        collect(engine, job, [0])
    assert (tmp_path / "tries").read_text() == "xxxx"


@pytest.mark.system
def test_fault_C18_a_job_that_gets_no_thread_ends_after_its_timeout(engine: RayEngine) -> None:
    """Three threads for a process, of a Ray that has two."""
    greedy = RayEngine("", 3, timeout=1.0)
    with (
        collected_messages(),
        pytest.raises(Unavailable, match=r"no shard is finished within \d+ seconds, with \d+ of 2 free CPUs"),
    ):
        collect(greedy, *doubles(2))
    assert sorted(collect(engine, *doubles(3))) == [0, 2, 4]


@pytest.mark.system
def test_a_ray_of_this_machine_listens_on_loopback_alone_and_reports_nothing(engine: RayEngine) -> None:
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    collect(engine, *doubles(2))
    found = set()
    for process in psutil.Process().children(recursive=True):
        for link in process.net_connections("inet"):
            found.add(re.sub(r"^::ffff:", "", link.laddr.ip))
    assert found == {"127.0.0.1"}


IMPORTED_BEFORE = """
import ray
from twotower.engines import open_engine
from twotower.errors import ConfigError
print(ray.util.get_node_ip_address())
try:
    engine = open_engine("ray", 2)
    with engine.started():
        engine.run(lambda: abs, [-1], print)
        print(ray.is_initialized())
except ConfigError as e:
    print(ray.is_initialized(), e, sep="\\n")
"""


@pytest.mark.system
def test_a_ray_that_would_listen_on_all_addresses_is_not_started() -> None:
    environment = {name: value for name, value in os.environ.items() if name != CLUSTER_SWITCH}
    done = preloaded.run("-c", IMPORTED_BEFORE, env=environment, timeout=300)
    address, began, error = done.stdout.splitlines()
    if address == "127.0.0.1":
        pytest.skip("this machine has no other address")
    assert began == "False"
    assert error.startswith("engine 'ray': this process has imported Ray before, and a Ray that it starts now")
    done = preloaded.run("-c", IMPORTED_BEFORE, env=environment | {CLUSTER_SWITCH: "0"}, timeout=300)
    assert done.stdout.splitlines() == ["127.0.0.1", "1", "True"]


@pytest.mark.system
def test_an_address_where_no_ray_is_is_refused() -> None:
    code = "from twotower.engines import open_engine\nopen_engine('ray://127.0.0.1:9').run(lambda: abs, [1], print)"
    done = preloaded.run("-c", code, timeout=300)
    assert "twotower.errors.Unavailable: engine 'ray': ray://127.0.0.1:9 does not answer" in done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a cluster of one host, and the environment of those who join it."""
    ports = [_free_port() for _ in range(2)]
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }  # fmt: skip
    words = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", "127.0.0.1",
        "--num-cpus", "2",
        "--include-dashboard=false", "--object-store-memory", "100000000",
        "--port", str(ports[0]), "--ray-client-server-port", str(ports[1]),
    ]  # fmt: skip
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
        try:
            yield f"ray://127.0.0.1:{ports[1]}", environment
        finally:
            started = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(120)
            for process in psutil.wait_procs(started, timeout=30)[1]:
                process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


CLIENT = """
import sys
from twotower.engines import open_engine
from twotower.errors import DataError, Unavailable

def failing():
    def make(shard):
        raise DataError("c.parquet: line 7: no number; correct it")
    return make

engine, made = open_engine(sys.argv[1]), []
for attempt in range(10):  # the head starts meanwhile
    try:
        engine.run(lambda: lambda shard: 2 * shard, list(range(8)), made.append)
        break
    except Unavailable:
        assert attempt < 9
print(sorted(made))
try:
    engine.run(failing, [0, 1, 2], print)
except DataError as e:
    print(type(e).__name__, e)
"""


@pytest.mark.system
def test_a_cluster_is_joined_by_its_address(cluster: tuple[str, dict[str, str]]) -> None:
    address, environment = cluster
    done = preloaded.run("-c", CLIENT, address, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str([2 * i for i in range(8)]),
        "DataError c.parquet: line 7: no number; correct it",
    ]
