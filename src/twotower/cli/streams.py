"""Standard output and error that survive a full disk, a closed pipe and a closed descriptor."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast


class FailsafeStream:
    """A stream that drops its text after an error of writing (a full disk, a closed pipe); `error` is the first error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as e:
            self._give_up(e)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as e:
            self._give_up(e)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or error
        # The interpreter flushes the stream at its end; the null device accepts the buffered text.
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def install_failsafe_streams() -> FailsafeStream:
    """Wrap standard output and error, open those that a shell has closed, and return standard output, which is UTF-8 in a file or a
    pipe, whatever the locale, unless PYTHONIOENCODING is set: what is printed there is read again, as a config."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file that is opened gets this number, and the printed text
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    streams = []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream = stream or os.fdopen(number, "w", encoding="utf-8", closefd=False)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack characters of ids and titles
            if number == 1 and not stream.isatty() and not os.environ.get("PYTHONIOENCODING"):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        streams.append(FailsafeStream(stream))
    sys.stdout, sys.stderr = cast(list[TextIO], streams)
    return streams[0]
