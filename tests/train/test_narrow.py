"""Narrow vectors: known answers of projections, what a fit gains, the choice of a width, and whole trainings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from closed_form_worlds import COLUMN, GROUPS, courses, groups
from context_worlds import HOUR, hourly, hourly_schema, hourly_settings
from worlds import CHECKERBOARD_SCHEMA, checkerboard, settings

from twotower import api, runs
from twotower.config.experiment import Config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.tables import check
from twotower.distributed import DistributedContext
from twotower.errors import ConfigError, TrainingError
from twotower.evaluation.factors import Factors
from twotower.features.categorical import Categorical
from twotower.features.schema import Schema
from twotower.features.values import UNKNOWN
from twotower.files import layout
from twotower.model.narrow import Narrow
from twotower.onnx.export import export_tower
from twotower.scorers.choices import Choices, later_items
from twotower.train.narrow import Narrowing, Wide, choose, narrowed, temperature
from twotower.train.trainer import Trainer


@pytest.fixture(scope="module")
def data() -> Dataset:
    return groups()


def wide_of(data: Dataset, rank: int, width: int = 40, biases: int = 0, noise: float = 0.0, **given: Any) -> Wide:
    """Wide vectors whose products have a rank; with biases in the last two columns."""
    torch.manual_seed(3)
    into = torch.randn(rank, width)
    users, items = (torch.randn(n, rank) @ into for n in (len(data.users), len(data.items)))
    users, items = (x + noise * torch.randn_like(x) for x in (users, items))
    if biases:
        users, items = (
            torch.cat([users, torch.randn(len(users), 2)], 1),
            torch.cat([items, torch.randn(len(items), 2)], 1),
        )
        users[:, -1] = items[:, -2] = 1
    facts: dict[str, Any] = {"labelled": False, "seed": 1, "repeats": "exclude", "temperature": 30.0}
    return Wide(Factors(users, items), data, biases, **facts | given)


def cross_entropy(wide: Wide, found: Factors) -> float:
    """The measure of a fit, of all users: the narrow lists against the wide ones, without the items of a history."""
    out = torch.zeros(len(wide.users), len(wide.items), dtype=torch.bool)
    out[wide.dataset.seen_items.owners, wide.dataset.seen_items.values] = True
    goal, got = ((f.users @ f.items.T / wide.temperature).masked_fill(out, -1e9) for f in (wide.vectors, found))
    return float(torch.nn.functional.cross_entropy(got, goal.softmax(1)))


def lists(found: Factors) -> torch.Tensor:
    """The scores of users, each less the mean of its list, as a ranking reads them."""
    scores = found.users.double() @ found.items.double().T
    return scores - scores.mean(1, keepdim=True)


@pytest.mark.parametrize("biases", [0, 2])
def test_as_many_numbers_as_the_scores_have_directions_lose_nothing(data: Dataset, biases: int) -> None:
    wide = wide_of(data, rank=6, biases=biases)
    found = narrowed(wide.vectors, wide.layer(wide.projection.first(6)), data, biases)
    assert found.items.shape[1] == 6 + biases
    for side in ("users", "items"):
        short, whole = getattr(found, side), getattr(wide.vectors, side)
        assert torch.equal(short[:, 6:], whole[:, 40:]), "biases stay"
    assert torch.allclose(lists(found), lists(wide.vectors), atol=1e-2)


def test_what_all_items_have_in_common_takes_no_direction(data: Dataset) -> None:
    """A number that hardly differs, far above what tells items apart, as a pair has that hardly counts."""
    plain = wide_of(data, rank=6)
    users, items = plain.vectors.users.clone(), plain.vectors.items.clone()
    users[:, 0], items[:, 0] = -1.0, 45_000 + 0.01 * items[:, 0]
    wide = replace(plain, vectors=Factors(users, items))
    assert wide.projection.width >= 6
    layer = wide.layer(wide.projection.first(7))
    found = narrowed(wide.vectors, layer, data, 0)
    assert torch.allclose(lists(found), lists(wide.vectors), atol=1e-2)
    assert found.items.abs().max() < 100, "a short form of these has small steps"
    new = (items - layer.centre) @ layer.item_map
    assert torch.allclose(lists(Factors(found.users, new)), lists(wide.vectors), atol=1e-2), "items without rows"


@pytest.mark.parametrize("size", [1e-12, 1e-20])
def test_a_number_that_is_rounding_error_takes_no_direction(data: Dataset, size: float) -> None:
    """What a weight decay or a difference leaves of a pair that tells nothing."""
    plain = wide_of(data, rank=6)
    users, items = plain.vectors.users.clone(), plain.vectors.items.clone()
    users[:, 0], items[:, 0] = size * torch.randn(len(users)), size * torch.randn(len(items))
    wide = replace(plain, vectors=Factors(users, items))
    layer = wide.layer(wide.projection.first(7))
    assert float(layer.user_map.abs().max()) < 10
    assert torch.allclose(lists(narrowed(wide.vectors, layer, data, 0)), lists(wide.vectors), atol=1e-2)


def test_an_item_of_the_test_alone_does_not_count_in_the_centre() -> None:
    """An item that is not there yet, whatever its vector."""
    rows = pl.DataFrame({"user_id": [n % 7 for n in range(60)], "item_id": [n % 12 for n in range(60)]})
    frame = rows.with_columns(part=pl.Series(["train", "validation", "test", "train", "train"] * 12))
    new = pl.DataFrame({"user_id": [0], "item_id": [99], "part": ["test"]})
    data = build_dataset(check(None, None, pl.concat([frame, new]), GROUPS), GROUPS, COLUMN)
    wide = wide_of(data, rank=6)
    later = np.flatnonzero(later_items(data))
    assert list(data.items.ids[later]) == [99]
    expected = np.delete(wide.vectors.items.numpy(), later, 0).mean(0)
    wide.vectors.items[later] = 1e6
    assert np.allclose(wide.centre.numpy(), expected, atol=1e-5)


def test_pairs_of_different_sizes_count_by_their_scores(data: Dataset) -> None:
    """A pair of large users and small items beside one of the reverse, as closed forms make them."""
    one, other = wide_of(data, rank=3).vectors, wide_of(data, rank=4).vectors
    users = torch.cat([1e4 * one.users, 1e-3 * other.users], 1)
    wide = replace(wide_of(data, rank=1), vectors=Factors(users, torch.cat([1e-4 * one.items, 1e3 * other.items], 1)))
    found = narrowed(wide.vectors, wide.layer(wide.projection.first(7)), data, 0)
    assert torch.allclose(lists(found), lists(wide.vectors), atol=0.1)


def test_a_projection_is_the_best_of_its_width(data: Dataset) -> None:
    """By the Eckart-Young theorem, of users with training interactions, which all are."""
    wide = wide_of(data, rank=20, noise=0.5)
    found = narrowed(wide.vectors, wide.layer(wide.projection.first(8)), data, 0)
    scores = lists(wide.vectors)
    u, s, v = torch.linalg.svd(scores, full_matrices=False)
    best = (scores - u[:, :8] * s[:8] @ v[:8]).square().mean()
    assert float((scores - lists(found)).square().mean()) == pytest.approx(float(best), rel=1e-3)


def test_a_fit_keeps_the_top_of_the_lists(data: Dataset) -> None:
    wide = wide_of(data, rank=20)
    losses = [
        cross_entropy(wide, narrowed(wide.vectors, wide.layer(maps), data, 0))
        for maps in (wide.projection.first(8), wide.fit(8))
    ]
    whole = cross_entropy(wide, wide.vectors)
    assert whole < losses[1] < whole + 0.7 * (losses[0] - whole)


def test_a_fit_to_labelled_pairs_comes_nearer_to_their_scores(data: Dataset) -> None:
    wide, train = wide_of(data, rank=20, labelled=True), data.train
    goal = wide.vectors.pair_products(train)
    errors = [
        float(np.square(narrowed(wide.vectors, wide.layer(maps), data, 0).pair_products(train) - goal).mean())
        for maps in (wide.projection.first(8), wide.fit(8))
    ]
    assert errors[1] < 0.8 * errors[0]


def test_a_fit_is_the_same_again(data: Dataset) -> None:
    one, other = (wide_of(data, rank=20).fit(8) for _ in range(2))
    assert torch.equal(one.items, other.items)
    assert torch.equal(one.user_map, other.user_map)


def test_items_beyond_those_of_a_step_are_drawn(data: Dataset) -> None:
    wide = wide_of(data, rank=20)
    before = cross_entropy(wide, narrowed(wide.vectors, wide.layer(wide.projection.first(8)), data, 0))
    some = replace(wide, max_items=40)
    assert cross_entropy(wide, narrowed(wide.vectors, wide.layer(some.fit(8)), data, 0)) < before


def test_an_item_without_a_row_has_the_map_alone_which_is_the_best_for_its_scores(data: Dataset) -> None:
    """By least squares over the users, of an item that no fit has seen."""
    wide = wide_of(data, rank=20)
    maps = wide.fit(8)
    layer, new = wide.layer(maps), torch.randn(1, 40)
    users, goal = (wide.users @ maps.user_map).double(), (wide.users @ (new - layer.centre).T).double()
    best = torch.linalg.lstsq(users, goal).solution
    assert torch.allclose(((new - layer.centre) @ layer.item_map).double(), best.T, rtol=1e-2, atol=1e-3)
    assert not layer.rows[UNKNOWN].any()


def test_without_ids_of_items_the_projection_stays() -> None:
    items = pl.DataFrame({"item_id": range(12), "kind": [f"k{n % 5}" for n in range(12)]})
    rows = pl.DataFrame({"user_id": [n % 7 for n in range(60)], "item_id": [n % 12 for n in range(60)]}).unique()
    schema = Schema(features=(Categorical(name="user_id", side="user"), Categorical(name="kind", side="item")))
    config = settings(split={"kind": "random"}, loss={"kind": "softmax"}, negatives={"full": True})
    data = Trainer(build_dataset(check(None, items, rows, schema), schema, config.split), config).dataset
    wide = wide_of(data, rank=6)
    assert torch.equal(wide.fit(3).items, wide.projection.first(3).items)
    assert not len(wide.layer(wide.fit(3)).rows)


class _Fixed:
    """Wide vectors of no numbers, with fixed answers of `fit` and `measure` by width; the wide vectors have the score
    1, and a fit gains a twentieth. A layer is its width."""

    biases = 0

    def __init__(self, width: int, **scores: float) -> None:
        self.width, self.scores, self.fitted = (
            width,
            {int(name[1:]): score for name, score in scores.items()},
            list[int](),
        )

    @property
    def projection(self) -> _Fixed:
        return self

    def first(self, width: int) -> int:
        return width

    def layer(self, width: int) -> Any:
        return SimpleNamespace(width=width, gain=1.0)

    def fit(self, wide: Any, width: int) -> Any:
        self.fitted.append(width)
        return SimpleNamespace(width=width, gain=1.05)

    def measure(self, layer: Any) -> float:
        return self.scores[layer.width] * layer.gain if layer else 1.0

    def choose(self, width: Any) -> tuple[Any, bool, dict[str, float]]:
        wide: Any = self
        return choose(wide, width, self.fit, self.measure, "validation.ndcg@5")


@pytest.mark.parametrize(
    ("scores", "width", "fitted", "taken"),
    [
        ({"w32": 0.9, "w64": 0.96, "w128": 0.99}, "auto", [64], 64),
        ({"w32": 0.3, "w64": 0.5, "w128": 0.95}, "auto", [128], 128),  # the first has no hope
        ({"w32": 0.3, "w64": 0.9, "w128": 0.92}, "auto", [64, 128], None),  # nothing is enough, and all is short
        ({"w32": 0.3, "w64": 0.5, "w128": 0.6}, 64, [64], 64),
        ({"w32": 0.3, "w64": 0.5, "w128": 0.6}, 200, [], None),
    ],
)
def test_the_first_width_that_is_good_enough_is_taken(
    scores: dict[str, float], width: Any, fitted: list[int], taken: int | None, messages: list[str]
) -> None:
    answers = _Fixed(160, **scores)
    layer, _, curve = answers.choose(width)
    assert answers.fitted == fitted
    assert (layer.width if layer else None) == taken
    if width == 200:
        assert "narrow.width = 200 is lowered to 160" in messages[-1]
    else:
        assert curve["narrow.160"] == 1
        assert {"narrow.32.projected", "narrow.64.projected", f"narrow.{fitted[-1]}"} <= curve.keys()
        assert messages[-1].startswith(f"vectors of {taken or 160} numbers: validation.ndcg@5 by width: ")


def test_wide_vectors_of_which_no_width_is_enough_get_the_largest() -> None:
    answers = _Fixed(600, w32=0.1, w64=0.1, w128=0.1, w256=0.2, w512=0.5)
    layer, _, _ = answers.choose("auto")
    assert answers.fitted == [512]
    assert layer.width == 512


def config_of(width: Any = 6, **sections: Any) -> Config:
    """Two pairs that are trained, of 24 numbers in all."""
    item = {"fields": ["item_id"], "layers": [], "width": 12}
    pairs = [{"user": {"fields": [name], "layers": [12], "width": 12}, "item": item} for name in ("one", "two")]
    given: dict[str, Any] = {
        "model": {"similarity": "dot", "temperature": 1.0, "bias": False, "pairs": pairs},
        "loss": {"kind": "softmax"},
        "negatives": {"full": True},
        "train": {"epochs": 2, "monitor": "validation.ndcg@5", "device": "cpu", "history_scope": "causal"},
        "narrow": {"width": width},
    }
    return settings(**given | sections)


@pytest.mark.parametrize("bias", [False, True])
def test_a_trained_model_serves_what_validation_measured(tmp_path: Path, bias: bool) -> None:
    """The run that is read again, the exported towers, and new items."""
    data, config = courses(300), config_of(split={"kind": "last"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"bias": bias})})
    run = api.fit(data, config=config, folder=tmp_path)
    found = run.factors()
    assert found.items.shape[1] == found.users.shape[1] == 6
    assert run.metrics["narrow.6"] == pytest.approx(run.metrics["validation.ndcg@5"], abs=1e-6)
    assert run.metrics["narrow.26" if bias else "narrow.24"] > 0
    again = runs.load(tmp_path)
    assert torch.equal(again.factors().items, found.items)
    assert "Fitted: the map" in (tmp_path / layout.REPORT).read_text()
    items = again.model.item_vectors(Trainer(data, config).objective.items.take(np.arange(len(data.items))))
    assert torch.allclose(items, found.items, atol=1e-5)
    for side in ("user", "item"):
        assert export_tower(again.model, side, data.encoders.fields(side), tmp_path / f"{side}.onnx") is not None


def solved_again(width: Any) -> Trainer:
    """A trainer of a closed form that is solved again with the rows of validation, which are a part of train."""
    item = {"fields": ["item_id"], "layers": [], "width": 12}
    pair = {"user": {"fields": ["one"], "layers": [], "width": 12}, "item": item}
    ials = {"kind": "ials", "width": 12, "unobserved": [0.3], "regularization": [0.008]}
    config = config_of(
        width,
        model={"similarity": "dot", "temperature": 1.0, "bias": False, "pairs": [pair]},
        train={"epochs": 0, "solved": [ials], "monitor": "validation.ndcg@5", "device": "cpu"},
    )
    return Trainer(groups(validates=False, share=0.2), config)


def test_pairs_that_are_solved_again_get_narrow_vectors_again(
    messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come nearer to the new wide scores than the narrow vectors of before."""
    layers, add = list[Narrow](), Narrowing.add_again

    def watched(self: Narrowing, *given: Any) -> None:
        layers.append(before[0])
        add(self, *given)

    before, attach = list[Narrow](), Narrowing.add

    def attached(self: Narrowing, *given: Any) -> Any:
        found = attach(self, *given)
        assert self.model.narrow is not None
        before.append(self.model.narrow)
        return found

    monkeypatch.setattr(Narrowing, "add_again", watched)
    monkeypatch.setattr(Narrowing, "add", attached)
    trainer = solved_again(10)
    model = trainer.run().model.eval()
    assert any("solved again" in line for line in messages)
    new, data = model.narrow, trainer.dataset
    assert new is not None
    assert new.width == 10
    rows = (
        trainer.objective.users.take(np.arange(len(data.users))),
        trainer.objective.items.take(np.arange(len(data.items))),
    )
    taken = torch.zeros(len(data.users), len(data.items), dtype=torch.bool)
    whole = data.with_all_of_train().seen_items
    taken[whole.owners, whole.values] = True
    lists = []
    for layer in (None, layers[0], new):
        model.narrow = layer
        scores = (model.user_vectors(rows[0]) @ model.item_vectors(rows[1]).T).detach()
        lists.append((scores - (scores * ~taken).sum(1, keepdim=True) / (~taken).sum(1, keepdim=True))[~taken].numpy())
    old, again = (float(np.corrcoef(lists[0], found)[0, 1]) for found in lists[1:])
    assert again > 0.9, "lists keep their order; users may differ by a number"
    assert again > old


def test_validation_is_measured_before_pairs_are_solved_again() -> None:
    """Also where the wide vectors stay."""
    found = [solved_again(width).run().metrics["validation.ndcg@5"] for width in (0, "auto")]
    assert found[0] == found[1]


def test_fewer_directions_than_numbers_lower_the_width(data: Dataset, messages: list[str]) -> None:
    wide = wide_of(data, rank=6)
    layer, _, curve = choose(wide, 20, lambda w, n: w.layer(w.fit(n)), lambda layer: 1.0, "validation.ndcg@5")
    assert layer is not None
    assert layer.width == 6
    assert "narrow.6" in curve
    assert any("narrow.width = 20 is lowered to 6, as the scores have no more directions" in line for line in messages)


def test_vectors_that_are_not_finite_are_refused(data: Dataset) -> None:
    wide = wide_of(data, rank=6)
    wide.vectors.users[3] = torch.nan
    narrowing = Narrowing.__new__(Narrowing)
    narrowing.context = DistributedContext()
    with pytest.raises(TrainingError, match="narrow vectors are not finite"):
        narrowing._fit(wide, 4)


def test_the_temperature_is_that_by_which_items_are_taken() -> None:
    """Users take items by the softmax of their products, over a temperature."""
    generator = torch.Generator().manual_seed(1)
    users, items = torch.randn(400, 8, generator=generator), torch.randn(60, 8, generator=generator)
    taken = torch.multinomial((users @ items.T / 2).softmax(1), 4, generator=generator)
    rows = [(u, int(i), "validation" if n == 3 else "train") for u, row in enumerate(taken) for n, i in enumerate(row)]
    rows.append((0, int(taken[0, 0]), "test"))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "part"], orient="row")
    schema = Schema(features=(Categorical(name="user_id", side="user"), Categorical(name="item_id", side="item")))
    split = settings(split={"kind": "column", "column": "part"}).split
    data = build_dataset(check(None, None, frame, schema), schema, split)
    choices = Choices.of(data, 1, "exclude")
    assert choices is not None
    order = [int(x) for x in data.items.frame["item_id"]]
    for factor in (1.0, 10.0):
        assert temperature(Factors(users * factor, items[order]), choices) == pytest.approx(2 * factor, rel=0.5)


@pytest.mark.parametrize("width", [-1, 1, 2, 1.5, True, "wide"])
def test_a_width_that_is_none_is_refused(width: Any) -> None:
    with pytest.raises(ConfigError, match=r"narrow.width: 0, a whole number from 3, or 'auto' is allowed, got "):
        config_of(width)


def test_nothing_dense_is_refused() -> None:
    with pytest.raises(ConfigError, match="narrow.width is that of vectors, and no scorer here has any"):
        config_of(train={"epochs": 0}, scorers=["trending"])


def test_a_width_by_validation_needs_it() -> None:
    config = config_of("auto", split={"kind": "random", "validation": 0.0}, train={"epochs": 1, "device": "cpu"})
    users, items, rows = checkerboard()
    with pytest.raises(ConfigError, match=r"narrow.width = 'auto' is chosen on the validation part.* such as 128"):
        api.fit((users, items, rows), CHECKERBOARD_SCHEMA, config.model_copy(update={"model": settings().model}))


def test_of_a_model_that_reads_the_context_a_width_is_refused_and_auto_keeps_all(messages: list[str]) -> None:
    schema = hourly_schema(HOUR)
    chosen: dict[str, dict[str, object]] = {"train": {"epochs": 1}, "evaluation": {"k": [1]}}
    auto = hourly_settings(narrow={"width": "auto"}, **chosen)
    data = build_dataset(check(*hourly(), schema), schema, auto.split)
    assert Trainer(data, auto).run().model.narrow is None
    assert "vectors of users depend on 'hour': narrow.width = 'auto' keeps those of all pairs" in messages
    with pytest.raises(ConfigError, match="is fitted to one vector of each user, and those here depend on 'hour'"):
        Trainer(data, hourly_settings(narrow={"width": 6}, **chosen))
