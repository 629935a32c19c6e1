"""Own counts tell what each user takes again, which no taste does, and have their weight and recency of the mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from trainers import weights
from worlds import settings

from twotower import api, runs
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import VALIDATION
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.evaluation.added_scores import SparseScores
from twotower.evaluation.factors import Factors
from twotower.evaluation.own_items import Recency
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.sequence import Sequence
from twotower.reports.compare import compare_runs
from twotower.scorers.repeats import PRIORS, SMALL, OwnCounts, shares_of_repeats
from twotower.scorers.scorer import terms_of
from twotower.train.mix import Mix
from twotower.train.trainer import Trainer

N_USERS, N_ITEMS = 150, 80
TAKEN = Sequence(name="taken", side="user")
SCHEMA = Schema(
    time="at",
    time_unit="order",
    duplicates="keep",
    title="",
    features=(TAKEN, Categorical(name="item_id", side="item")),
)


def log_of_favourites(again: float = 0.8) -> pl.DataFrame:
    """Each user has four favourites of the lower half of the items, drawn apart from all others', and takes one of them
    or any item of the upper half, which nobody takes twice."""
    rng, rows = np.random.default_rng(0), list[tuple[int, int, int]]()
    for user in range(N_USERS):
        mine = rng.choice(N_ITEMS // 2, 4, replace=False)
        others = iter(N_ITEMS // 2 + rng.permutation(N_ITEMS // 2))
        for _ in range(20):
            rows.append((user, int(rng.choice(mine)) if rng.random() < again else int(next(others)), len(rows)))
    order = rng.permutation(len(rows))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "at"], orient="row")[np.sort(order)]


def world(again: float = 0.8, **split: Any) -> Dataset:
    return build_dataset(
        check(None, None, log_of_favourites(again), SCHEMA),
        SCHEMA,
        SplitConfig(**({"kind": "last"} | split)),
    )


def config(own: str = "taken", **sections: Any) -> Config:
    base: dict[str, Any] = {
        "scorers": [{"kind": "repeats", "history": own}] if own else [],
        "model": {
            "similarity": "dot", "temperature": 1.0, "unknown_rate": 0.0, "width": 8,
            "pairs": [{"user": {"layers": []}, "item": {"layers": []}}],
        },
        "loss": {"kind": "softmax"},
        "negatives": {"full": True},
        "train": {"epochs": 3, "batch_size": 256, "lr": 0.02, "monitor": "validation.ndcg@5", "device": "cpu"},
        "evaluation": {"k": [5], "repeats": "allow", "bootstrap": 0},
        "split": {"kind": "last"},
    }  # fmt: skip
    return settings(**base | sections)


def added(trainer: Trainer) -> SparseScores | None:
    (term,) = terms_of(trainer.model)
    found = term.added(trainer.dataset, VALIDATION)
    assert found is None or isinstance(found, SparseScores)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "run"
    api.fit(world(), SCHEMA, config(), folder=path)
    return path


def test_a_run_finds_what_its_users_take_again_and_keeps_it(folder: Path) -> None:
    run, plain = runs.load(folder), api.fit(world(), SCHEMA, config(""))
    assert run.metrics["test.recall@5"] > plain.metrics["test.recall@5"] + 0.2
    assert run.metrics["test.recall@5"] > 0.95 * run.metrics["baseline.repeats.recall@5"]
    assert run.metrics["validation.recall@5"] > 0.5
    own = run.model.terms["repeats"]
    assert isinstance(own, OwnCounts)
    items = run.dataset.items.ids.cast(pl.Int64).to_numpy()
    spec = next(h for h in SCHEMA.histories("user"))
    codes = run.dataset.encoders.history_codes(spec, run.dataset.items.frame)
    of_favourites, of_others = (own.weights[codes[rows]] for rows in (items < N_ITEMS // 2, items >= N_ITEMS // 2))
    assert of_favourites.min() > 1.5 * of_others.max(), "an item counts by how often users take it again"
    assert api.evaluate(run)["test.recall@5"] == pytest.approx(run.metrics["test.recall@5"])


def test_the_towers_are_those_without(folder: Path) -> None:
    plain, fitted = (Trainer(world(), config(own)) for own in ("", "taken"))
    for trainer in (plain, fitted):
        trainer.run()
    found, wanted = weights(fitted), weights(plain)
    for biases in (found, wanted):
        biases.pop("item_bias.table.weight")  # popularity is one
    for name, weight in wanted.items():
        assert torch.equal(found.pop(name), weight)
    assert sorted(found) == [f"terms.repeats.{name}" for name in ("exponent", "factor", "rate", "weights")]


def test_a_run_compares_and_recommends_with_them(folder: Path) -> None:
    run = runs.load(folder)
    factors = run.factors()
    own = factors.sparse
    assert own is not None
    scores = factors.catalogue_scores(np.arange(N_USERS)).numpy()
    for user in (0, 7, 149):
        row = int((run.dataset.users.ids == user).arg_true()[0])
        found = api.recommend(run, user, 5, factors=factors)
        best = np.argsort(-scores[row], kind="stable")[:5]
        assert [i.id for i in found.items] == [str(run.dataset.items.ids[int(i)]) for i in best]
        np.testing.assert_allclose([i.score for i in found.items], scores[row][best], rtol=1e-4)


def test_runs_are_compared_with_them() -> None:
    plain, own = (api.fit(world(), SCHEMA, config(name)) for name in ("", "taken"))
    compared = {c.metric: c for c in compare_runs(plain, own, resamples=100)}["recall@5"]
    assert (compared.a, compared.b) == pytest.approx((plain.metrics["test.recall@5"], own.metrics["test.recall@5"]))
    assert compared.low > 0


@pytest.mark.parametrize("prior", PRIORS)
def test_shares_are_of_the_training_part_and_drawn_to_their_mean(prior: float) -> None:
    data = world()
    field = next(f for f in data.encoders.fields("user") if f.name == "taken")
    shares = shares_of_repeats(data, "taken", field.rows, prior)
    taken, again, known = dict[int, int](), dict[int, int](), set[tuple[int, int]]()
    train = data.train
    for user, item in zip(train.user.tolist(), train.item.tolist(), strict=True):
        taken[item] = taken.get(item, 0) + 1
        again[item] = again.get(item, 0) + ((user, item) in known)
        known.add((user, item))
    mean = sum(again.values()) / sum(taken.values())
    codes = data.encoders.history_codes(next(iter(SCHEMA.histories("user"))), data.items.frame)
    wanted = [(again.get(i, 0) + prior * mean) / (taken.get(i, 0) + prior) for i in range(len(data.items))]
    np.testing.assert_allclose(shares[codes], wanted, rtol=1e-5)
    assert shares[0] == 0


def test_items_that_nobody_takes_again_gain_nothing_by_those_of_others() -> None:
    """Of the upper half of the items nobody takes one twice."""
    data = world()
    trainer = Trainer(data, config())
    trainer.run()
    (term,) = terms_of(trainer.model)
    assert isinstance(term, OwnCounts)
    codes = data.encoders.history_codes(next(iter(SCHEMA.histories("user"))), data.items.frame)
    weights = term.weights.numpy()[codes]
    upper = data.items.ids.cast(pl.Int64).to_numpy() >= N_ITEMS // 2
    assert upper.any()
    assert weights[upper].max() < 0.2 * weights[~upper].mean()


def test_a_log_without_repeats_gets_none() -> None:
    data = build_dataset(
        check(None, None, log_of_favourites().unique(["user_id", "item_id"], maintain_order=True), SCHEMA),
        SCHEMA,
        SplitConfig(kind="last"),
    )
    trainer = Trainer(data, config())
    trainer.run()
    assert added(trainer) is None


@pytest.mark.parametrize(
    ("own", "sections", "split", "says"),
    [
        ("take", {}, {}, "the scorer 'repeats' has history = 'take', which is no history of the users .found: "
            "taken.; name"),
        ("taken", {"evaluation": {"k": [5], "repeats": "exclude"}}, {}, "evaluation.repeats = 'exclude' ranks none of "
            "it; set"),
        ("taken", {"train": {"epochs": 1}}, {"kind": "random", "validation": 0.0}, "fitted to the validation part, and "
            "the split has none"),
    ],
)  # fmt: skip
def test_what_it_needs_is_said(own: str, sections: dict[str, Any], split: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Trainer(world(**split), config(own, **sections))


@pytest.mark.parametrize("kind", ["negative", "all", "hashed", "column"])
def test_a_history_that_does_not_hold_what_users_took_is_refused(kind: str) -> None:
    """Dislikes, items that share a code, and values of a column would get scores of their own."""
    item = Categorical(name="item_id", side="item", hash_buckets=5 if kind == "hashed" else 0)
    interactions = {"negative": "negative", "all": "all"}.get(kind, "positive")
    taken = Sequence.model_validate(
        {
            "name": "taken", "side": "user", "interactions": interactions,
            "feature": "half" if kind == "column" else "", "share_embedding": kind == "hashed",
        }
    )  # fmt: skip
    pairs = [{"user": {"fields": ["taken"], "layers": []}, "item": {"fields": ["item_id"], "layers": []}}]
    half = Categorical(name="half", side="item")
    schema = SCHEMA.model_copy(
        update={"features": (taken, item, half), "label": "liked", "positive_above": 0, "time_unit": "order"}
    )
    rows = log_of_favourites().with_columns(liked=pl.int_range(pl.len()) % 3)
    items = pl.DataFrame({"item_id": range(N_ITEMS), "half": [str(n % 2) for n in range(N_ITEMS)]})
    data = build_dataset(check(None, items, rows, schema), schema, SplitConfig(kind="last"))
    with pytest.raises(ConfigError, match="'taken', which does not hold what users took, a code for each item"):
        Trainer(data, config(model={"similarity": "dot", "width": 8, "pairs": pairs}))


def test_terms_that_would_hide_one_another_are_refused() -> None:
    both = [{"kind": "repeats", "history": "taken"}, "trending", "trending"]
    with pytest.raises(ConfigError, match="names 'trending' twice"):
        Trainer(world(), config(scorers=both))


@pytest.mark.parametrize(
    "recency",
    [Recency(), Recency(exponent=1.0), Recency(rate=0.5 ** (1 / 3)), Recency(rate=0.5 ** (1 / 25))],
)
def test_the_recency_and_the_weight_by_which_items_are_taken_again_are_found(recency: Recency) -> None:
    """Each user has taken 40 times one of twelve items, and takes the next by the softmax of random products and of
    the logarithms of these counts."""
    n_users, n, rng, rows = 1000, 40, np.random.default_rng(0), list[tuple[int, int, int]]()
    users, items = (rng.normal(size=(k, 3)).astype(np.float32) for k in (n_users, N_ITEMS))
    place = np.arange(n, 0, -1.0)  # 1 of the latest
    latest = recency.rate ** (place - 1) * place**-recency.exponent
    weight, unit = 1.5, SMALL * float(latest.sum()) / 12
    for user in range(n_users):
        past = rng.choice(rng.choice(N_ITEMS, 12, replace=False), n)
        odds = users[user] @ items.T + weight * np.log1p(np.bincount(past, latest, N_ITEMS) / unit)
        taken = int((odds + rng.gumbel(size=N_ITEMS)).argmax())
        rows += [(user, int(item), at) for at, item in enumerate([*past, taken, 0])]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "at"], orient="row")
    data = build_dataset(check(None, None, log, SCHEMA), SCHEMA, SplitConfig(kind="last"))
    ids = (table.ids.cast(pl.Int64).to_numpy() for table in (data.users, data.items))
    first = Factors(*(torch.from_numpy(vectors[at]) for vectors, at in zip((users, items), ids, strict=True)))
    trainer = Trainer(data, config())
    found = Mix(trainer.model, data, trainer.recipe, trainer.context).fit(first, [])
    assert found
    ((chosen, of_columns),) = found.terms
    assert chosen[:2] == recency
    assert of_columns["repeats"] == pytest.approx(weight, rel=0.15)
