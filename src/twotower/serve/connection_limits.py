"""Most connections of one worker, by the limit of open files."""

from __future__ import annotations

from twotower.errors import ConfigError

MAX_OPEN_FILES, RESERVED_FILES = 65_536, 96
"""Highest limit of open files that the process sets; files reserved for bundles, logs, other stores and processes."""
DEFAULT_MAX_CONNECTIONS = 4_096
"""Default number of connections of one worker, if the limit of open files allows it."""
MAX_REFUSED_OPEN = 16
"""Most refused connections that stay open at once so that their clients can read the reply."""


def connection_limits(max_connections: int, max_per_address: int) -> tuple[int, int]:
    """Raise the soft limit of open files, and return the most connections of one worker and of one address.

    0 asks for the default: what the limit of open files allows, up to DEFAULT_MAX_CONNECTIONS, and half of that for an
    address. Raises ConfigError if the limit of open files does not allow the numbers."""
    files = _raise_open_files()
    available = files - RESERVED_FILES
    remedy = "raise it with ulimit -n, or LimitNOFILE in a systemd unit"
    if available < MAX_REFUSED_OPEN + 8:
        raise ConfigError(
            f"the limit of open files is {files}, at least {RESERVED_FILES + MAX_REFUSED_OPEN + 8} are needed; {remedy}"
        )
    available -= MAX_REFUSED_OPEN
    if max_connections > available:
        raise ConfigError(
            f"`max_connections` is {max_connections:,}, but the limit of open files, {files:,}, leaves {available:,}; "
            f"{remedy}"
        )
    max_connections = max_connections or min(available, DEFAULT_MAX_CONNECTIONS)
    if max_per_address > max_connections:
        raise ConfigError(
            f"`max_per_address` is {max_per_address:,}, expected at most the {max_connections:,} of `max_connections`"
        )
    return max_connections, max_per_address or -(-max_connections // 2)


def _raise_open_files() -> int:
    """Raise the soft limit of open files up to MAX_OPEN_FILES; return the limit, MAX_OPEN_FILES without one."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, MAX_OPEN_FILES) if hard != resource.RLIM_INFINITY else MAX_OPEN_FILES
    if soft == resource.RLIM_INFINITY or soft >= files:
        return soft if soft != resource.RLIM_INFINITY else MAX_OPEN_FILES
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    except (OSError, ValueError):  # the system sets a lower bound
        return soft
    return files
