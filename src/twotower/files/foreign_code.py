"""Code of kinds defined outside the package: digests of its files, by which a change after the training is noticed."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

log = logging.getLogger(__name__)

CODE = "code"
"""Key of the digests in `model.json`."""


def code_digests(*sections: JsonValue) -> dict[str, JsonValue]:
    """Return the SHA-256 of the file of each module whose kinds some sections name by import path. A module without a file, as of an interactive
    session, has none."""
    named = (text.partition(":") for section in sections for text in _texts(section))
    modules = sorted(
        {module for module, _, kind in named if kind and hasattr(sys.modules.get(module), kind.partition(".")[0])}
    )
    return {module: digest for module in modules if (digest := _digest(module))}


def warn_of_changes(told: JsonValue, place: Path) -> None:
    """Log a warning for each module that is loaded and whose file has another digest than those `told` of the training of `place`."""
    if not isinstance(told, Mapping):
        return
    for module, digest in told.items():
        if (now := _digest(module)) and now != digest:
            log.warning(
                f"{place}: {sys.modules[module].__file__} has changed since the training, whose weights are of the kinds of {module} as they were; train again, "
                "or restore the file"
            )


def _texts(value: JsonValue) -> Iterator[str]:
    """Yield all texts in a value, but for keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _digest(module: str) -> str:
    """Return the SHA-256 of the file of a loaded module; empty for others."""
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except OSError:
        return ""
