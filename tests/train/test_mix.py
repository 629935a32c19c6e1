"""Weights of the mix: known answers of made choices, a naive twin, and terms of whole trainings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from closed_form_worlds import GROUPS, ITEMS, courses, groups
from waves import trending
from worlds import settings

from twotower.arrays.pieces import ones
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.split import SplitConfig
from twotower.data.splits import TEST, VALIDATION
from twotower.data.tables import check
from twotower.distributed import DistributedContext
from twotower.evaluation.factors import Factors
from twotower.evaluation.part_evaluation import evaluate_part
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.values import UNKNOWN
from twotower.scorers.choices import MIN_ROWS
from twotower.scorers.columns import ColumnFactors
from twotower.scorers.logit import FREE, fit_weights
from twotower.scorers.recent_popularity import PopularityTerms, RecentPopularity
from twotower.scorers.trending import RecentScores, half_lives_of
from twotower.train import mix
from twotower.train.closed_forms import ClosedForm
from twotower.train.factors import factors_before, factors_during
from twotower.train.mix import Mix, add_biases, log_popularity
from twotower.train.trainer import Trainer


def drawn(weights: list[float], n: int = 5000, k: int = 60, scale: float = 1.0) -> list[torch.Tensor]:
    """Terms of rows whose first candidate is drawn by the softmax of their weighted sum."""
    generator = torch.Generator().manual_seed(3)
    terms = torch.randn(len(weights), n, k, generator=generator)
    odds = torch.einsum("t,tnk->nk", torch.tensor(weights), terms)
    taken = torch.multinomial(odds.softmax(1), 1, generator=generator)
    own, first = terms.gather(2, taken.expand(len(weights), -1, -1)), terms[:, :, :1].clone()
    terms.scatter_(2, taken.expand(len(weights), -1, -1), first)
    terms[:, :, :1] = own
    return [terms[0] * scale, *terms[1:]]


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_weights_are_those_by_which_items_are_taken(scale: float) -> None:
    terms = drawn([1.5, 0.7, -0.4, 0.0], scale=scale)
    found = fit_weights(terms, np.zeros(terms[0].shape, np.float32), [FREE] * 4)
    assert found is not None
    wanted = [0.7 / 1.5, -0.4 / 1.5, 0.0]
    assert found.spreads == pytest.approx(wanted, abs=0.05)
    assert [factor / scale for factor in found.factors] == pytest.approx(wanted, abs=0.05)


def test_a_sample_of_candidates_stands_for_all() -> None:
    terms = drawn([1.0, 0.5], k=401)
    whole = fit_weights(terms, np.zeros(terms[0].shape, np.float32), [FREE] * 2)
    rng, offsets = np.random.default_rng(0), np.zeros(terms[0].shape, np.float32)
    sampled = np.sort(rng.choice(np.arange(1, 401), 100, replace=False))
    offsets[:, sampled] = np.log(4)
    left_out = np.setdiff1d(np.arange(1, 401), sampled)
    offsets[:, left_out] = -np.inf
    some = fit_weights(terms, offsets, [FREE] * 2)
    assert whole is not None
    assert some is not None
    assert some.spreads == pytest.approx(whole.spreads, abs=0.05)
    kept = np.setdiff1d(np.arange(401), left_out)
    same = fit_weights([term[:, kept] for term in terms], offsets[:, kept], [FREE] * 2)
    assert same is not None
    assert same.factors == pytest.approx(some.factors, rel=1e-4)


@pytest.mark.parametrize("prior", [[FREE] * 4, [FREE, 0.3, 1.0, -1.0], [0.3, -0.5, 1.0, FREE]])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_the_least_naive_loss(prior: list[float], seed: int) -> None:
    """Of an optimiser that knows the gradient alone."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    terms = torch.randn(4, 20, 5, generator=generator).double() * torch.tensor([1.0, 3.0, 0.2, 1.0])[:, None, None]
    terms[0][:, 0] += 1.0  # of a positive weight
    offsets = np.where(rng.random((20, 5)) < 0.2, -np.inf, 0.3 * rng.random((20, 5))).astype(np.float32)
    offsets[:, 0] = 0.0
    kept = torch.from_numpy(np.isfinite(offsets))
    rows = [[term[row][kept[row]] for row in range(20)] for term in terms]
    scales = [torch.cat([row - row.mean() for row in of]).square().mean().sqrt() for of in rows]
    deviations = torch.stack(
        [scale.new_tensor(d) if d > 0 else -d / scale for d, scale in zip(prior, scales, strict=True)]
    )
    factors = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([factors], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = (factors / deviations).square().sum() / 2
        for row in range(20):
            logits = (
                sum(f * of[row] for f, of in zip(factors, rows, strict=True))
                + torch.from_numpy(offsets[row])[kept[row]]
            )
            total = total - logits.log_softmax(0)[0]
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    least = float(loss().detach())
    wanted = factors.detach()
    found = fit_weights([term.float() for term in terms], offsets, prior)
    assert found is not None
    assert found.loss == pytest.approx(least, rel=1e-4)
    assert found.factors == pytest.approx((wanted[1:] / wanted[0]).tolist(), rel=0.02, abs=0.01)
    assert found.spreads == pytest.approx(
        [float(f * s / (wanted[0] * scales[0])) for f, s in zip(wanted[1:], scales[1:], strict=True)],
        rel=0.02,
        abs=0.01,
    )


def test_a_prior_keeps_the_weight_of_a_rare_value_small() -> None:
    """Users take as if a number that few items have weighed much."""
    terms = drawn([1.0], n=60, k=30)
    rare = torch.zeros(terms[0].shape)
    rare[:, 0] = 0.001
    offsets = np.zeros(rare.shape, np.float32)
    held, free = (fit_weights([*terms, rare], offsets, [FREE, deviation]) for deviation in (1.0, 1e6))
    assert held is not None
    assert free is not None
    assert 0 < held.factors[0] < 20
    assert free.factors[0] > 500


def test_terms_that_are_the_same_for_all_items_have_no_weight() -> None:
    (term,) = drawn([1.0], n=100)
    constant, offsets = torch.arange(100.0)[:, None].expand(term.shape), np.zeros(term.shape, np.float32)
    found = fit_weights([term, constant], offsets, [FREE, FREE])
    assert found is not None
    assert found.factors == [0.0]
    assert fit_weights([constant, term], offsets, [FREE, FREE]) is None


def test_a_first_term_that_others_stand_for_is_nearly_left_out() -> None:
    """Its weight is not below 0, and the others keep theirs."""
    terms = drawn([-0.3, 1.0])
    offsets = np.zeros(terms[0].shape, np.float32)
    found = fit_weights(terms, offsets, [FREE, FREE])
    assert found is not None
    assert found.spreads[0] > 50
    alone = fit_weights(terms[:1], offsets, [FREE])
    assert alone is not None
    assert alone.factors == []


def trained_and_ease(epochs: int = 2, starts: int = 1, **train: Any) -> Config:
    """A pair of one number that is trained, or is `ials` without epochs, and `ease` of all directions."""
    item = {"fields": ["item_id"], "layers": []}
    pairs = [
        {"user": {"fields": ["one"], "layers": [], "width": 1}, "item": item | {"width": 1}},
        {"user": {"fields": ["two"], "layers": [], "width": ITEMS}, "item": item | {"width": ITEMS}},
    ][: 1 + starts]
    ease: dict[str, Any] = {"kind": "ease", "width": ITEMS, "regularization": [400.0]}
    ials = {"kind": "ials", "width": 1, "unobserved": [0.3], "regularization": [0.008]}
    solved = [ease][:starts] if epochs else [ials, ease][: 1 + starts]
    return settings(
        model={"width": 2, "similarity": "dot", "bias": False, "temperature": 1.0, "pairs": pairs},
        loss={"kind": "softmax"},
        negatives={"full": True, "mask_positives": False},
        split={"kind": "column", "column": "part"},
        train={
            "epochs": epochs, "solved": solved, "monitor": "validation.ndcg@5", "device": "cpu", "batch_size": 64,
        } | train,
    )  # fmt: skip


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_closed_form_that_finds_more_is_added_after_the_last_epoch(epochs: int, messages: list[str]) -> None:
    data = groups()
    alone, mixed = (Trainer(data, trained_and_ease(epochs, starts)) for starts in (0, 1))
    results = [trainer.run() for trainer in (alone, mixed)]
    assert mixed.best.score == pytest.approx(alone.best.score), "epochs measure the first pair alone"
    found = [evaluate_part(factors_before(r.model.eval(), data, VALIDATION), data, VALIDATION, mixed.recipe.evaluation)
             for r in results]  # fmt: skip
    assert found[1]["ndcg@5"] > 1.1 * found[0]["ndcg@5"]
    assert any(line.startswith("mix, in standard deviations of the first scores: ease ") for line in messages)


def test_a_mix_that_finds_less_adds_nothing(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    data, fit = groups(), Mix.fit

    def worse(self: Mix, *parts: Any) -> Any:
        found = fit(self, *parts)
        assert found is not None
        return mix.MixWeights([-100.0 for _ in found.forms], [], [])

    monkeypatch.setattr(Mix, "fit", worse)
    trainer = Trainer(data, trained_and_ease())
    trainer.run()
    assert any("the share 0 of these weights is best" in line for line in messages)
    found = trainer.model.item_vectors(trainer.objective.items.take(np.arange(len(trainer.dataset.items))))
    assert found[:, 0].any()
    assert not found[:, 1:].any()


def test_too_few_rows_of_validation_add_nothing(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(groups(users=12), trained_and_ease())
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "fewer than 50 rows of validation take an item that is ranked; nothing is added" in caplog.text
    found = trainer.model.item_vectors(trainer.objective.items.take(np.arange(len(trainer.dataset.items))))
    assert not found[:, 1:].any()


@pytest.mark.parametrize("scorers", [[], ["trending"]])
def test_a_model_has_the_weighted_sum_of_all_terms(
    scorers: list[str], monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    """Of courses, whose columns and popularity have weights."""
    data, seen, fit = courses(300), list[tuple[Factors, list[Factors], mix.MixWeights]](), Mix.fit

    def watched(self: Mix, first: Any, forms: Any, vectors: Any) -> Any:
        found = fit(self, first, forms, vectors)
        assert found is not None
        seen.append((first, vectors, found))
        return found

    monkeypatch.setattr(Mix, "fit", watched)
    pairs = [
        {
            "user": {"fields": ["one"], "layers": [], "width": 2},
            "item": {"fields": ["item_id"], "layers": [], "width": 2},
        },
        {
            "user": {"fields": ["two"], "layers": [], "width": 20},
            "item": {"fields": ["stage", "size"], "layers": [], "join": "sum", "activation": "Identity", "width": 40},
        },
    ]
    chosen = settings(
        model={"similarity": "dot", "temperature": 1.0, "bias": not scorers, "pairs": pairs},
        scorers=scorers,
        loss={"kind": "softmax"},
        negatives={"full": True},
        train={
            "epochs": 0, "solved": [{"kind": "slit", "regularization": [1000.0]}, {"kind": "columns"}], "device": "cpu",
            "monitor": "validation.ndcg@5", "history_scope": "causal",
        },
    )  # fmt: skip
    trainer = Trainer(data, chosen)
    trainer.run()
    ((first, vectors, found),) = seen
    (share,) = (float(line.partition("the share ")[2].split()[0]) for line in messages if "the share " in line)
    found = found.times(share)
    assert share
    assert abs(found.forms[0]) > 0.01
    users = np.unique(data.validation.user).astype(np.int64)
    wanted = first.catalogue_scores(users)
    wanted += found.forms[0] * (vectors[0].users @ vectors[0].items.T)[torch.from_numpy(users)]
    if not scorers:
        assert abs(found.popularity) > 0.01
        wanted += found.popularity * log_popularity(data)
    else:
        recent = recent_of(trainer, found)
        assert abs(recent.recent) + abs(recent.total) > 0.01
        nothing = np.zeros(ITEMS, np.float32)
        RecentScores.of_part(data, VALIDATION, recent, nothing).added_to(wanted, users)
    mine = factors_during(trainer.model.eval(), data, VALIDATION).catalogue_scores(users)
    of_row = (mine - wanted).mean(1, keepdim=True)  # which changes no ranking
    torch.testing.assert_close(mine - of_row, wanted, rtol=1e-3, atol=1e-3)


def test_popularity_is_a_bias_of_the_items_where_nothing_is_trained(messages: list[str]) -> None:
    """Of items that are taken by Zipf's law."""
    data = groups(users=400, zipf=1.0)
    sections = trained_and_ease(0, 0).model_dump(mode="json")
    sections["model"]["bias"] = True
    trainer = Trainer(data, Config.model_validate(sections))
    trainer.run()
    assert any("log(1 + count)" in line for line in messages)
    assert not any("the share 0 of these weights" in line for line in messages)
    counts = np.bincount(data.train.item, minlength=ITEMS)
    bias = trainer.model.item_bias.rows_of("item_id").detach()[:, 0]
    of_items = bias[torch.from_numpy(np.asarray(data.items.columns["item_id"]).astype(np.int64))]
    weight = float(of_items[0]) / np.log1p(counts[0])
    assert weight > 0.03
    torch.testing.assert_close(of_items, torch.from_numpy(weight * np.log1p(counts)).float(), rtol=1e-4, atol=1e-4)
    assert bias[UNKNOWN] == 0


def test_items_of_an_unknown_id_have_no_popularity() -> None:
    features = (*GROUPS.features[:2], Categorical(name="item_id", side="item", min_count=40))
    data = groups(zipf=1.0, schema=GROUPS.model_copy(update={"features": features}))
    codes = torch.from_numpy(np.asarray(data.items.columns["item_id"]).astype(np.int64))
    popular = log_popularity(data)
    assert torch.equal(popular == 0, codes == UNKNOWN)
    assert 0 < int((codes == UNKNOWN).sum()) < ITEMS
    sections = trained_and_ease(2, 0).model_dump(mode="json")
    sections["model"]["bias"] = True
    model = Trainer(data, Config.model_validate(sections)).model
    add_biases(model, data, popular + 1)
    rows = model.item_bias.rows_of("item_id").detach()[:, 0]
    assert rows[UNKNOWN] == 0
    torch.testing.assert_close(rows[codes], torch.where(codes == UNKNOWN, 0.0, popular + 1))


USERS, ROWS = 4000, 2
WEIGHTS = [1.5, -0.5, 0.0]
PARTS = [torch.tensor([2, 3]), torch.tensor([4]), torch.tensor([5])]
IDS = Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")
HALF_LIFE = half_lives_of(USERS * ROWS)[4]


def dataset(rows: dict[str, Any]) -> Dataset:
    schema = Schema(features=IDS, duplicates="keep", time="at", time_unit="order")
    tables = check(None, pl.DataFrame({"item_id": np.arange(ITEMS)}), pl.DataFrame(rows), schema)
    data = build_dataset(tables, schema, SplitConfig(kind="column", column="part"))
    assert data.users.ids.to_list() == [*range(USERS)]
    return data


def taken(terms: PopularityTerms, has_new: bool = True, untaken: int = 0) -> tuple[Factors, Dataset]:
    """Vectors, and two rows of each user at random, then one by the scores under known weights. New items come one by
    one, or are there from the start, but for the first ones, which nobody takes."""
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    found = Factors(*(torch.randn(n, 6, generator=generator) for n in (USERS, ITEMS)))
    n = USERS * ROWS
    at = np.arange(n)
    there = (1 + at * (ITEMS - 1) // n) if has_new else np.full(n, ITEMS)
    favourites = (at // 200 * 7) % there  # one in three rows is of an item that is popular for a time
    items = np.where(rng.random(n) < 0.35, favourites, rng.integers(0, there))
    if not has_new:
        items[:ITEMS] = np.arange(ITEMS)
        items = np.maximum(items, untaken)
    users = rng.permutation(np.repeat(np.arange(USERS), ROWS))
    asked = rng.integers(n // 4, n, USERS) if has_new else rng.integers(ITEMS + 1, n, USERS)
    popular = RecentPopularity(items.astype(np.int32), 2 * at, ones(n), ITEMS).scores(2 * asked - 1, terms)
    of_items = found.items.clone()
    for part, weight in zip(PARTS, WEIGHTS, strict=True):
        of_items[:, part] *= weight
    odds = (found.users @ of_items.T).double().numpy() + popular + rng.gumbel(size=(USERS, ITEMS))
    odds[users, items] = odds[:, :untaken] = -np.inf
    rows = {
        "user_id": [*users, *range(USERS), 0],
        "item_id": [*items, *odds.argmax(1), 0],
        "at": [*(2 * at), *(2 * asked - 1), 2 * n],
        "part": ["train"] * n + ["validation"] * USERS + ["test"],
    }
    return found, dataset(rows)


def recent_of(trainer: Trainer, found: mix.MixWeights) -> PopularityTerms:
    """Recent popularity by some weights."""
    ((half_life, weights),), term = found.terms, trending(trainer.model)
    term.write(trainer.dataset, half_life, weights)
    return term.terms


def mixed(
    found: Factors, data: Dataset, scorers: Sequence[str] = (), **model: Any
) -> tuple[mix.MixWeights, PopularityTerms]:
    """The weights of pairs of each part, added to the first two dimensions, and recent popularity."""
    tower: dict[str, Any] = {"layers": []}
    pairs = [{"user": tower, "item": tower}]
    chosen = settings(
        model={"similarity": "dot", "temperature": 1.0, "bias": False, "pairs": pairs} | model,
        scorers=[*scorers],
        loss={"kind": "softmax"},
        negatives={"full": True},
        train={"epochs": 1, "monitor": "validation.ndcg@5", "device": "cpu"},
    )
    forms = [ClosedForm(place, ColumnFactors()) for place, _ in enumerate(PARTS, 1)]
    vectors = [Factors(found.users[:, part], found.items[:, part]) for part in PARTS]
    trainer = Trainer(data, chosen)
    first = Factors(found.users[:, :2], found.items[:, :2])
    weights = Mix(trainer.model, data, trainer.recipe, DistributedContext()).fit(first, forms, vectors)
    assert weights is not None
    return weights, recent_of(trainer, weights) if scorers else PopularityTerms(1.0, 0.0)


@pytest.mark.parametrize(
    ("total", "age", "new"), [(-1.0, -0.5, -0.4), (0.5, -0.8, 0.2), (-0.7, 0.5, 0.2), (0.0, -0.6, -0.6)]
)
def test_weights_of_closed_forms_and_recent_popularity_are_those_by_which_users_take(
    total: float, age: float, new: float
) -> None:
    weights, recent = mixed(*taken(PopularityTerms(HALF_LIFE, 2.0, total, age, new)), ["trending"])
    assert weights.forms == pytest.approx(WEIGHTS, abs=0.2)
    assert recent.half_life == HALF_LIFE
    assert recent[1:] == pytest.approx((2.0, total, age, new), abs=0.35)


@pytest.mark.parametrize("age", [-0.8, 0.8])
def test_where_no_item_is_new_such_ones_gain_by_no_age(age: float) -> None:
    _, recent = mixed(*taken(PopularityTerms(HALF_LIFE, 2.0, 0.0, age, -3.0), has_new=False), ["trending"])
    assert recent.age == pytest.approx(age, abs=0.3)
    assert recent.new == pytest.approx(min(recent.age, 0.0) + min(recent.total, 0.0))


@pytest.mark.parametrize("of_test", [False, True])
def test_items_that_nobody_took_yet_are_not_held_behind_all(of_test: bool) -> None:
    """Some are in the catalogue and in no row, or in the test part alone; what users took of others determines no
    weight of them."""
    found, data = taken(PopularityTerms(HALF_LIFE, 2.0, 0.0, -0.8), has_new=False, untaken=0 if of_test else 4)
    if of_test:
        data = replace(data, parts=np.where(data.pairs.item < 4, TEST, data.parts))
    _, terms = mixed(found, data, ["trending"])
    assert terms.age == pytest.approx(-0.8, abs=0.3)
    assert terms.new == pytest.approx(terms.age + min(terms.total, 0.0))
    known = RecentPopularity.before(data, VALIDATION)
    popular = known.scores_at_end(terms)
    assert not np.isin(np.arange(4), known.items).any()
    assert popular[:4] == pytest.approx(popular[0])
    assert popular[0] > popular[4:].min() - 2.0


@pytest.mark.parametrize("age", [0.8, -0.3])
def test_few_users_who_take_new_items_change_no_weight(age: float) -> None:
    found, data = taken(PopularityTerms(HALF_LIFE, 2.0, 0.0, age), has_new=False, untaken=4)
    rows = np.flatnonzero(data.parts == VALIDATION)[: MIN_ROWS - 1]
    items = data.pairs.item.copy()
    items[rows] = np.arange(len(rows)) % 4
    changed = replace(data, pairs=replace(data.pairs, item=items))
    before, after = (mixed(found, one, ["trending"])[1] for one in (data, changed))
    assert after == pytest.approx(before, abs=0.15)


def test_columns_do_not_tell_which_items_are_cold() -> None:
    """Cold items are taken seldom, as their scores lack what an id adds, until a bias raises them."""
    generator, rng = torch.Generator().manual_seed(3), np.random.default_rng(5)
    found, cold = Factors(*(torch.randn(n, 6, generator=generator) for n in (USERS, ITEMS))), np.arange(ITEMS) % 3 == 0
    found.users[:, 4], found.items[:, 4] = 1.0, torch.from_numpy(cold).float()
    first = rng.choice(np.flatnonzero(~cold), USERS)
    of_items = found.items.clone()
    for part, weight in zip(PARTS, [2.0, -3.0, 0.5], strict=True):
        of_items[:, part] *= weight
    odds = (found.users @ of_items.T).double().numpy() + rng.gumbel(size=(USERS, ITEMS))
    odds[np.arange(USERS), first] = -np.inf
    rows = {
        "user_id": [*range(USERS), *range(USERS), 0],
        "item_id": [*first, *odds.argmax(1), 0],
        "at": np.arange(2 * USERS + 1),
        "part": ["train"] * USERS + ["validation"] * USERS + ["test"],
    }
    blind, told = (mixed(found, dataset(rows), cold_item_bias=bias)[0].forms for bias in (False, True))
    assert blind[1] < -2
    assert told == pytest.approx([2.0, 0.0, 0.5], abs=0.2)
