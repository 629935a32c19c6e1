"""The way of a request through the rooms of the package: the functions that are called, and those entered from another
room."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType

import twotower

HOME = f"{Path(twotower.__file__).parent}/"
FOUNDATIONS = {"arrays", "errors.py", "escaping.py", "files", "kinds.py", "machine.py", "progress.py"}
"""Rooms that every room uses as it uses a library."""


class Way:
    """Calls of functions of the package in this thread; the reading of a property is none."""

    def __init__(self) -> None:
        self.rooms = list[str]()
        """Rooms in the order in which they are entered first."""
        self.entries = Counter[str]()
        """Number of entries into a function from another room, as "room: function"; a loop of one call is one entry."""
        self.calls = Counter[str]()
        """Number of calls of a function, by qualified name."""
        self._properties, self._seen = set(properties()), set[tuple[CodeType, FrameType]]()

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Trace the calls of the block."""
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        room, code = room_of(frame), frame.f_code
        if event != "call" or room is None or code in self._properties:
            return
        self.calls[code.co_qualname] += 1
        before = frame.f_back
        while before is not None and (room_of(before) is None or before.f_code.co_name.startswith("<")):
            before = before.f_back  # through libraries, foundations and comprehensions
        if room not in self.rooms:
            self.rooms.append(room)
        if before is not None and room_of(before) != room and (code, before) not in self._seen:
            self._seen.add((code, before))
            self.entries[f"{room}: {code.co_qualname}"] += 1


def room_of(frame: FrameType) -> str | None:
    """Return the room of a frame; None for a frame outside the package or in its foundations."""
    path = frame.f_code.co_filename
    room = path.removeprefix(HOME).partition("/")[0] if path.startswith(HOME) else None
    return None if room in FOUNDATIONS else room


def properties() -> Iterator[CodeType]:
    """Yield the code of each property of the classes that are loaded."""
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "twotower"]:
        for kind in [value for value in vars(module).values() if isinstance(value, type)]:
            for value in vars(kind).values():
                getter = value.func if isinstance(value, cached_property) else getattr(value, "fget", None)
                if code := getattr(getter, "__code__", None):
                    yield code
