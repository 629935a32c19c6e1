"""The towers by hand: gate, join, pairs, and logits that are plain dot products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from model_worlds import (
    build,
    close,
    embeddings_of,
    fields_of,
    gradient_of,
    joined_outputs,
    not_none,
    outputs_of,
    pair_of,
    pool,
    topped,
    tower,
    world,
)
from torch import Tensor, nn

from twotower.errors import ConfigError
from twotower.features.field import InputField
from twotower.features.values import UNKNOWN
from twotower.model.embeddings import FieldEmbeddings
from twotower.model.inputs.bag import Bag
from twotower.model.inputs.code_layout import Inputs
from twotower.model.inputs.side_tensors import SideTensors
from twotower.model.layers import Dropout, SenetConfig, SenetGate, gather
from twotower.model.pooling import resolve
from twotower.model.tables import FieldTables
from twotower.model.towers import Tower, TowerConfig
from twotower.model.two_tower import ModelConfig, TwoTower

# ---- rows of a table


@pytest.mark.parametrize("shape", [(0,), (40, 3), (5, 0), (4, 3, 2)])
@pytest.mark.parametrize("width", [1, 3, 20])
def test_gathered_rows_and_their_gradient_equal_an_embeddings(shape: tuple[int, ...], width: int) -> None:
    rng = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 9, shape, generator=rng)
    table = torch.randn(9, width, generator=rng)
    upstream = torch.randn(*shape, width, generator=rng)
    one, other = table.clone().requires_grad_(), table.clone().requires_grad_()
    rows, expected = gather(one, codes), torch.nn.functional.embedding(codes, other)
    assert torch.equal(rows, expected)
    for out in (rows, expected):
        torch.autograd.backward((out * upstream).sum())
    assert one.grad is not None
    assert other.grad is not None
    assert close(one.grad, other.grad)


def test_the_gradient_of_gathered_rows_has_the_same_bits_with_any_number_of_threads() -> None:
    rng = torch.Generator().manual_seed(0)
    codes, table = torch.randint(0, 50, (3000, 4), generator=rng), torch.randn(60, 16, generator=rng)
    upstream = torch.randn(3000, 4, 16, generator=rng)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 2, 4):
            torch.set_num_threads(n)
            weight = table.clone().requires_grad_()
            torch.autograd.backward((gather(weight, codes) * upstream).sum())
            assert weight.grad is not None
            found.append(weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], g) for g in found)


# ---- logits


Pairs = list[tuple[dict[str, Any], dict[str, Any]]]
FOLDED: list[Pairs] = [
    [(tower(layers=[5]), tower(layers=[6, 5])), (tower(layers=[7, 3], fields=["liked"]), tower(layers=[3]))],
    [(tower(layers=[], fields=["uid", "city"]), tower(layers=[], fields=["iid", "brand"]))],
    [(tower(layers=[8]), tower(layers=[], fields=["iid", "picture"]))],
]


def vectors_and_bias_by_hand(model: TwoTower, side: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A side's raw vectors and the bias of its rows, before temperature and normalisation."""
    vectors, bias = [], torch.zeros(inputs.rows)
    for number, config in enumerate(model.config.pairs):
        pair = pair_of(model, number)
        out = outputs_of(pair.user if side == "user" else pair.item, inputs)
        if model.config.bias and getattr(config, side).layers:
            bias = bias + out[:, -1]
            out = out[:, :-1]
        vectors.append(out)
    if model.config.bias:
        table = (model.user_bias if side == "user" else model.item_bias).table.weight[:, 0]
        first = 0
        fields = world().users.fields if side == "user" else world().items.fields
        for column, field in enumerate(f for f in fields if f.kind == "lookup"):
            bias = bias + table[first + inputs.lookup[:, column]]
            first += field.rows
    return torch.cat(vectors, 1), bias


def ids_of(fields: Sequence[InputField], inputs: Inputs) -> Tensor:
    """Codes of the ids of a side."""
    return inputs.lookup[:, place_of_id(fields)].long()


def place_of_id(fields: Sequence[InputField]) -> int:
    """Column of the ids of a side."""
    lookups = [f for f in fields if f.kind == "lookup"]
    return next(n for n, f in enumerate(lookups) if f.identifies)


def logits_by_hand(model: TwoTower, inputs: tuple[Inputs, Inputs]) -> Tensor:
    """(U, I): the similarity over the temperature, plus the three biases."""
    (u, user_bias), (v, item_bias) = (
        vectors_and_bias_by_hand(model, side, x) for side, x in zip(("user", "item"), inputs, strict=True)
    )
    if model.config.similarity == "cosine":
        u, v = u / u.norm(dim=1)[:, None], v / v.norm(dim=1)[:, None]
    similarity = u @ v.T
    if model.config.stacking:
        parts = model.parts_of_pairs()
        similarity = torch.stack(
            [w * (u[:, p] @ v[:, p].T) for p, w in zip(parts, model.term_weights, strict=False)]
        ).sum(0)
        if model.config.bias:
            (users, items), ids = inputs, world()
            user_bias = user_bias * model.term_weights[-2] + model.user_prior.values[ids_of(ids.users.fields, users)]
            item_bias = item_bias * model.term_weights[-1] + model.item_prior.values[ids_of(ids.items.fields, items)]
    logits = similarity / model.log_temperature.exp() + user_bias[:, None] + item_bias[None]
    return logits + model.global_bias if model.config.bias else logits


@pytest.mark.parametrize("pairs", FOLDED)
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("stacking", [False, True])
def test_a_logit_is_the_similarity_over_the_temperature_plus_the_biases_and_a_plain_dot_product(
    stacking: bool, similarity: str, bias: bool, learn: bool, pairs: Pairs
) -> None:
    pairs = 2 * pairs if stacking else pairs
    model = build(
        *pairs, similarity=similarity, bias=bias, stacking=stacking, learn_temperature=learn, temperature=0.25
    )
    assert model.temperature.item() == pytest.approx(0.25)
    assert model.metric == ("cosine" if similarity == "cosine" and not bias and not stacking else "dot")
    if learn and similarity == "cosine":
        with torch.no_grad():
            model.log_temperature.add_(0.3)
    inputs = world().inputs()
    expected = logits_by_hand(model, inputs)
    assert close(model.user_vectors(inputs[0]) @ model.item_vectors(inputs[1]).T, expected, 1e-4)
    rng = torch.Generator().manual_seed(0)
    user, item = torch.randint(0, 60, (50,), generator=rng), torch.randint(0, 40, (50,), generator=rng)
    found = model(*inputs, user, item)
    assert close(found, expected[user, item], 1e-4)
    upstream = torch.randn(50, generator=rng)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert ("log_temperature" in trained) == (learn and similarity == "cosine")
    gradients: tuple[Tensor | None, ...]
    by_hand: tuple[Tensor | None, ...]
    gradients, by_hand = (
        torch.autograd.grad(x @ upstream, list(trained.values()), allow_unused=True)
        for x in (found, expected[user, item])
    )
    for name, a, b in zip(trained, gradients, by_hand, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or b is None or close(a, b, 2e-3), name


def test_the_weights_of_some_pairs_are_those_of_their_numbers() -> None:
    model = build(
        (tower(), tower()), (tower(layers=[4]), tower(layers=[4])), similarity="dot", stacking=True, bias=False
    )
    users, items = world().inputs()
    every, second = model.parts_of_pairs(), model.user_vectors(users, [1])
    assert close(second, model.user_vectors(users)[:, every[1]])
    assert close(model.item_vectors(items, [1]), model.item_vectors(items)[:, every[1]])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_bias_of_cold_items_is_added_to_items_of_the_unknown_id_alone(similarity: str, has_bias: bool) -> None:
    model = build((tower(), tower()), similarity=similarity, bias=has_bias, cold_item_bias=True)
    users, items = world().inputs()
    lookup = items.lookup.clone()
    lookup[:3, place_of_id(world().items.fields)] = UNKNOWN
    items = replace(items, lookup=lookup)
    found = []
    for bias in (0.0, 3.0):
        with torch.no_grad():
            model.cold_items.values.zero_()[UNKNOWN] = bias
        found.append(model.user_vectors(users) @ model.item_vectors(items).T)
    unknown = ids_of(world().items.fields, items) == UNKNOWN
    assert 0 < unknown.sum() < len(unknown)
    assert close(found[1] - found[0], (3.0 * unknown).expand_as(found[0]), 1e-4)
    assert model.metric == "dot"
    assert model.bias_columns


def test_a_zero_vector_has_a_finite_logit_and_gradient() -> None:
    model = build(similarity="cosine", bias=False)
    with torch.no_grad():
        for p in pair_of(model).parameters():
            p.zero_()
    logits = model(*world().inputs(), torch.arange(40), torch.arange(40))
    torch.autograd.backward(logits.sum())
    assert (logits == 0).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- the gate


@pytest.mark.parametrize("widths", [[2, 4, 3], [4, 4, 4]])
@pytest.mark.parametrize("squeeze", ["mean", "sum", "max"])
def test_a_gate_is_the_sigmoid_network_over_the_squeezed_fields(squeeze: str, widths: list[int]) -> None:
    torch.manual_seed(0)
    gate = SenetGate(widths, SenetConfig(enabled=True, squeeze=squeeze, reduction=1.5))
    fields = [torch.randn(5, width) for width in widths]
    found = gate(torch.cat(fields, 1))
    (w1, b1), (w2, b2) = ((m.weight.tolist(), m.bias.tolist()) for m in gate.excite if isinstance(m, nn.Linear))
    for r in range(5):
        rows = [f[r].tolist() for f in fields]
        z = [{"mean": sum(x) / len(x), "sum": sum(x), "max": max(x)}[squeeze] for x in rows]
        middle = [max(0.0, b + sum(w * x for w, x in zip(ws, z, strict=True))) for ws, b in zip(w1, b1, strict=True)]
        out = [b + sum(w * x for w, x in zip(ws, middle, strict=True)) for ws, b in zip(w2, b2, strict=True)]
        assert found[r].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in out], abs=1e-6)
    assert ((found > 0) & (found < 1)).all()
    weighed = torch.cat([f * found[:, i : i + 1] for i, f in enumerate(fields)], 1)
    assert close(gate.reweight(torch.cat(fields, 1)), weighed)


@pytest.mark.parametrize(("fields", "reduction", "middle"), [(6, 1, 6), (6, 2, 3), (6, 4, 1), (4, 1.5, 2), (2, 9, 1)])
def test_reduction_sets_the_width_of_the_middle_layer(fields: int, reduction: float, middle: int) -> None:
    gate = SenetGate([3] * fields, SenetConfig(enabled=True, reduction=reduction))
    first, last = (m for m in gate.excite if isinstance(m, nn.Linear))
    assert (first.in_features, first.out_features) == (fields, middle)
    assert (last.in_features, last.out_features) == (middle, fields)


# ---- fields of a tower


def field_by_hand(embeddings: FieldEmbeddings, field: InputField, of: SideTensors, other: FieldTables) -> Tensor:
    """The embedding of one field for all rows, from its own column."""
    inputs = of.take(np.arange(of.n))
    if field.kind == "dense":
        number = [f.name for f in embeddings.fields if f.kind != "lookup"].index(field.name)
        projected: Tensor = embeddings.projections[f"dense{number}"](inputs.dense[field.name])
        return projected
    if field.kind == "lookup":
        column = [f.name for f in of.fields if f.kind == "lookup"].index(field.name)
        return embeddings.rows_of(field.name)[inputs.lookup[:, column]]
    table = other.rows_of(field.share_with) if field.share_with else embeddings.rows_of(field.name)
    bag = inputs.bags[field.name]
    assert isinstance(bag, Bag)
    return pool(table, bag, resolve(field.pooling))


@pytest.mark.parametrize(
    "fields",
    [[], ["income", "city", "uid"], ["age", "city"], ["disliked", "income", "age", "uid", "liked"]],
)
def test_a_tower_reads_its_fields_and_no_other_each_from_its_own_column(fields: list[str]) -> None:
    model, of = build((tower(fields=fields), tower())), world()
    mine, other = pair_of(model).user.embeddings, pair_of(model).item.embeddings.tables
    by_name = {f.name: f for f in of.users.fields}
    with torch.no_grad():
        found = fields_of(mine, world().inputs()[0])
        assert set(found) == set(fields or by_name)
        for name, embedded in found.items():
            assert close(embedded, field_by_hand(mine, by_name[name], of.users, other)), name


def test_a_field_with_a_width_of_its_own_is_embedded_in_that_width() -> None:
    of = world()
    widths = {"city": 3, "uid": 7, "age": 2, "disliked": 5}
    fields = tuple(replace(f, width=widths.get(f.name, 0)) for f in of.users.fields)
    other = FieldTables(of.items.fields, 4)
    for table in {rows.table for rows in other.place.values()}:
        other.create(table)
    mine = embeddings_of(fields, 4, 0.5, other)
    found = fields_of(mine, of.inputs()[0])
    assert {name: f.shape[1] for name, f in found.items()} == {f.name: widths.get(f.name, 4) for f in fields}
    for field in fields:
        assert close(found[field.name], field_by_hand(mine, field, of.users, other)), field.name


@pytest.mark.parametrize(
    ("masked", "bias"),
    [(("age", "disliked"), False), (("age", "disliked"), True), (("city", "income"), False), (("uid", "liked"), False)],
)
def test_leaving_a_feature_out_equals_deleting_its_column(masked: tuple[str, ...], bias: bool) -> None:
    kept = [f.name for f in world().users.fields if f.name not in masked]
    full = build((tower(fields=kept), tower()), bias=bias)
    deleted = build((tower(), tower()), bias=bias, of=world(masked))
    deleted.load_state_dict(full.state_dict())
    (users, items), (users_without, items_without) = world().inputs(), world(masked).inputs()
    with torch.no_grad():
        assert close(full.user_vectors(users), deleted.user_vectors(users_without))
        assert close(full.item_vectors(items), deleted.item_vectors(items_without))


# ---- layers


def test_join_sum_adds_the_fields_and_the_shift_and_activates_before_the_layers() -> None:
    model = build((tower(join="sum", layers=[5]), tower(layers=[5])), bias=False, similarity="dot", temperature=1)
    users, _ = world().inputs()
    mine = pair_of(model).user
    with torch.no_grad():
        total = torch.zeros(60, 4) + not_none(mine.shift)
        for field in fields_of(mine.embeddings, users).values():
            total = total + field
        hidden = torch.where(total > 0, total, 0.01 * total)
        layer = not_none(mine.head.layer)
        assert close(model.user_vectors(users), hidden @ layer.weight.T + layer.bias)
        assert (not_none(mine.shift).abs() > 0).all()


@pytest.mark.parametrize("option", ["dropout", "field_dropout"])
def test_dropout_is_for_training_only(option: str) -> None:
    model = build((tower(**{option: 0.5}), tower()), unknown_rate=0)
    users, _ = world().inputs()
    assert torch.equal(model.user_vectors(users), model.user_vectors(users))
    assert close(model.user_vectors(users), build().user_vectors(users))
    model.train()
    assert not close(model.user_vectors(users), model.user_vectors(users))


def normed(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Rows shifted to mean 0 and scaled to variance 1, by loops."""
    out = torch.zeros_like(x)
    for r, row in enumerate(x.tolist()):
        mean = sum(row) / len(row)
        variance = sum((v - mean) ** 2 for v in row) / len(row)
        for k, v in enumerate(row):
            out[r, k] = (v - mean) / math.sqrt(variance + 1e-5)
            if weight is not None and bias is not None:
                out[r, k] = out[r, k] * weight[k] + bias[k]
    return out


@pytest.mark.parametrize("senet", [False, True])
@pytest.mark.parametrize("join", ["concat", "sum"])
@pytest.mark.parametrize("widths", [{}, {"city": 3, "uid": 7, "age": 2}])
def test_field_norm_normalises_each_field_by_itself_before_gate_and_join(
    widths: dict[str, int], join: str, senet: bool
) -> None:
    if join == "sum" and (senet or widths):
        return
    of = world()
    fields = tuple(replace(f, width=widths.get(f.name, 0)) for f in of.users.fields)
    of = of._replace(users=SideTensors(of.data.users, fields))
    plain, model = (
        build((tower(field_norm=n, join=join, senet={"enabled": senet}), tower()), of=of, bias=False, similarity="dot")
        for n in (False, True)
    )
    assert plain.state_dict().keys() == model.state_dict().keys(), "nothing to learn"
    users, _ = of.inputs()
    mine = pair_of(model).user
    with torch.no_grad():
        embedded = [normed(f) for f in fields_of(mine.embeddings, users).values()]
        if join == "sum":
            hidden = nn.functional.leaky_relu(torch.stack(embedded).sum(0) + not_none(mine.shift))
            expected = joined_outputs(mine.head(mine.layers[1:](hidden), hidden))
        else:
            gates = mine.gates(users).get("senet", torch.ones(len(embedded[0]), len(embedded)))
            if senet:
                assert close(gates, not_none(mine.senet)(torch.cat(embedded, 1)), 1e-4)
            expected = topped(mine, torch.cat([f * gates[:, i : i + 1] for i, f in enumerate(embedded)], 1))
        assert close(outputs_of(mine, users), expected, 1e-3)
        assert not close(plain.user_vectors(users), model.user_vectors(users))


@pytest.mark.parametrize("layers", [[5], [6, 5]])
@pytest.mark.parametrize("join", ["concat", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_residual_adds_a_linear_map_of_the_joined_fields_to_the_last_layer(
    bias: bool, join: str, layers: list[int]
) -> None:
    options = tower(residual=True, join=join, layers=layers)
    model = build((options, tower()), bias=bias)
    users, _ = world().inputs()
    mine = pair_of(model).user
    residual = not_none(mine.head.residual)
    assert [name for name, _ in residual.named_parameters()] == ["weight"]
    assert residual.weight.shape == (5 + bias, 4 if join == "sum" else 4 * len(mine.field_names))
    with torch.no_grad():
        fields = list(fields_of(mine.embeddings, users).values())
        joined = torch.stack(fields).sum(0) + not_none(mine.shift) if join == "sum" else torch.cat(fields, 1)
        plain = not_none(mine.head.layer)(mine.layers(joined))
        assert close(outputs_of(mine, users), plain + joined @ residual.weight.T)
        residual.weight.zero_()
        assert close(outputs_of(mine, users), plain)
    with pytest.raises(ValueError, match="residual needs layers, and layers is empty"):
        TowerConfig(residual=True, layers=())


# ---- dropout


@pytest.mark.parametrize("rate", [0.001, 0.25, 0.999])
def test_dropout_drops_its_share_and_keeps_the_expectation(rate: float) -> None:
    torch.manual_seed(0)
    n = 200_000
    x = torch.ones(n // 5, 5)
    out = Dropout(rate).train()(x)
    dropped = (out == 0).float().mean().item()
    real = min(255, max(1, round(rate * 256))) / 256
    assert abs(real - rate) < 1 / 256
    # Five standard deviations of a share, and of the mean of what is left.
    assert dropped == pytest.approx(real, abs=5 * math.sqrt(real * (1 - real) / n))
    assert out.mean().item() == pytest.approx(1, abs=5 * math.sqrt(real / (1 - real) / n))
    assert out[out > 0].unique().tolist() == pytest.approx([1 / (1 - real)])


def test_dropout_drops_numbers_one_by_one_wherever_they_stand() -> None:
    torch.manual_seed(1)
    dropout = Dropout(0.25).train()
    x = torch.ones(13)  # no multiple of the eight bytes of a draw
    gone = torch.stack([dropout(x) == 0 for _ in range(8000)]).double()
    assert gone.mean(0).tolist() == pytest.approx([0.25] * 13, abs=0.025)
    together = torch.corrcoef(gone.T) - torch.eye(13)
    assert together.abs().max() < 0.06
    assert dropout(torch.ones(0, 4)).shape == (0, 4)


def test_dropout_follows_torchs_seed_passes_its_mask_to_the_gradient_and_is_off_in_evaluation() -> None:
    dropout = Dropout(0.4).train()
    x = torch.randn(50, 7).requires_grad_()

    def drop(seed: int) -> Tensor:
        torch.manual_seed(seed)
        dropped: Tensor = dropout(x)
        return dropped

    once = drop(3)
    assert torch.equal(once, drop(3))
    assert not torch.equal(once, drop(4))
    assert not torch.equal(once, dropout(x)), "a new mask at every call"
    (gradient,) = torch.autograd.grad(once.sum(), x)
    torch.testing.assert_close(gradient, torch.where(once == 0, 0.0, 256 / (256 - round(0.4 * 256))))
    torch.testing.assert_close(gradient * x, once)
    before = torch.random.get_rng_state()
    assert dropout.eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- pairs


# ---- the unknown row


def test_the_unknown_row_is_trained_by_a_share_of_the_known_values() -> None:
    model, of = build(unknown_rate=0.3), world()
    embeddings, biases = pair_of(model).user.embeddings, model.user_bias
    known = np.flatnonzero((of.users.take(np.arange(60)).lookup != 0).all(1).numpy())
    assert len(known) > 30
    starts = [0, 61, 66]  # of uid, city and income in the table of biases
    for train in (True, False):
        torch.manual_seed(0)
        model.train(train).zero_grad()
        torch.autograd.backward(model.user_vectors(of.users.take(known)).square().sum())
        for name in ("uid", "city", "income"):
            gradient = gradient_of(embeddings, name)
            assert bool(gradient[0].any()) == train, name
            assert gradient[1:].any()
        assert biases.table.weight.grad is not None
        assert [bool(biases.table.weight.grad[s].any()) for s in starts] == [train] * 3


def test_the_unknown_rate_is_the_share_of_lookups_that_read_the_unknown_row() -> None:
    rows = 400
    fields = (InputField("a", "lookup", rows=rows + 1), InputField("b", "lookup", rows=rows + 1))
    embeddings = embeddings_of(fields, 2, 0.5).train()
    lookup = torch.arange(1, rows + 1)[:, None].expand(rows, 2).contiguous()
    inputs = Inputs(rows, lookup, {}, {})
    for rate in (0.0, 0.25, 0.75):
        torch.manual_seed(1)
        for name, embedded in fields_of(embeddings, inputs, rate).items():
            unknown = (embedded == embeddings.rows_of(name)[0]).all(1)
            assert unknown.float().mean().item() == pytest.approx(rate, abs=0.07)
            assert torch.equal(embedded[~unknown], embeddings.rows_of(name)[1:][~unknown])
    with torch.no_grad():
        found = fields_of(embeddings.eval(), inputs, 0.75)
        assert torch.equal(found["a"], embeddings.rows_of("a")[1:])


@pytest.mark.parametrize("side", ["user", "item"])
def test_id_dropout_makes_whole_rows_unknown_in_all_towers_and_biases(side: str) -> None:
    """A row's vector is that of its known id, or that of the same row with an unknown id: never a mixture of towers and
    bias."""
    pairs = [(tower(layers=[5]), tower(layers=[5])), (tower(layers=[4]), tower(layers=[4]))]
    options: dict[str, Any] = {f"{side}_id_dropout": 0.4}
    model = build(*pairs, unknown_rate=0.0, **options)
    of = world()
    with torch.no_grad():
        for bias in (model.user_bias, model.item_bias):
            bias.table.weight.normal_()
    vectors, fields, inputs = (
        (model.user_vectors, of.users.fields, of.inputs()[0])
        if side == "user"
        else (model.item_vectors, of.items.fields, of.inputs()[1])
    )
    column = [f.identifies for f in fields if f.kind == "lookup"].index(True)
    lookup = inputs.lookup.clone()
    lookup[:, column] = 0
    known, unknown = vectors(inputs), vectors(replace(inputs, lookup=lookup))
    torch.manual_seed(3)
    model.train()
    before, dropped, rows = inputs.lookup.clone(), 0, inputs.lookup[:, column].nonzero()[:, 0]
    for _ in range(20):
        drawn = vectors(inputs)
        is_known, is_unknown = ((drawn - expected).abs().amax(1) < 1e-5 for expected in (known, unknown))
        assert (is_known | is_unknown).all()
        dropped += int((~is_known[rows]).sum())
    assert dropped / (20 * len(rows)) == pytest.approx(0.4, abs=0.06)
    assert torch.equal(inputs.lookup, before)


@pytest.mark.parametrize(("options", "zero"), [
    ({"unknown_rate": 0.0}, {"iid", "brand"}),
    ({"unknown_rate": 0.0, "item_id_dropout": 0.1}, {"brand"}),
    ({}, set()),
])  # fmt: skip
def test_an_unknown_row_that_no_training_reads_is_zero(options: dict[str, float], zero: set[str]) -> None:
    of = world()
    made = TwoTower(ModelConfig.model_validate(options), of.users.fields, of.items.fields)
    for name in ("iid", "brand"):
        rows = pair_of(made).item.embeddings.rows_of(name)
        assert bool(rows[0].any()) == (name not in zero), name
        assert rows[1:].any(1).all()


def test_id_dropout_needs_ids() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.item_id_dropout needs a categorical feature over the id column of the items"
    ):
        TwoTower(
            ModelConfig(item_id_dropout=0.1), (InputField("uid", "lookup", rows=9, identifies=True),),
            (InputField("iid", "lookup", rows=9),),
        )  # fmt: skip
    one = InputField("uid", "lookup", rows=9, identifies=True)
    with pytest.raises(ConfigError, match="'iid' is the only feature of the items; add others, or leave it out"):
        TwoTower(ModelConfig(item_id_dropout=0.1), (one,), (replace(one, name="iid"),))


# ---- shared sequences


def test_a_shared_sequence_reads_and_trains_the_other_towers_table() -> None:
    model, of = build((tower(fields=["liked", "disliked"]), tower())), world()
    user, item = pair_of(model).user.embeddings, pair_of(model).item.embeddings
    assert set(user.tables) == {"bag1"}
    inputs = of.users.take(np.arange(5))
    torch.autograd.backward(model.user_vectors(inputs).square().sum())
    gradient = gradient_of(item, "iid")
    bag = inputs.bags["liked"]
    assert isinstance(bag, Bag)
    read = set(bag.values.tolist())
    assert 0 < len(read) < 40
    assert {code for code in range(41) if gradient[code].any()} == read
    assert not gradient_of(item, "brand").any()
    assert gradient_of(user, "disliked").any()
    before = model.user_vectors(inputs)
    with torch.no_grad():
        item.rows_of("iid").add_(1.0)
    assert not close(model.user_vectors(inputs), before)


def test_a_shared_sequence_whose_table_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'liked' shares the embedding of 'iid'.*does not read"):
        build((tower(), tower(fields=["brand", "tags"])))
    # The table has to be in the same pair.
    with pytest.raises(ConfigError, match="'liked' shares"):
        build((tower(fields=["uid"]), tower()), (tower(), tower(fields=["brand"])))
    assert build((tower(fields=["uid", "disliked"]), tower(fields=["brand", "tags"]))).pairs


# ---- names and corners


@pytest.mark.parametrize(
    ("user", "item", "message"),
    [
        ({"fields": ["uid", "citty"]}, {}, "'citty'.*city"),
        ({"fields": ["uid", "uid"]}, {}, "'uid' is listed twice"),
        ({"layers": [8, 5]}, {"layers": [8, 6]}, r"pairs\.0: the user vector has width"),
        ({"layers": []}, {"layers": []}, r"pairs\.0: the user vector has width"),
        ({"width": 6}, {}, "'liked' has width 6 and shares 'iid' of width 4"),
    ],
)
def test_towers_that_cannot_be_are_a_config_error(user: dict[str, Any], item: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build((tower(**user), tower(**item)))


def test_join_sum_needs_fields_of_one_width() -> None:
    fields = (InputField("a", "lookup", rows=3, width=4), InputField("b", "lookup", rows=3, width=5))
    with pytest.raises(ConfigError, match="one width, found a 4, b 5; give them one width"):
        Tower(TowerConfig(join="sum"), fields, FieldTables(fields, 4), FieldTables((), 4), 0.1)


@pytest.mark.parametrize("kind", ["lookup", "bag", "dense"])
def test_a_feature_may_have_any_name(kind: Any) -> None:
    field = InputField("a.b", kind, rows=3, length=1)
    assert embeddings_of((field,), 4, 0.1).widths == [4]


def test_every_unit_of_a_fresh_gate_is_on() -> None:
    """A unit that is off for all rows at the start stays off: its gate would weigh every row alike for ever."""
    for seed in range(20):
        torch.manual_seed(seed)
        gate = SenetGate([16, 16, 16], SenetConfig(enabled=True))
        fields = torch.randn(200, 48) * 0.05
        hidden = gate.excite[1](gate.excite[0](fields.view(200, 3, 16).mean(2)))
        assert (hidden > 0).all()
        assert (gate(fields).std(0) > 0).all()
