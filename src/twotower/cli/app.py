"""The command line: `twotower <verb>`. A user's mistake ends with one line and exit code 2."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

from twotower import files
from twotower.cli import answers, data, demo, store, training
from twotower.cli.flags import command_of, in_flags
from twotower.errors import Interrupted, OpenRoles, TwoTowerError, missing_package
from twotower.escaping import escape_controls, shell_command
from twotower.reports.terminal import printed_messages
from twotower.version import __version__

app = typer.Typer(help="Two-tower retrieval: train, evaluate, publish, recommend.", no_args_is_help=True,
                  pretty_exceptions_enable=False)  # fmt: skip


def _print_version(version: bool) -> None:
    if version:
        print(f"twotower {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read the options before a verb."""


data_app = typer.Typer(help="Download MovieLens, describe tables.", no_args_is_help=True)
app.add_typer(data_app, name="data")

VERBS: tuple[Callable[..., None], ...] = (
    data.suggest, data.prepare, data.bucket, data.check_buckets, training.train, training.evaluate,
    training.backtest, training.doctor, training.compare, training.embed, store.publish, store.rollback,
    store.bundles, store.gc,
    answers.recommend, answers.search, answers.similar, answers.serve, answers.key, training.config, demo.demo,
)  # fmt: skip
DATA_VERBS: tuple[Callable[..., None], ...] = data.fetch, data.stats
PRINT_RESULTS: dict[Callable[..., None], str] = {
    data.suggest: data.OUTPUT, answers.recommend: answers.USERS, answers.search: "", answers.similar: "",
    data.check_buckets: "", data.stats: "", training.evaluate: "", training.doctor: "", training.compare: "",
    training.config: "", store.bundles: "", answers.key: "",
}  # fmt: skip
"""Verbs whose result is the printed text -> option with which it is not. Other verbs make files or serve."""
for verb in VERBS:
    app.command()(verb)
for data_verb in DATA_VERBS:
    data_app.command()(data_verb)

# Click's base class: typer has its own copy of click.
_UsageError: type[typer.BadParameter] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class FailsafeStream:
    """A stream that drops its text after a write error (full disk, closed pipe). `error` is the first error."""

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
    """Wrap standard output and error, open those that the shell has closed, and return standard output.

    Standard output into a file or a pipe is UTF-8 in every locale, unless PYTHONIOENCODING is set.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file opened gets this number, and the printed text
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


def _prints_its_result(words: Sequence[str]) -> bool:
    of_data = words[:1] == ["data"]
    for verb in DATA_VERBS if of_data else VERBS:
        if verb.__name__.replace("_", "-") in words[of_data : of_data + 1]:
            option = PRINT_RESULTS.get(verb)
            return option is not None and not (option and option in {word.partition("=")[0] for word in words})
    return True


def main() -> None:
    """Run the command line: an error of the package becomes one line and an exit code."""
    out = install_failsafe_streams()
    words = sys.argv[1:]
    code = run_command(words)
    out.flush()
    if out.error:
        is_result = _prints_its_result(words)
        code = code or int(is_result)
        if not is_result or not isinstance(out.error, BrokenPipeError):
            kind, lost = ("error", "the answer") if is_result else ("warning", "what was printed")
            print(f"{kind}: standard output: {out.error.strerror}; {lost} is lost", file=sys.stderr)
    sys.exit(code)


def run_command(words: Sequence[str]) -> int:
    """Run the command of some words and return the exit code: 0, 2 for a mistake in the input, 1 for failed training,
    130 after Ctrl-C, 143 after SIGTERM in a training."""

    def translate(text: str) -> str:
        return in_flags(text, words, app)

    try:
        for word in words:
            files.check_name(word)
        with printed_messages(translate, on_stderr=_prints_its_result(words)):
            code = int(command_of(app).main(words, standalone_mode=False) or 0)
        if code == 130:  # typer's exit code for KeyboardInterrupt
            raise KeyboardInterrupt
        return code
    except OpenRoles as e:
        again = shell_command(*words, *(word for name in e.arguments for word in (f"--{name}", "COLUMN")))
        for line in (f"error: {e.lines[0]}", *e.lines[1:], f"  ({translate(e.hint)})", f"  again: {again}"):
            _print_error(line, e.exit_code)
        return e.exit_code
    except TwoTowerError as e:
        return _print_error(f"{'' if isinstance(e, Interrupted) else 'error: '}{translate(str(e))}", e.exit_code)
    except ModuleNotFoundError as e:
        if (missing := missing_package(e, f"twotower {words[0]}")) is None:
            raise
        return _print_error(f"error: {missing}", missing.exit_code)
    except _UsageError as e:
        said = " ".join(e.format_message().split())
        return _print_error(f"error: {said}", 2) if said else 2  # without a verb the help is printed
    except MemoryError as e:
        return _print_error(f"error: out of memory ({e}); reduce the request, or use a larger machine", 1)
    except (Exception, KeyboardInterrupt) as e:
        cause: BaseException | None = e
        while cause and not isinstance(cause, typer.Abort | KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__  # a library may raise another error from an interrupt
        if cause is None:
            raise
        return _print_error("interrupted", 130)


def _print_error(line: str, code: int) -> int:
    """Print a line on standard error and return the exit code."""
    print(escape_controls(line), file=sys.stderr)
    return code
