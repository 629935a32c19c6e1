"""What a service is told when it starts."""

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
from twotower.request import MAX_K

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus-client keeps the numbers of several workers."""
UnknownUser = Literal["popular", "404"]
IndexDown = Literal["popular", "503"]


@dataclass(frozen=True)
class ServeSettings:
    """Limits and addresses of a service. Raises ConfigError for what cannot be."""

    store: Path
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    workers: int = 1
    threads: int = 1
    """Threads of one search and of one run of the tower."""
    keys: Path | None = None
    """File of API keys; without one everybody may ask."""
    insecure: bool = False
    """Listen beyond this machine without keys."""
    admin_port: int | None = None
    trusted_proxies: str = ""
    """Addresses, separated by commas, whose X-Forwarded-For is believed."""
    rate: float = 0.0
    """Requests a second of one client to one worker; 0 does not limit."""
    burst: int = 0
    """Requests at once of one client; 0 takes two seconds' worth."""
    max_k: int = 1_000
    max_list: int = 10_000
    """Items of one list of a request: history, events, allow, ban."""
    max_batch: int = 100
    max_body: int = 1 << 20
    """Bytes."""
    max_wait: float = 50.0
    """Milliseconds that a request may have to wait for its turn while bursts come and go."""
    target_wait: float = 5.0
    """… and while the queue has not been empty for `max_wait`."""
    unknown_user: UnknownUser = "popular"
    event_store: str = "memory"
    """Where live histories are kept: `memory`, or `redis://HOST:PORT/DB`, which workers and hosts share."""
    events_per_user: int = 200
    """Latest events kept of a user."""
    event_ttl: int = 86_400
    """A user's events are forgotten so long after the last."""
    event_memory: int = 256 << 20
    """Bytes that live histories may take in a worker; over it the users go who were not seen for longest."""
    event_timeout: float = 20.0
    """Milliseconds to wait for the store of live histories."""
    index_timeout: float = 250.0
    """Milliseconds to wait for an index that is elsewhere (Milvus)."""
    index_down: IndexDown = "popular"
    """What is answered while it does not answer."""
    console: bool = True
    access_log: bool = True
    poll: float = 0.5
    """Seconds between two looks at which bundle is current."""
    memory_limit: int = 0
    """Bytes this process may take before a bundle is refused; 0 asks the machine and the control group."""
    drain: float = 0.0
    """Seconds between SIGTERM, when /readyz says no, and the last new connection."""
    grace: float = 10.0
    """Seconds that requests under way may then still take."""
    head_timeout: float = 10.0
    """Seconds in which the head of a request must have come."""
    body_timeout: float = 10.0
    """Seconds in which a body must have come, and in which a client must take a part of its reply."""
    keep_alive: float = 75.0
    """Seconds that an idle connection is kept."""
    max_connections: int = 0
    """Connections of one worker; 0 takes what the limit of open files leaves, at most 4,096."""
    max_per_address: int = 0
    """Connections of one address to one worker, trusted proxies excepted; 0 takes half of `max_connections`."""
    body_memory: int = 64 << 20
    """Bytes that bodies and replies under way may take together, beyond 16 KiB of each."""

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "max_k", "max_list", "max_batch", "max_body", "events_per_user", "event_ttl",
                     "event_memory", "body_memory"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}, expected at least 1")
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
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}, expected more than 0")
        for name in ("rate", "burst", "drain", "keep_alive", "memory_limit", "max_connections", "max_per_address"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}, expected at least 0")
        for name in ("rate", "max_wait", "target_wait", "event_timeout", "index_timeout", "poll", "drain", "grace", "head_timeout",
                     "body_timeout", "keep_alive"):  # fmt: skip
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}, expected a finite number")
        processors = os.cpu_count() or 1
        for name in ("workers", "threads"):
            if getattr(self, name) > (allowed := max(16, 4 * processors)):
                raise ConfigError(
                    f"{_flag(name)} is {getattr(self, name):,}, at most {allowed} on this machine of {processors} processors"
                )
        if self.max_k > MAX_K:
            raise ConfigError(f"--max-k is {self.max_k}, at most {MAX_K:,} can be asked for")
        if self.target_wait > self.max_wait:
            raise ConfigError(f"--target-wait is {self.target_wait:g}, expected at most --max-wait, {self.max_wait:g}")
        if self.burst and not self.rate:
            raise ConfigError("--burst goes with --rate, which is not given")
        for address in filter(None, self.trusted_proxies.split(",")):
            try:
                ipaddress.ip_network(address.strip(), strict=False)
            except ValueError:
                raise ConfigError(
                    f"--trusted-proxies: '{address}' is no address or network, such as 10.0.0.0/8"
                ) from None
        for name in ("port", "admin_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << 16:
                raise ConfigError(f"{_flag(name)} is {value}, expected 0 to 65535")
        if self.unknown_user not in ("popular", "404"):
            raise ConfigError(f"--unknown-user is '{self.unknown_user}' (allowed: popular, 404)")
        if self.index_down not in ("popular", "503"):
            raise ConfigError(f"--index-down is '{self.index_down}' (allowed: popular, 503)")
        if self.event_store != "memory":
            _check_url(self.event_store)
        if self.admin_port is not None and self.keys is None:
            raise ConfigError("--admin-port needs --keys FILE with a key of scope admin; `twotower key NAME --admin`")
        if not (self.keys or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines; give --keys FILE (`twotower key NAME` makes "
                "a key), or --insecure if something in front of it keeps strangers out"
            )


def is_loopback(host: str) -> bool:
    """Whether an address or name is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host}: no such address or name") from None
    return all(ipaddress.ip_address(str(address)).is_loopback for address in found)


def client_address(host: str, proxies: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()) -> str:
    """The unit counted as one client: an IPv4 address, or the 64 bits of IPv6 that a subscriber has; nothing of a trusted
    proxy, which speaks for many."""
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
    """Raises ConfigError, which does not repeat the password that a URL may hold."""
    allowed = "(allowed: memory, redis://HOST:PORT/DB, rediss://…, unix:///PATH)"
    try:
        parts = urlsplit(url)
        port, database = parts.port, parts.path.removeprefix("/")
    except ValueError:
        raise ConfigError(f"--event-store is no URL {allowed}") from None
    where = f"{parts.scheme}://{parts.hostname or ''}"
    if parts.scheme == "unix" and parts.path:
        return
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or port == 0:
        raise ConfigError(f"--event-store is '{where if parts.scheme else url[:20]}' {allowed}")
    if database and not database.isdecimal():
        raise ConfigError(f"--event-store {where}: the database is '{database[:20]}', expected a number {allowed}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
