"""A shop whose users take items again publishes, and its answers hold what they have taken without a flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from service_client import clients
from worlds import REPLAYED_SCHEMA, replayed, settings

from twotower import api
from twotower.cli.app import run_command
from twotower.data.split import SplitConfig
from twotower.files import layout
from twotower.index.exact import Exact
from twotower.retrieval.request import Request
from twotower.retrieval.retriever import Retriever
from twotower.runs import Run
from twotower.store.manifest import read_manifest
from twotower.store.store import Store

ALL = 60


def trained(repeats: str, folder: Path) -> Run:
    config = settings(
        split=SplitConfig(kind="time").model_dump(), loss={"kind": "softmax"},
        evaluation={"k": [5], "repeats": repeats},
        train={"monitor": "validation.recall@5", "epochs": 1},
    )  # fmt: skip
    return api.fit((None, None, replayed()), REPLAYED_SCHEMA, config, folder=folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    api.publish(trained("allow", folder / "run"), folder / "store", Exact())
    return folder / "store"


def seen_by(retriever: Retriever, user: str) -> set[str]:
    row = retriever.user_ids.row(user)  # type: ignore[arg-type]
    return {str(retriever.item_ids[i]) for i in retriever.dataset.interacted_items.row(int(row or 0))}


@pytest.mark.parametrize(("asked", "holds"), [(None, True), (True, True), (False, False)])
def test_answers_of_every_way_hold_seen_items_by_default(
    shop: Path, tmp_path: Path, asked: bool | None, holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    retriever = Retriever(Store(shop).current())
    seen = seen_by(retriever, "3")
    given: dict[str, Any] = {} if asked is None else {"keep_seen": asked}
    wanted = {str(i) for i in retriever.item_ids} - (set() if holds else seen)
    assert {i.id for i in retriever.recommend(Request("3"), ALL, **given).items} == wanted
    assert {i.id for i in retriever.recommend(Request("3", events=[("1", True)]), ALL, 2, **given).items} == (
        wanted if holds else wanted - {"1"}
    )
    frame = retriever.recommend_frame(pl.DataFrame({"user_id": [3]}), ALL, **given)
    assert {str(i) for i in frame["item_id"]} == wanted
    pl.DataFrame({"user_id": [3, 4]}).write_parquet(tmp_path / "users.parquet")
    api.recommend_users(shop, tmp_path / "users.parquet", tmp_path / "out", ALL, **given)
    file = pl.read_parquet(tmp_path / "out" / "part-*.parquet").filter(pl.col("user_id") == 3)
    assert {str(i) for i in file["item_id"]} == wanted
    flags = {None: [], True: ["--keep-seen"], False: ["--drop-seen"]}[asked]
    assert run_command(["recommend", "--store", str(shop), "--user", "3", "-k", str(ALL), "--json", *flags]) == 0
    assert capsys.readouterr().out.count('"id"') == len(wanted)
    with clients(shop) as make:
        client = make()
        assert client.get("/v1/bundle").json()["keep_seen"] is True
        reply = client.post("/v1/recommend", {"user_id": "3", "k": ALL} | given).json()
        assert {i["id"] for i in reply["items"]} == wanted
        told = client.post("/v1/console/explain", {"user_id": "3", "k": 5} | given).json()
        assert told["filtered"]["seen"] == (0 if holds else len(seen))


def test_a_folder_begun_with_the_default_is_gone_on_with_by_its_name(shop: Path, tmp_path: Path) -> None:
    pl.DataFrame({"user_id": np.arange(9)}).write_parquet(tmp_path / "users.parquet")
    every: tuple[dict[str, Any], ...] = ({}, {"keep_seen": True})
    for given in every:
        assert api.recommend_users(shop, tmp_path / "users.parquet", tmp_path / "out", 3, **given) == 9


def test_a_bundle_of_an_evaluation_without_repeats_drops_seen_items(tmp_path: Path) -> None:
    run = trained("exclude", tmp_path / "run")
    bundle = api.publish(run, tmp_path / "store", Exact())
    assert read_manifest(bundle.folder).keep_seen is False
    card = (bundle.folder / layout.MODEL_CARD).read_text()
    assert "items that a user has seen are left out" in card
    assert "| test metric | model | popularity | user+item bias | transition counts |\n|---|---|---|---|---|\n" in card
    retriever = Retriever(bundle)
    answered = {i.id for i in retriever.recommend(Request("3"), ALL).items}
    assert answered == {str(i) for i in retriever.item_ids} - seen_by(retriever, "3")
    assert answered == {i.id for i in api.recommend(run, 3, ALL).items}


@pytest.mark.parametrize("repeats", ["allow", "only"])
def test_a_run_answers_as_its_bundle(tmp_path: Path, repeats: str) -> None:
    run = trained(repeats, tmp_path / "run")
    bundle = api.publish(run, tmp_path / "store", Exact())
    card = (bundle.folder / layout.MODEL_CARD).read_text()
    assert "items that a user has seen are ranked" in card
    assert (
        "| test metric | model | popularity | user+item bias | transition counts | own counts |\n"
        "|---|---|---|---|---|---|\n| " in card
    )
    served = Retriever(bundle).recommend(Request("3"), ALL).items
    assert [i.id for i in api.recommend(run, 3, ALL).items] == [i.id for i in served]
    assert len(served) == len(run.dataset.items)
