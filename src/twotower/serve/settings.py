"""Settings of a service."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from twotower.errors import ConfigError
from twotower.retrieval.request import MAX_K

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of the folder in which prometheus-client keeps the metrics of several workers."""
UnknownUser = Literal["popular", "404"]
IndexDown = Literal["popular", "503"]


@dataclass(frozen=True)
class ServeSettings:
    """Addresses, limits and timeouts of a service. Raises ConfigError for a value that cannot be used."""

    store: Path
    """Folder of the store whose current bundle is served."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """TCP port. 0: a free one."""
    workers: int = 1
    """Number of worker processes."""
    threads: int = 1
    """Threads of one search and of one call of the user tower."""
    keys: Path | None = None
    """File of API keys. None: requests need no key."""
    insecure: bool = False
    """Allow a host that other machines can reach without keys."""
    admin_port: int | None = None
    """TCP port of rollback and reload. None: off."""
    trusted_proxies: str = ""
    """Addresses or networks, separated by commas, whose X-Forwarded-For is trusted."""
    rate: float = 0.0
    """Requests a second of one client to one worker. 0: no limit."""
    burst: int = 0
    """Requests of one client at once. 0: twice `rate`."""
    max_k: int = 1_000
    """Largest k of a request."""
    max_list: int = 10_000
    """Most entries of one list of a request: history, events, allow, ban."""
    max_batch: int = 100
    """Most requests of one batch."""
    max_body: int = 1 << 20
    """Largest request body in bytes."""
    max_wait: float = 50.0
    """Longest expected wait of a request during a burst, in milliseconds."""
    target_wait: float = 5.0
    """Longest expected wait once the queue has not been empty for `max_wait`, in milliseconds."""
    unknown_user: UnknownUser = "popular"
    """Reply for a user that the bundle does not have and the request does not describe: popular items, or 404."""
    event_store: str = "memory"
    """Event store: `memory`, or `redis://HOST:PORT/DB`, which workers and hosts share."""
    events_per_user: int = 200
    """Number of latest events kept per user."""
    event_ttl: int = 86_400
    """Seconds after a user's last event until the events are deleted."""
    event_memory: int = 256 << 20
    """Memory of recent events in one worker, in bytes; above it the users seen least recently are dropped."""
    event_timeout: float = 20.0
    """Timeout of the event store, in milliseconds."""
    index_timeout: float = 250.0
    """Timeout of a remote index (Milvus), in milliseconds."""
    index_down: IndexDown = "popular"
    """Reply while a remote index does not answer: popular items, or 503."""
    console: bool = True
    """Serve the console at /."""
    access_log: bool = True
    """Log a line for each request."""
    poll: float = 0.5
    """Seconds between two checks for a new bundle."""
    memory_limit: int = 0
    """Memory of the process in bytes; a bundle that would exceed it is refused. 0: the limit of the control group or machine."""
    drain: float = 0.0
    """Seconds from SIGTERM, when /readyz turns 503, until new connections are refused."""
    grace: float = 10.0
    """Seconds after that for requests in progress."""
    head_timeout: float = 10.0
    """Seconds for the head of a request to arrive."""
    body_timeout: float = 10.0
    """Seconds for a body to arrive, and for a client to read a part of its reply."""
    keep_alive: float = 75.0
    """Seconds until an idle connection is closed."""
    max_connections: int = 0
    """Most connections of one worker. 0: what the limit of open files allows, at most 4,096."""
    max_per_address: int = 0
    """Most connections of one address to one worker, trusted proxies excepted. 0: half of `max_connections`."""
    body_memory: int = 64 << 20
    """Memory of all bodies and replies in progress in one worker, in bytes, beyond 16 KiB of each."""

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "max_k", "max_list", "max_batch", "max_body", "events_per_user", "event_ttl",
                     "event_memory", "body_memory"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}, expected at least 1")
        for name in (
            "max_wait",
            "target_wait",
            "event_timeout",
            "index_timeout",
            "poll",
            "grace",
            "head_timeout",
            "body_timeout",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}, expected more than 0")
        for name in ("rate", "burst", "drain", "keep_alive", "memory_limit", "max_connections", "max_per_address"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}, expected at least 0")
        for name in ("rate", "max_wait", "target_wait", "event_timeout", "index_timeout", "poll", "drain", "grace", "head_timeout",
                     "body_timeout", "keep_alive"):  # fmt: skip
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"`{name}` is {getattr(self, name)}, expected a finite number")
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
        for name in ("port", "admin_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << 16:
                raise ConfigError(f"`{name}` is {value}, expected 0 to 65535")
        if self.unknown_user not in ("popular", "404"):
            raise ConfigError(f"`unknown_user` is '{self.unknown_user}' (allowed: popular, 404)")
        if self.index_down not in ("popular", "503"):
            raise ConfigError(f"`index_down` is '{self.index_down}' (allowed: popular, 503)")
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
    """Return the part of an address that counts as one client: an IPv4 address, or the first 64 bits of an IPv6 address.

    "" for a trusted proxy, which stands for many clients."""
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
