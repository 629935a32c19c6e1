"""Engine `ray`: tasks of Ray on this machine or on a cluster. The extra `ray` installs it.

A Ray that this engine starts listens only on loopback addresses and ends with the job; otherwise the start is refused.
A Ray that this process has already started is used, and so is the cluster of RAY_ADDRESS, which `ray job submit` sets.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic

from twotower.engines.engine import Job, JobEngine, Made, Shard
from twotower.errors import ConfigError, RunError, TwoTowerError, Unavailable, first_line, install_command
from twotower.kinds import import_modules
from twotower.machine import default_threads
from twotower.version import __version__

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

RETRIES = 3
"""Number of repetitions of a shard whose process is lost."""
TIMEOUT = 1800.0
"""Seconds without a finished shard until a job fails."""
WAITING = 1024
"""Largest number of shards that are submitted to Ray at a time."""
STARTS = 3
"""Attempts to join or start a Ray whose processes do not start within its half a minute, as on a busy machine."""
REPORT = 30.0
"""Seconds without a finished shard until a line with the free CPUs is logged."""
LOOK = 10.0
"""Seconds between two connections to the head."""
HEAD_SILENCE = 30.0
"""Seconds for which the head may accept no connection. After 60, Ray ends the process without an exception."""
CONNECTION = 5.0
"""Timeout of a connection to the head. Seconds."""
STORE_BYTES = 100_000_000
"""Object memory of a Ray on this machine: tasks read and write files, and Ray transfers only descriptions of shards."""
LOOPBACK = "127.0.0.1"
CLUSTER_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Variable that Ray reads at its import. Unless it is 0, the processes of a machine listen on all of its addresses."""


class RayEngine(JobEngine):
    """Makes the shards in processes of Ray.

    `threads` on this machine: number of processes with one thread each. On a cluster: threads of a process, 0 for
    one."""

    name = "ray"
    is_remote = True

    def __init__(self, address: str, threads: int, timeout: float = TIMEOUT) -> None:
        """Check that Ray can be used. Raises ConfigError if it is not installed, for one thread on this machine, or for
        an address in a process that has started another Ray."""
        if find_spec("ray") is None:
            raise ConfigError(f"engine 'ray' is not installed; choose `engine='local'`, or {install_command('ray')}")
        has_begun = "ray" in sys.modules and sys.modules["ray"].is_initialized()
        if has_begun and address:
            raise ConfigError(
                f"`engine` is '{address}', and this process has begun a Ray already; choose `engine='ray'` to use that"
            )
        self._address, self._timeout = address or os.environ.get("RAY_ADDRESS", ""), timeout
        self._joins = bool(self._address or has_begun)
        self._where = self._address or ("the Ray of this process" if has_begun else "this machine")
        self._threads = threads or (1 if self._joins else default_threads())
        self.processes = 1 if self._joins else self._threads
        if not self._joins and self._threads < 2:
            raise ConfigError(
                "engine 'ray' shares work among the threads of this machine, and has 1: with one, whoever makes a "
                "shard and whoever waits for it may wait for each other for ever; set `threads=2` or more, or choose "
                "`engine='local'`"
            )

    def run(
        self, job: Job[Shard, Made], shards: Sequence[Shard], done: Callable[[Made], None], modules: Sequence[str] = ()
    ) -> None:
        """Make the shards as tasks. Ray repeats a task whose process or host is lost. The job fails after `timeout`
        seconds without a finished shard, or if a shard fails. Raises TwoTowerError of a task, RunError, Unavailable."""
        if not shards:
            return
        with self.started(), closing(self._made(job, shards, modules)) as all_made:
            for made in all_made:
                done(made)

    def _made(self, job: Job[Shard, Made], shards: Sequence[Shard], modules: Sequence[str]) -> Generator[Made]:
        """Yield the results of the shards in the order of completion; an early end cancels the others."""
        import ray

        threads = self._threads if self._joins else 1
        variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS")}
        running: list[ObjectRef[Made]] = []
        try:
            task = ray.remote(_make).options(  # type: ignore[var-annotated]
                num_cpus=threads, max_retries=RETRIES, runtime_env={"env_vars": variables}
            )
            sent, left = _Sent(uuid.uuid4().hex, ray.put(job), tuple(modules)), iter(shards)
            # Ray's client reports a lost connection itself.
            is_client = ray.util.client.ray.is_connected()  # type: ignore[no-untyped-call]
            head = "" if is_client else str(ray.get_runtime_context().gcs_address)
            last = reported = connected = time.monotonic()
            while True:
                running += [task.remote(sent, shard) for shard in islice(left, WAITING - len(running))]
                if not running:
                    return
                ready, running = ray.wait(running, timeout=min(LOOK, self._timeout))
                now = time.monotonic()
                if head and now - connected >= LOOK:
                    connect(head, HEAD_SILENCE)
                    now = connected = time.monotonic()
                if ready:
                    last = reported = now
                elif (silent := now - last) >= self._timeout:
                    raise Unavailable(
                        f"engine 'ray': no shard is finished within {silent:,.0f} seconds, with {_free_cpus()}; see "
                        "that the cluster has free ones, or choose smaller shards (`shard_rows`), then call again to "
                        "go on"
                    )
                elif now - reported >= REPORT:
                    reported = now
                    log.info(f"engine 'ray': no shard is finished for {silent:,.0f} seconds, with {_free_cpus()}")
                yield from map(_result, ready)
        except ray.exceptions.RayTaskError:
            raise
        except _losses() as e:
            raise Unavailable(
                f"engine 'ray': {self._where} answers no more ({first_line(e)}); see that its hosts run and reach each "
                "other, then call again to go on"
            ) from e
        finally:
            with suppress(Exception):  # a lost Ray cancels nothing, and the first error is raised
                for ref in running:
                    ray.cancel(ref, force=True)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Join Ray, or start it on this machine, for the block. Raises Unavailable; ConfigError if Ray was imported
        before and would listen on other addresses than loopback."""
        _set_environment(self._address)
        import ray

        if ray.is_initialized():
            yield
            return
        is_own = not self._joins and os.environ[CLUSTER_SWITCH] == "0"
        if is_own and ray.util.get_node_ip_address() != LOOPBACK:  # type: ignore[no-untyped-call]
            raise ConfigError(
                "engine 'ray': this process has imported Ray before, and a Ray that it starts now would listen on all "
                f"addresses of this machine; set {CLUSTER_SWITCH}=0 before the import, begin a Ray of your own "
                "(`ray.init()`), or choose `engine='local'`"
            )
        begin = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
        try:
            if self._joins:
                if re.fullmatch(r"[^/]+:\d+", self._address):
                    connect(self._address)  # fails at once, where Ray waits minutes
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Ray Client connection timed out")  # the error says it
                    _start(partial(begin, self._address), lambda e: isinstance(e, ConnectionAbortedError))
            else:
                local = partial(
                    begin, "local", num_cpus=self._threads, include_dashboard=False, object_store_memory=STORE_BYTES,
                    _node_ip_address=LOOPBACK,
                )  # fmt: skip
                _start(local, lambda e: type(e) is Exception)  # raised if processes do not start
        except (ConnectionError, OSError, RuntimeError, TimeoutError, ValueError) as e:
            raise Unavailable(
                f"engine 'ray': {self._where} does not answer ({first_line(e)}); start it, name another address, or "
                "set RAY_AUTH_MODE=token where its hosts have a token"
            ) from e
        try:
            yield
        finally:
            ray.shutdown()


def _start(begin: Callable[[], Made], may_pass: Callable[[Exception], bool]) -> None:
    """Join or start Ray, in up to STARTS attempts while its error `may_pass`, and stop the processes of a failed start.

    Raises the errors of Ray; ConnectionError if the last error may pass."""
    for left in reversed(range(STARTS)):
        try:
            begin()
            return
        except Exception as e:
            _stop_started(e)
            if not may_pass(e):
                raise
            if not left:
                raise ConnectionError(str(e)) from e


def _stop_started(error: Exception) -> None:
    """Stop the processes of a Ray whose start raised the error; Ray stops them only at the end of this process."""
    import ray

    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), ray._private.node.Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def _set_environment(address: str) -> None:
    """Set the variables that Ray reads at its import and start."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the future default; without it Ray warns
    if not address:
        os.environ.setdefault(CLUSTER_SWITCH, "0")


def connect(address: str, seconds: float = 0.0) -> None:
    """Connect to HOST:PORT and close, with retries for `seconds`. Raises ConnectionError."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), CONNECTION).close()
        except OSError as e:
            if time.monotonic() >= end:
                raise ConnectionError(f"{address} takes no connection: {e}") from e
            time.sleep(1)


def _free_cpus() -> str:
    """Return the free and all CPUs of Ray, as "3 of 8 free CPUs"."""
    import ray

    free, all_ = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
    return f"{free.get('CPU', 0):g} of {all_.get('CPU', 0):g} free CPUs"


def _losses() -> tuple[type[Exception], ...]:
    """Return the errors of a lost Ray, with gRPC's if Ray's client is installed."""
    import ray

    found = (ConnectionError, ray.exceptions.RayError)
    if find_spec("grpc") is None:
        return found
    import grpc

    return (*found, grpc.RpcError)


def _result(ref: ObjectRef[Made]) -> Made:
    """Return the result of a task. Raises its error of this package, RunError if its processes or its result are
    lost."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, TwoTowerError):
            raise e.cause from None
        if isinstance(e.cause, ray.exceptions.RayError):  # the task needs a lost object of Ray
            raise RunError(f"engine 'ray': a shard is given up ({first_line(e.cause)}); call again to go on") from e
        raise
    except (
        ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError,
        ray.exceptions.LocalRayletDiedError,
    ) as e:  # fmt: skip
        raise RunError(
            f"engine 'ray': a shard is given up, after its process was lost {RETRIES + 1} times ({first_line(e)}); "
            "give its hosts more memory or choose smaller shards (`shard_rows`), then call again to go on"
        ) from e
    except ray.exceptions.UnserializableException as e:  # the text ends with the error of the task
        raise RunError(f"engine 'ray': a shard is given up, after an error ({str(e).splitlines()[-1]})") from e
    except ray.exceptions.RayError as e:
        raise RunError(f"engine 'ray': a shard is given up ({first_line(e)}); call again to go on") from e


_loaded = dict[str, Callable[[Any], Any]]()
"""Token of a job -> function that makes its shards, in a process of Ray; only for the latest job."""


@dataclass(frozen=True)
class _Sent(Generic[Shard, Made]):
    """A job, which each process of Ray fetches once."""

    token: str
    job: ObjectRef[Job[Shard, Made]]
    modules: tuple[str, ...]
    version: str = __version__


def _make(sent: _Sent[Shard, Made], shard: Shard) -> Made:
    """Make a shard in a process of Ray."""
    import ray

    if sent.token not in _loaded:
        if sent.version != __version__:
            raise RunError(
                f"a host of Ray has twotower {__version__}, and the call {sent.version}; install one version on all"
            )
        _loaded.clear()
        import_modules(sent.modules)
        _loaded[sent.token] = ray.get(sent.job)()
    made: Made = _loaded[sent.token](shard)
    return made
