"""Access to a service: API keys, hosts, origins, and the rate of each client."""

from __future__ import annotations

import functools
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from urllib.parse import unquote_to_bytes

from starlette.types import Scope

from twotower.serve.api_keys import ApiKey, ApiKeys
from twotower.serve.problems import Problem
from twotower.serve.settings import ServeSettings, client_address, is_loopback

Headers = Mapping[bytes, bytes]
"""Headers of a request, by their names in lower case."""
PUBLIC_PATHS = ("/", "/livez", "/readyz", "/problems", "/page", "/openapi.json", "/favicon.ico")
"""Paths and prefixes served without a key: they reveal nothing of users or items."""
LIMITED_PATHS = ("/v1/", "/openapi.json")
"""Prefixes of the paths that the rate of a client limits, and that an overload refuses."""


class AccessPolicy:
    """Decides which requests are answered, and names their clients."""

    def __init__(self, settings: ServeSettings, keys: ApiKeys | None, admin: bool) -> None:
        """With `admin` only keys of scope admin are accepted."""
        s = settings
        self._keys, self._admin = keys, admin
        self._limiter = RateLimiter(s.rate, s.burst) if s.rate else None
        # Without keys, a page of another site whose name resolves to this address (DNS rebinding) could read replies.
        self._local = keys is None and not s.insecure and is_loopback(s.host)
        self._hosts = {b"localhost", b"127.0.0.1", b"[::1]", s.host.encode(), b"[" + s.host.encode() + b"]"}
        self._address = functools.lru_cache(4_096)(client_address)

    def address(self, scope: Scope) -> str:
        """Return the address of the client, as `settings.client_address` counts it."""
        return self._address((scope.get("client") or ("-",))[0])

    def find_key(self, headers: Headers) -> ApiKey | None:
        """Return the key of a request, None without a valid one."""
        bearer = headers.get(b"authorization", b"")
        if self._keys is None or bearer[:7].lower() != b"bearer ":
            return None
        return self._keys.find(bearer[7:].decode("latin-1").strip())

    def authorize(self, scope: Scope, headers: Headers, key: ApiKey | None, client: str) -> str:
        """Return the name of the client's key, "-" without one. Raises Problem for a request that is not allowed."""
        _check_target_encoding(scope)
        path: str = scope["path"]
        is_public = path == "/" or path.startswith(PUBLIC_PATHS[1:])
        if self._keys is not None and not is_public:
            if key is None:
                raise Problem("unauthorized", headers={"WWW-Authenticate": 'Bearer realm="twotower"'})
            if self._admin and not key.admin:
                raise Problem("key-scope")
        if self._local and (host := headers.get(b"host")) and re.sub(rb":\d+$", b"", host).lower() not in self._hosts:
            raise Problem("foreign-host")
        if self._keys is None and not is_public and _is_cross_origin(headers):
            raise Problem("foreign-origin")
        if self._limiter is not None and path.startswith(LIMITED_PATHS):
            self._limiter.take(client)
        return key.name if key and not is_public else "-"


class RateLimiter:
    """Token buckets of the `clients` most recent clients; a client seen for the first time has a full one.

    `rate` is in requests a second, more than 0. `burst` is the size of a bucket; 0: twice the rate, at least 1."""

    def __init__(
        self, rate: float, burst: int = 0, clients: int = 100_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = rate
        self.burst = burst or max(1, math.ceil(2 * rate))
        self.clients = clients
        self._clock = clock
        self._full: OrderedDict[str, float] = OrderedDict()
        """By client, the time of the clock at which its bucket is full again."""

    def take(self, client: str) -> None:
        """Take a token of the client. Raises Problem "rate-limit", with seconds in Retry-After, if none is left."""
        now = self._clock()
        full = max(now, self._full.pop(client, now))
        missing = 1.0 - (self.burst - (full - now) * self.rate)
        refused = missing > 1e-6  # below, the clock was rounded
        self._full[client] = full if refused else full + 1.0 / self.rate
        while len(self._full) > self.clients:
            self._full.popitem(last=False)
        if refused:
            wait = max(1, math.ceil(missing / self.rate))
            raise Problem(
                "rate-limit",
                f"more than {self.rate:g} requests a second (at most {self.burst} at once); wait {wait} s",
                headers={"Retry-After": str(wait)},
            )


def _check_target_encoding(scope: Scope) -> None:
    """Raise Problem for a path or query that is not UTF-8: decoded with replacements it could be another user's id."""
    for name, part in (("path", scope.get("raw_path") or b""), ("query", scope["query_string"])):
        if b"%" in part or not part.isascii():
            try:
                unquote_to_bytes(part).decode()
            except UnicodeDecodeError:
                raise Problem(
                    "invalid", f"the {name} is not UTF-8; percent-encode the bytes of an id in UTF-8"
                ) from None


def _is_cross_origin(headers: Headers) -> bool:
    """Return whether a browser sends the request for a page of another origin.

    `Sec-Fetch-Site` is set by the browser and holds behind any proxy, but browsers send it only over TLS or to this
    machine. Otherwise `Origin` and `Host` must name the same host; the scheme may differ, because a proxy may
    terminate TLS. Programs other than browsers send neither header."""
    site, origin = headers.get(b"sec-fetch-site", b"none"), headers.get(b"origin")
    if site != b"none":
        return site != b"same-origin"
    if origin is None:
        return False
    scheme, _, origin_host = origin.lower().partition(b"://")
    port = {b"http": b":80", b"https": b":443"}.get(scheme)
    host = headers.get(b"host", b"").lower()
    return port is None or not host or origin_host.removesuffix(port) != host.removesuffix(port)
