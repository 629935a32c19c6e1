"""The command line: `twotower <verb>`. A user's mistake ends with one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from twotower import files
from twotower.cli import answers, data, demo, embedding, preparation, serving, store, suggestion, training
from twotower.cli.flags import command_of, in_flags
from twotower.cli.streams import install_failsafe_streams
from twotower.errors import Interrupted, TwoTowerError, missing_package
from twotower.escaping import escape_controls
from twotower.reports.terminal import printed_messages
from twotower.version import __version__

app = typer.Typer(help="Two-tower retrieval: train, evaluate, publish, recommend.", no_args_is_help=True,
                  pretty_exceptions_enable=False)  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        print(f"twotower {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read the options that stand before a verb."""


data_app = typer.Typer(help="Download MovieLens, describe tables.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@dataclass(frozen=True)
class Output:
    """Use of what a verb prints."""

    is_result: bool
    """True if it is the result of the verb; False if that is the files that it writes, or what it serves."""
    unless: str = ""
    """Option with which it is the other way round."""

    def of(self, words: Sequence[str]) -> bool:
        """Return `is_result` for a call with these words."""
        given = self.unless and any(word.partition("=")[0] == self.unless for word in words)
        return self.is_result != bool(given)


ANSWERS, WORKS = Output(True), Output(False)
VERBS: dict[Callable[..., None], Output] = {
    suggestion.suggest: Output(True, unless=suggestion.OUTPUT),
    preparation.prepare: WORKS,
    preparation.bucket: WORKS,
    preparation.check_buckets: ANSWERS,
    training.train: WORKS,
    training.evaluate: ANSWERS,
    training.doctor: ANSWERS,
    training.compare: ANSWERS,
    embedding.embed: WORKS,
    store.publish: WORKS,
    store.rollback: WORKS,
    store.bundles: ANSWERS,
    store.gc: WORKS,
    answers.recommend: Output(True, unless=answers.USERS),
    answers.search: ANSWERS,
    answers.similar: ANSWERS,
    serving.serve: WORKS,
    serving.key: ANSWERS,
    training.config: ANSWERS,
    demo.demo: WORKS,
}
"""Each verb, and whether its result is its output (ANSWERS) or the files that it writes and what it serves (WORKS)."""
DATA_VERBS: dict[Callable[..., None], Output] = {data.fetch: WORKS, data.stats: ANSWERS}
for verb in VERBS:
    app.command()(verb)
for data_verb in DATA_VERBS:
    data_app.command()(data_verb)

# Click's base class, wherever the installed typer keeps its click.
_UsageError: type[typer.BadParameter] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _prints_its_result(words: Sequence[str]) -> bool:
    of_data = words[:1] == ["data"]
    verbs = DATA_VERBS if of_data else VERBS
    named = words[of_data : of_data + 1]
    return all(output.of(words) for verb, output in verbs.items() if verb.__name__.replace("_", "-") in named)


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
