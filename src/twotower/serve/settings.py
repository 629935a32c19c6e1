"""Settings of a service."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from twotower.errors import ConfigError

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of the folder in which prometheus-client keeps the metrics of several workers."""


@dataclass(frozen=True)
class Setting:
    """Description of a setting, and its range."""

    description: str
    at_least: int | None = None
    above: int | None = None
    at_most: int | None = None

    def check(self, name: str, value: Path | str | float | tuple[str, ...] | None, choices: tuple[str, ...]) -> None:
        """Raise ConfigError unless the value is in the range, finite, and one of the choices, if there are any."""
        if choices and value not in choices:
            raise ConfigError(f"`{name}` is '{value}' (allowed: {', '.join(choices)})")
        if not isinstance(value, int | float):
            return
        if self.at_most is not None and not (self.at_least or 0) <= value <= self.at_most:
            raise ConfigError(f"`{name}` is {value}, expected {self.at_least} to {self.at_most}")
        if self.at_least is not None and not value >= self.at_least:
            raise ConfigError(f"`{name}` is {value}, expected at least {self.at_least}")
        if self.above is not None and not value > self.above:
            raise ConfigError(f"`{name}` is {value}, expected more than {self.above}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"`{name}` is {value}, expected a finite number")


@dataclass(frozen=True)
class ServeSettings:
    """Addresses, limits and timeouts of a service. Raises ConfigError for a value that cannot be used."""

    store: Annotated[Path | str, Setting("Published bundles: a folder, or a prefix such as s3://BUCKET/STORE.")]
    host: Annotated[str, Setting("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Setting("Port. 0: a free one.", at_least=0, at_most=65_535)] = 8000
    workers: Annotated[int, Setting("Worker processes, of one core each.", at_least=1)] = 1
    threads: Annotated[int, Setting("Threads of one search.", at_least=1)] = 1
    kinds: Annotated[tuple[str, ...], Setting("Module to import, whose kinds the bundle names (repeatable).")] = ()
    keys: Annotated[Path | None, Setting("File of API keys, as `make_key()` prints them.")] = None
    insecure: Annotated[bool, Setting("Listen beyond this machine without keys.")] = False
    admin_port: Annotated[
        int | None, Setting("Port for rollback and reload, by a key of scope admin.", at_least=0, at_most=65_535)
    ] = None
    event_store: Annotated[
        str, Setting("Store of recent events: memory, or redis://HOST:PORT/DB, shared by workers and hosts.")
    ] = "memory"
    events_per_user: Annotated[int, Setting("Newest events kept for a user.", at_least=1)] = 200
    event_ttl: Annotated[int, Setting("Seconds that a user's events are kept after the newest.", at_least=1)] = 86_400
    event_memory: Annotated[
        int,
        Setting("Bytes of recent events in a worker, above which the least recent users are dropped.", at_least=1),
    ] = 256 << 20
    event_timeout: Annotated[float, Setting("Timeout of the event store in ms.", above=0)] = 20.0
    rate: Annotated[float, Setting("Requests per second of one client to one worker. 0: no limit.", at_least=0)] = 0.0
    burst: Annotated[int, Setting("Requests of one client at once. 0: those of two seconds.", at_least=0)] = 0
    trusted_proxies: Annotated[
        str, Setting("Addresses and networks whose X-Forwarded-For is trusted, separated by commas.")
    ] = ""
    max_k: Annotated[int, Setting("Largest k of a request.", at_least=1)] = 1_000
    max_list: Annotated[int, Setting("Largest number of items in one list of a request.", at_least=1)] = 10_000
    max_batch: Annotated[int, Setting("Largest number of requests in one batch.", at_least=1)] = 100
    max_body: Annotated[int, Setting("Largest body of a request in bytes.", at_least=1)] = 1 << 20
    max_wait: Annotated[float, Setting("Longest wait of a request in a burst, in ms.", above=0)] = 50.0
    target_wait: Annotated[float, Setting("Longest wait in a burst that does not end, in ms.", above=0)] = 5.0
    unknown_user: Annotated[
        Literal["popular", "404"], Setting("Answer to an unknown user: popular (popular items) or 404.")
    ] = "popular"
    index_timeout: Annotated[float, Setting("Timeout of a remote index (Milvus) in ms.", above=0)] = 250.0
    index_down: Annotated[
        Literal["popular", "503"],
        Setting("Answer while a remote index is unavailable: popular (popular items) or 503."),
    ] = "popular"
    console: Annotated[bool, Setting("Console page at /.")] = True
    access_log: Annotated[bool, Setting("Log line for each request.")] = True
    poll: Annotated[float, Setting("Seconds between two checks for a new bundle.", above=0)] = 0.5
    memory_limit: Annotated[
        int, Setting("Memory of the process in bytes. 0: the limit of the machine or control group.", at_least=0)
    ] = 0
    drain: Annotated[float, Setting("Seconds after SIGTERM in which new connections are accepted.", at_least=0)] = 0.0
    grace: Annotated[float, Setting("Seconds after that for running requests to end.", above=0)] = 10.0
    body_timeout: Annotated[
        float, Setting("Timeout of a body, and of a client that reads a reply, in seconds.", above=0)
    ] = 10.0
    keep_alive: Annotated[
        float, Setting("Seconds that a connection is kept open without a whole head of a request.", at_least=0)
    ] = 75.0
    max_connections: Annotated[
        int,
        Setting("Largest number of connections of one worker. 0: by the limit of files, at most 4,096.", at_least=0),
    ] = 0
    max_per_address: Annotated[
        int,
        Setting("Largest number of connections of one address but proxies. 0: half of `max_connections`.", at_least=0),
    ] = 0
    body_memory: Annotated[
        int, Setting("Memory of all bodies and replies in bytes, without the first 16 KiB of each.", at_least=1)
    ] = 64 << 20

    def __post_init__(self) -> None:
        from twotower.retrieval.request import MAX_K  # loads numpy, which `twotower --help` does without

        for name, hint in HINTS.items():
            kind, setting = get_args(hint)
            setting.check(name, getattr(self, name), get_args(kind) if get_origin(kind) is Literal else ())
        processors = os.cpu_count() or 1
        for name in ("workers", "threads"):
            if getattr(self, name) > (allowed := max(16, 4 * processors)):
                raise ConfigError(
                    f"`{name}` is {getattr(self, name):,}, at most {allowed} on this machine of {processors} processors"
                )
        if self.max_k > MAX_K:
            raise ConfigError(f"`max_k` is {self.max_k}, expected at most {MAX_K:,}")
        if self.target_wait > self.max_wait:
            raise ConfigError(f"`target_wait` is {self.target_wait:g}, expected at most `max_wait`, {self.max_wait:g}")
        if self.burst and not self.rate:
            raise ConfigError("`burst` goes with `rate`, which is not given")
        for address in filter(None, self.trusted_proxies.split(",")):
            try:
                ipaddress.ip_network(address.strip(), strict=False)
            except ValueError:
                raise ConfigError(
                    f"`trusted_proxies`: '{address}' is no address or network, such as 10.0.0.0/8"
                ) from None
        if self.event_store != "memory":
            _check_url(self.event_store)
        if self.admin_port is not None and self.keys is None:
            raise ConfigError(
                "`admin_port` needs `keys`, a file with a key of scope admin; `make_key(name, admin=True)` makes one"
            )
        if not (self.keys or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"`host` {self.host} can be reached from other machines; give `keys`, a file of API keys "
                "(`make_key(name)` makes one), or `insecure=True` if a proxy in front of it admits only known clients"
            )


HINTS = get_type_hints(ServeSettings, include_extras=True)
"""Setting -> its type, annotated with its `Setting`."""


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach an address or host name. Raises ConfigError for an unknown name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        raise ConfigError(f"`host` {host}: no such address or name") from None
    return all(ipaddress.ip_address(str(address)).is_loopback for address in found)


def client_address(host: str, proxies: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()) -> str:
    """Return the part of an address that counts as one client: an IPv4 address, or 64 bits of an IPv6 address.

    "" for a trusted proxy, which has many clients."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    if any(found in network for network in proxies if network.version == found.version):
        return ""
    return str(found) if found.version == 4 else found.exploded[:19]


def _check_url(url: str) -> None:
    """Raise ConfigError unless the URL is of a supported store. The message does not repeat a password in the URL."""
    allowed = "(allowed: memory, redis://HOST:PORT/DB, rediss://…, unix:///PATH)"
    try:
        parts = urlsplit(url)
        port, database = parts.port, parts.path.removeprefix("/")
    except ValueError:
        raise ConfigError(f"`event_store` is no URL {allowed}") from None
    where = f"{parts.scheme}://{parts.hostname or ''}"
    if parts.scheme == "unix" and parts.path:
        return
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or port == 0:
        raise ConfigError(f"`event_store` is '{where if parts.scheme else url[:20]}' {allowed}")
    if database and not database.isdecimal():
        raise ConfigError(f"`event_store` {where}: the database is '{database[:20]}', expected a number {allowed}")
