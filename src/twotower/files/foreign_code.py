"""Code of kinds defined outside the package: digests of its files, by which a change after the training is noticed."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path

from pydantic import JsonValue

log = logging.getLogger(__name__)

CODE = "code"
"""Key of the digests in `model.json`."""
CODE_OF = "code of "
"""Prefix of a module in the fingerprint of a training."""
SCRIPTS = ("__main__", "__mp_main__")
"""Names of a script that is run."""
_known = dict[str, tuple[ModuleSpec | None, str]]()
"""Digest of each module, with what it was loaded by."""


def code_digests(*sections: JsonValue) -> dict[str, JsonValue]:
    """Return the SHA-256 of the file of each module whose kinds some sections name by import path. An interactive session and a script that is
    run have none."""
    modules = sorted({name.partition(":")[0] for section in sections for name in _kinds(section) if ":" in name})
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


def _kinds(value: JsonValue) -> Iterator[str]:
    """Yield the names of all kinds in a section, and its keys, which name sources of negatives."""
    if isinstance(value, Mapping):
        yield from value
        if isinstance(kind := value.get("kind"), str):
            yield kind
        for one in value.values():
            yield from _kinds(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _kinds(one)


def _digest(name: str) -> str:
    """Return the SHA-256 of the file of a loaded module as it was when this process first asked for it; empty for others, and for a script
    that is run, each of which has the name of all."""
    module = sys.modules.get(name)
    if module is None or name in SCRIPTS:
        return ""
    known = _known.get(name)
    if known is None or known[0] is not module.__spec__:  # a reload has another
        file = getattr(module, "__file__", None)
        try:
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
        except OSError:
            digest = ""
        known = _known[name] = (module.__spec__, digest)
    return known[1]
