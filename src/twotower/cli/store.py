"""Verbs of a store: publish, rollback, bundles, gc."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twotower.cli.flags import KindModules, Overrides, RunFolder, StoreFolder, Trust
from twotower.errors import BundleError, ConfigError
from twotower.escaping import shell_command
from twotower.files.urls import is_url
from twotower.reports.terminal import print_line

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset


def publish(
    run: RunFolder,
    store: StoreFolder,
    overrides: Overrides = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Publish below a threshold, a worse model, or an unfinished training; the history records it.",
        ),
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Note for the history.")] = "",
    latest: Annotated[
        bool,
        typer.Option(
            "--latest",
            help="Make vectors, histories and seen items of users from all interactions of the log as it is now.",
        ),
    ] = False,
    beat: Annotated[
        str,
        typer.Option(
            "--beat", help="Bundle that the model must not be worse than on new rows: current, or an id. Empty: none."
        ),
    ] = "",
    metric: Annotated[
        str, typer.Option("--metric", help="Metric of --beat, such as ndcg@10. Empty: ndcg at the first evaluation.k.")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what --beat cannot tell, too.")] = False,
    trust: Trust = False,
    kinds: KindModules = None,
) -> None:
    """Build a bundle of a run (towers, vectors, index), check it, and make it the current bundle of the store."""
    from twotower import api
    from twotower.config.toml import override_config

    loaded = api.load(run, trust)
    for text in overrides or []:
        if not text.startswith("index."):
            raise ConfigError(f"--set {text}: a trained run can change index.* only")
    config = override_config(loaded.config, overrides or [], trust=True).index
    if (metric or strict) and not beat:
        raise ConfigError(f"--{'metric' if metric else 'strict'} goes with --beat; name the bundle, as --beat current")
    rival = api.Beat(beat, metric, strict) if beat else None
    api.publish(loaded, store, config, force=force, reason=reason, latest=latest and api.log_of(loaded), beat=rival)
    print_line(f"next: {_first_query(loaded.dataset, store)}")


def _first_query(dataset: Dataset, store: str) -> str:
    """Return a command that queries the new bundle: by a text of the log, else by a user, in a context of the log."""
    schema, place = dataset.schema, store if is_url(store) else Path(store)
    texts = schema.searchable()
    searched = texts[0].source if texts and texts[0].side == "context" else ""
    context = list[str]()
    for column in schema.required_context():
        if column != searched:
            known = dataset.context_frame[column].drop_nulls().tail(1).to_list()
            value = (
                json.dumps(known[0], ensure_ascii=False) if known and isinstance(known[0], list) else (known or [""])[0]
            )
            context += ["--context", f"{column}={value}"]
    if not texts:
        return shell_command("recommend", "--store", place, "--user", dataset.users.ids[0], *context)
    which = ["--feature", texts[0].name] if len({t.source for t in texts}) > 1 else []
    frame = dataset.context_frame if searched else dataset.users.frame
    known_texts = frame[texts[0].source].drop_nulls().head(100)
    example = next((str(t) for t in known_texts if str(t).strip()), "some words")
    return shell_command("search", "--store", place, *which, *context, *["--"] * example.startswith("-"), example)


def rollback(
    store: StoreFolder,
    to: Annotated[str, typer.Option("--to", help="Bundle id. Empty: the bundle that was current before.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Note for the history.")] = "",
    kinds: KindModules = None,
) -> None:
    """Make an earlier bundle current."""
    from twotower.store import remote_collections
    from twotower.store.store import Store

    place = Store(store).place
    if not to and place.ids() == [only := place.current()]:
        raise BundleError(
            f"{store}: no bundle was current before {only}, the only one; publish another first", "missing"
        )
    bundle, alias = remote_collections.rollback(store, to or None, reason=reason)
    print_line(f"current: {bundle.id}{f', {alias}' if alias else ''}")


def bundles(
    store: StoreFolder,
    history: Annotated[bool, typer.Option("--history", help="List publishes, rollbacks and refusals instead.")] = False,
) -> None:
    """List the bundles of a store."""
    from twotower.store.store import Store

    opened = Store(store)
    if history:
        for line in opened.history():
            print_line(json.dumps(line, ensure_ascii=False))
        return
    for b in opened.bundles():
        recall = f"recall {b.recall_check.recall:.4f}" if b.recall_check else ""
        state = ", ".join(["current"] * b.current + [f"damaged: {b.damaged}"] * bool(b.damaged))
        print_line(f"{b.id}  {b.size / 1e6:>9,.1f} MB  {recall}  {state}".rstrip())


def gc(
    store: StoreFolder,
    keep: Annotated[int, typer.Option("--keep", help="Number of newest bundles to keep. At least 2.")] = 2,
    kinds: KindModules = None,
) -> None:
    """Remove old bundles, the files of killed publishers, and their Milvus collections."""
    from twotower.store import remote_collections

    remote_collections.gc(store, keep)
