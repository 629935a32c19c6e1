"""Settings of a service."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twotower.errors import ConfigError
from twotower.section import first_problem

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of the folder in which prometheus-client keeps the metrics of several workers."""


class ServeSettings(BaseModel):
    """Addresses, limits and timeouts of a service. Raises ConfigError for a value that cannot be used."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    store: Annotated[
        Path | str, Field(description="Published bundles: a folder, or a prefix such as s3://BUCKET/STORE.")
    ]
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(description="Port. 0: a free one.", ge=0, le=65_535)] = 8000
    workers: Annotated[int, Field(description="Worker processes, of one core each.", ge=1)] = 1
    threads: Annotated[int, Field(description="Threads of one search.", ge=1)] = 1
    kinds: Annotated[
        tuple[str, ...], Field(description="Module to import, whose kinds the bundle names (repeatable).")
    ] = ()
    keys: Annotated[Path | None, Field(description="File of API keys, as `make_key()` prints them.")] = None
    insecure: Annotated[bool, Field(description="Listen beyond this machine without keys.")] = False
    admin_port: Annotated[
        int | None, Field(description="Port for rollback and reload, by a key of scope admin.", ge=0, le=65_535)
    ] = None
    event_store: Annotated[
        str, Field(description="Store of recent events: memory, or redis://HOST:PORT/DB, shared by workers and hosts.")
    ] = "memory"
    events_per_user: Annotated[int, Field(description="Newest events kept for a user.", ge=1)] = 200
    event_ttl: Annotated[int, Field(description="Seconds that a user's events are kept after the newest.", ge=1)] = (
        86_400
    )
    event_memory: Annotated[
        int,
        Field(description="Bytes of recent events in a worker, above which the least recent users are dropped.", ge=1),
    ] = 256 << 20
    event_timeout: Annotated[float, Field(description="Timeout of the event store in ms.", gt=0)] = 20.0
    rate: Annotated[float, Field(description="Requests per second of one client to one worker. 0: no limit.", ge=0)] = (
        0.0
    )
    burst: Annotated[int, Field(description="Requests of one client at once. 0: those of two seconds.", ge=0)] = 0
    trusted_proxies: Annotated[
        str, Field(description="Addresses and networks whose X-Forwarded-For is trusted, separated by commas.")
    ] = ""
    max_k: Annotated[int, Field(description="Largest k of a request.", ge=1)] = 1_000
    max_list: Annotated[int, Field(description="Largest number of items in one list of a request.", ge=1)] = 10_000
    max_batch: Annotated[int, Field(description="Largest number of requests in one batch.", ge=1)] = 100
    max_body: Annotated[int, Field(description="Largest body of a request in bytes.", ge=1)] = 1 << 20
    max_wait: Annotated[float, Field(description="Longest wait of a request in a burst, in ms.", gt=0)] = 50.0
    target_wait: Annotated[float, Field(description="Longest wait in a burst that does not end, in ms.", gt=0)] = 5.0
    unknown_user: Annotated[
        Literal["popular", "404"], Field(description="Answer to an unknown user: popular (popular items) or 404.")
    ] = "popular"
    index_timeout: Annotated[float, Field(description="Timeout of a remote index (Milvus) in ms.", gt=0)] = 250.0
    index_down: Annotated[
        Literal["popular", "503"],
        Field(description="Answer while a remote index is unavailable: popular (popular items) or 503."),
    ] = "popular"
    console: Annotated[bool, Field(description="Console page at /.")] = True
    access_log: Annotated[bool, Field(description="Log line for each request.")] = True
    poll: Annotated[float, Field(description="Seconds between two checks for a new bundle.", gt=0)] = 0.5
    memory_limit: Annotated[
        int, Field(description="Memory of the process in bytes. 0: the limit of the machine or control group.", ge=0)
    ] = 0
    drain: Annotated[float, Field(description="Seconds after SIGTERM in which new connections are accepted.", ge=0)] = (
        0.0
    )
    grace: Annotated[float, Field(description="Seconds after that for running requests to end.", gt=0)] = 10.0
    body_timeout: Annotated[
        float, Field(description="Timeout of a body, and of a client that reads a reply, in seconds.", gt=0)
    ] = 10.0
    keep_alive: Annotated[
        float, Field(description="Seconds that a connection is kept open without a whole head of a request.", ge=0.5)
    ] = 75.0
    max_connections: Annotated[
        int,
        Field(
            description="Largest number of connections of one worker. 0: by the limit of files, at most 4,096.", ge=0
        ),
    ] = 0
    max_per_address: Annotated[
        int,
        Field(
            description="Largest number of connections of one address but proxies. 0: half of `max_connections`.", ge=0
        ),
    ] = 0
    body_memory: Annotated[
        int, Field(description="Memory of all bodies and replies in bytes, without the first 16 KiB of each.", ge=1)
    ] = 64 << 20

    def __init__(self, **given: Path | str | float | tuple[str, ...] | None) -> None:
        try:
            super().__init__(**given)
        except ValidationError as e:
            where = e.errors()[0]["loc"]
            raise ConfigError(re.sub(rf"^{where[0]}(?=:)", rf"`{where[0]}`", first_problem(e))) from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        from twotower.retrieval.request import MAX_K  # loads numpy, which `twotower --help` does without

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
        return self


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
