"""The parallel parts of a tower against plain loops, and the vectors that mimic the other side."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from model_worlds import (
    branches_of,
    build,
    close,
    fields_of,
    not_none,
    outputs_of,
    pair_of,
    topped,
    tower,
    world,
    world_of,
)
from torch import Tensor, nn
from worlds import CHECKERBOARD_SCHEMA, EVERYTHING_SCHEMA, checkerboard, everything, settings

from twotower.config.experiment import Config
from twotower.config.toml import parse_config
from twotower.data.dataset import Dataset, build_dataset
from twotower.data.tables import check
from twotower.errors import ConfigError
from twotower.features.categorical import Categorical
from twotower.features.sequence import Sequence
from twotower.model.branches.bilinear import Bilinear, BilinearBranch
from twotower.model.branches.cin import Cin, CinBranch
from twotower.model.branches.cross import Cross, CrossBranch
from twotower.model.branches.fm import Fm
from twotower.model.branches.mlp import Mlp, MlpBranch
from twotower.model.pooling.decay import Decay
from twotower.model.towers import TowerHead
from twotower.model.two_tower import TwoTower
from twotower.train.objective import ContrastiveObjective, PointwiseObjective, mimic
from twotower.train.trainer import Trainer

F, E = 4, 3
KINDS: dict[str, dict[str, Any]] = {
    "mlp": {"layers": [5]},
    "cross": {},
    "fm": {},
    "cin": {"widths": [3, 2]},
    "bilinear": {},
    "identity": {},
}
GATE = {"enabled": True}


def branch(kind: str, **options: Any) -> dict[str, Any]:
    return {"kind": kind} | KINDS[kind] | options


def rows(n: int = 5) -> tuple[Tensor, list[list[Tensor]]]:
    """The fields side by side (n, F E), and the same as lists of vectors."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, F * E, generator=rng, dtype=torch.float64).requires_grad_()
    return x, [list(row.split(E)) for row in x]


def same_with_gradient(module: nn.Module, expected: Any) -> None:
    """`module` equals a loop over rows of lists of fields, and so does its gradient."""
    x, fields = rows()
    module.double()
    found, wanted = module(x), torch.stack([expected(row) for row in fields])
    assert close(found, wanted)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
    ours, theirs = (torch.autograd.grad((y * direction).sum(), x)[0] for y in (found, wanted))
    assert close(ours, theirs)


# ---- what each computes


def test_mlp_activates_every_layer() -> None:
    torch.manual_seed(0)
    module = Mlp(F * E, MlpBranch(layers=(6, 2), activation="ReLU", layer_norm=True, dropout=0.3)).eval()
    assert [type(m).__name__ for m in module.layers] == ["Linear", "LayerNorm", "ReLU", "Dropout"] * 2
    first, norm, _, _, last, norm2, *_ = module.layers

    def expected(fields: list[Tensor]) -> Tensor:
        out: Tensor = norm2(last(norm(first(torch.cat(fields))).relu())).relu()
        return out

    same_with_gradient(module, expected)
    assert module.size == 2


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("depth", [1, 3])
def test_cross_multiplies_the_fields_with_a_linear_map_of_what_it_has(depth: int, rank: int) -> None:
    torch.manual_seed(0)
    module = Cross(F * E, CrossBranch(depth=depth, rank=rank))
    for p in module.parameters():
        nn.init.normal_(p)
    shapes = {tuple(p.shape) for p in module.parameters()}
    assert shapes == ({(rank, 12), (12, rank), (12,)} if rank else {(12, 12), (12,)})

    def expected(fields: list[Tensor]) -> Tensor:
        first = x = torch.cat(fields)
        for layer in module.layers:
            if rank:
                weight, bias = layer[1].weight @ layer[0].weight, layer[1].bias  # type: ignore[index]
            else:
                weight, bias = layer.weight, layer.bias
            x = torch.stack([first[i] * (weight[i] @ x + bias[i]) + x[i] for i in range(F * E)])
        return x

    same_with_gradient(module, expected)


def test_fm_is_the_sum_of_the_products_of_every_two_fields() -> None:
    module = Fm(F, E)
    same_with_gradient(module, lambda fields: torch.stack([a * b for a, b in itertools.combinations(fields, 2)]).sum(0))
    assert module.size == E
    assert not list(module.parameters())


def test_cin_maps_are_weighed_sums_of_products_with_the_fields_summed_over_the_width() -> None:
    torch.manual_seed(0)
    module = Cin(F, E, CinBranch(widths=(3, 2)))

    def expected(fields: list[Tensor]) -> Tensor:
        maps, out = fields, []
        for weight in module.maps:
            products = [(h, f, maps[h] * fields[f]) for h in range(len(maps)) for f in range(F)]
            maps = [torch.stack([w[h * F + f] * product for h, f, product in products]).sum(0) for w in weight]
            out += [m.sum() for m in maps]
        return torch.stack(out)

    same_with_gradient(module, expected)
    assert module.size == 5


@pytest.mark.parametrize(("matrices", "n"), [("all", 1), ("each", 3), ("interaction", 6)])
def test_bilinear_multiplies_each_field_through_a_matrix_with_each_later_one(matrices: Any, n: int) -> None:
    torch.manual_seed(0)
    module = Bilinear(F, E, BilinearBranch(matrices=matrices))
    assert module.matrices.shape == (n, E, E)

    def expected(fields: list[Tensor]) -> Tensor:
        out = []
        for number, (i, j) in enumerate(itertools.combinations(range(F), 2)):
            w = module.matrices[{"all": 0, "each": i, "interaction": number}[matrices]]
            out.append(fields[i] @ w * fields[j])
        return torch.cat(out)

    same_with_gradient(module, expected)
    assert module.size == 6 * E


# ---- in a tower


@pytest.mark.parametrize("field_norm", [False, True])
@pytest.mark.parametrize("layers", [[6, 5], []])
def test_the_branches_read_the_joined_fields_and_stand_side_by_side_before_the_layers(
    layers: list[int], field_norm: bool
) -> None:
    parts = [branch("mlp"), branch("cross", senet=GATE), branch("fm"), branch("cin", senet=GATE), branch("bilinear"),
             branch("identity", senet=GATE | {"squeeze": "max"})]  # fmt: skip
    side = tower(branches=parts, layers=layers, senet=GATE, field_norm=field_norm, residual=bool(layers))
    fields = ["uid", "city", "income", "liked"]
    model = build((side | {"fields": fields}, side | {"fields": ["iid", "brand", "tags", "fans"]}), bias=False)
    users, _ = world().inputs()
    mine = pair_of(model).user
    with torch.no_grad():
        joined = torch.cat(list(fields_of(mine.embeddings, users).values()), 1)
        if field_norm:
            joined = nn.functional.layer_norm(joined.view(-1, 4, 4), (4,)).flatten(1)
        joined = not_none(mine.senet).reweight(joined)
        outs = []
        for part in branches_of(mine.branches):
            x = joined if part.senet is None else part.senet.reweight(joined)
            x = part.module(x)
            for norm, columns in zip(
                part.norms, {5: [slice(0, 3), slice(3, 5)]}.get(part.size, [slice(None)]), strict=False
            ):
                mean, variance = x[:, columns].mean(1, keepdim=True), x[:, columns].var(1, correction=0, keepdim=True)
                x[:, columns] = (x[:, columns] - mean) / (variance + 1e-10).sqrt() * norm.weight + norm.bias
            outs.append(x)
        assert [o.shape[1] for o in outs] == [b.size for b in branches_of(mine.branches)] == [5, 16, 4, 5, 24, 16]
        expected = torch.cat(outs, 1)
        if layers:
            expected = topped(mine, expected, joined)
        assert close(outputs_of(mine, users), expected, 1e-4)
        assert outputs_of(mine, users).shape[1] == mine.size == (5 if layers else 70)
        gates = mine.gates(users)
        assert list(gates) == ["senet", "branches.1.senet", "branches.3.senet", "branches.5.senet"]
        assert close(gates["branches.5.senet"], not_none(branches_of(mine.branches)[5].senet)(joined))
        assert all(g.shape == (users.rows, 4) for g in gates.values())


def test_field_dropout_drops_the_same_numbers_for_every_branch() -> None:
    side = tower(branches=[branch("identity"), branch("identity")], field_dropout=0.5)
    model = build((side, tower()), bias=False)
    mine = pair_of(model).user.train()
    mine.layers, mine.head = nn.Sequential(), TowerHead(mine.size, mine.size, None, bias=False)
    left, right = outputs_of(mine, world().inputs()[0]).chunk(2, 1)
    assert torch.equal(left, right)
    assert 0.3 < float((left == 0).float().mean()) < 0.7


@pytest.mark.parametrize("field_norm", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_branch_is_dead_or_drowns_the_fields_at_the_start(kind: str, field_norm: bool) -> None:
    side: dict[str, Any] = {
        "layers": [16, 8],
        "branches": [branch(kind, senet=GATE), branch("identity")],
        "field_norm": field_norm,
    }
    names = {"user": ["uid", "city", "income"], "item": ["iid", "brand"]}
    pair = {s: side | {"fields": n} for s, n in names.items()}
    config = parse_config({"model": {"width": 16, "pairs": [pair]}})[1]
    torch.manual_seed(0)
    model = TwoTower(config.model, world().users.fields, world().items.fields)
    users, items = world().inputs()
    for own, inputs in ((pair_of(model).user, users), (pair_of(model).item, items)):
        fields = own.joined_fields(inputs)
        gives, plain = (own.branches[i](fields).square().mean().sqrt().item() for i in (0, 1))
        assert 0.1 < gives / plain < 3, (gives, plain)
    logits = model(users, items, torch.arange(40), torch.arange(40).flip(0))
    torch.autograd.backward(logits.square().sum())
    for name, p in model.named_parameters():
        if ".branches." in name:
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


def test_a_decaying_mean_counts_as_a_piece_for_each_of_its_rates() -> None:
    history = Sequence(name="liked", side="user", interactions="positive", pooling=Decay(rates=(0.0, 0.5, 1.0)))
    features = tuple(f for f in EVERYTHING_SCHEMA.features if f.name not in ("liked", "disliked"))
    of = world_of(EVERYTHING_SCHEMA.model_copy(update={"features": (*features, history)}))
    user = tower(fields=["uid", "liked"], branches=[branch("fm", senet=GATE), branch("bilinear")])
    model = build((user, tower()), of=of)
    mine = pair_of(model).user
    assert mine.embeddings.widths == [4, 12]
    assert [getattr(b.module, "n_fields", 0) for b in branches_of(mine.branches)] == [4, 4]
    assert mine.gates(of.inputs()[0])["branches.0.senet"].shape[1] == 2
    alone = build((tower(fields=["liked"], branches=[branch("fm")]), tower()), of=of)
    assert getattr(branches_of(pair_of(alone).user.branches)[0].module, "n_fields", 0) == 3


# ---- what is refused


@pytest.mark.parametrize("kind", ["fm", "cin", "bilinear"])
def test_products_of_fields_need_two_of_one_width(kind: str) -> None:
    side = tower(branches=[branch(kind)])
    with pytest.raises(ConfigError, match="the tower has one; add a field"):
        build((side | {"fields": ["uid"]}, tower()))
    fields = world_of(
        EVERYTHING_SCHEMA.model_copy(
            update={
                "features": tuple(
                    f.model_copy(update={"width": 6}) if f.name == "city" else f for f in EVERYTHING_SCHEMA.features
                )
            }
        )
    )
    with pytest.raises(ConfigError, match=rf"kind '{kind}' needs fields of one width, found the widths \[4, 6\]"):
        build((side, tower()), of=fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"join": "sum", "branches": [{"kind": "fm"}]}, "branches needs join = 'concat'"),
        ({"join": "sum", "augment": True}, "augment needs join = 'concat'"),
        ({"augment": True, "layers": []}, "augment needs layers, and layers is empty"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": {"pairs": [{"user": given}]}})


# ---- augmented vectors


def dual(**more: Any) -> dict[str, Any]:
    return {"pairs": [{s: {"layers": [6, 4], "augment": True} for s in ("user", "item")}]} | more


def test_an_augmented_vector_is_joined_to_the_fields_and_begins_at_zero() -> None:
    model = build((tower(augment=True), tower()), bias=True)
    users, _ = world().inputs()
    mine = pair_of(model).user
    with torch.no_grad():
        fields = mine.joined_fields(users)
        column = [f.name for f in world().users.fields if f.kind == "lookup"].index("uid")
        vector = not_none(mine.augmented).table.weight[users.lookup[:, column]]
        assert vector.shape == (60, 5)
        assert close(outputs_of(mine, users), topped(mine, torch.cat([fields, vector], 1)))
    fresh = TwoTower(parse_config({"model": dual()})[1].model, world().users.fields, world().items.fields)
    assert (not_none(pair_of(fresh).user.augmented).table.weight == 0).all()
    assert not_none(pair_of(fresh).item.augmented).table.weight.shape == (41, 4)


@pytest.mark.parametrize("hashed", [False, True])
def test_augment_needs_a_feature_that_tells_the_ids_apart(hashed: bool) -> None:
    features = [f for f in EVERYTHING_SCHEMA.features if f.name not in ("uid", "fans")]
    if hashed:
        features.append(Categorical(name="uid", side="user", hash_buckets=9))
    of = world_of(EVERYTHING_SCHEMA.model_copy(update={"features": tuple(features)}))
    with pytest.raises(ConfigError, match="needs a categorical feature over the id column"):
        build((tower(augment=True), tower()), of=of)


def test_mimicry_is_the_mean_squared_distance_and_the_imitated_gets_no_gradient() -> None:
    a = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    v = torch.tensor([[0.0, 2.0], [3.0, 1.0]], requires_grad=True)
    loss = mimic(a, v, torch.ones(2))
    assert loss.item() == pytest.approx((1 + 0 + 9 + 4) / 2)
    torch.autograd.backward(loss)
    assert a.grad is not None
    assert torch.equal(a.grad, 2 * (a - v).detach() / 2)
    assert v.grad is None
    assert mimic(a[:0], v[:0], torch.ones(0)).item() == 0


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_imitated_is_the_part_of_the_vector_that_the_pairs_other_tower_gave(
    similarity: str, bias: bool
) -> None:
    model = build(
        (tower(layers=[5]), tower(layers=[5], augment=True)),
        (tower(layers=[4], augment=True), tower(layers=[4], augment=True)),
        similarity=similarity, bias=bias, temperature=0.3,
    )  # fmt: skip
    users, items = world().inputs()
    u, v = model.user_vectors(users), model.item_vectors(items)
    raw = {}
    for side, inputs in (("user", users), ("item", items)):
        parts = [t(inputs)[0] for t in model.towers(side)]  # type: ignore[arg-type]
        scale = torch.cat(parts, 1).norm(dim=1, keepdim=True) if similarity == "cosine" else 1.0
        raw[side] = [p / scale for p in parts]
    ((own, theirs),) = model.augmented("user", users, v)
    assert close(theirs, raw["item"][1])
    assert close(own, not_none(pair_of(model, 1).user.augmented)(users))
    found = model.augmented("item", items, u)
    assert [t.shape[1] for _, t in found] == [5, 4]
    for (own, theirs), expected in zip(found, raw["user"], strict=True):
        assert close(theirs, expected, 1e-4)
        assert own.requires_grad
        assert not theirs.requires_grad


def trainer_of(data: Dataset, weight: float, **sections: Any) -> Trainer:
    loss = {"mimic": weight} | sections.pop("loss", {})
    return Trainer(data, settings(model=dual(width=8, unknown_rate=0.0), loss=loss, **sections))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"negatives": {"random": 3}},
        {"loss": {"kind": "softmax"}},
        {"loss": {"kind": "softmax"}, "negatives": {"uniform": 9, "disliked": 2, "cross_batch_memory": 40}},
        {"loss": {"kind": "gbce"}, "negatives": {"full": True}, "train": {"history_scope": "causal", "batch_size": 64}},
    ],
    ids=["pairs", "random", "in batch", "own and memory", "earlier"],
)
def test_the_loss_adds_the_mimicry_of_the_positives_alone_and_only_the_augmented_feel_it(
    sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = CHECKERBOARD_SCHEMA
    if sections.get("train"):
        history = Sequence(name="seen", side="user", pooling="decay", share_embedding=False)
        schema = schema.model_copy(update={"features": (*schema.features, history)})
    data = build_dataset(check(*checkerboard(), schema), schema, Config().split)
    plain, dat = trainer_of(data, 0.0, **sections), trainer_of(data, 0.5, **sections)
    assert (
        plain.objective.examples(plain.objective.sampler.epoch(0), 0)[2]
        == dat.objective.examples(dat.objective.sampler.epoch(0), 0)[2]
    )
    for t in (plain, dat):
        t.model.train()
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tower_ in (*t.model.towers("user"), *t.model.towers("item")):
                weight = tower_.augmented.table.weight  # type: ignore[union-attr]
                weight.copy_(torch.randn(weight.shape, generator=rng))
    found = []
    for t in (plain, dat):
        if (
            isinstance(t.objective, ContrastiveObjective) and t.recipe.negatives.remembered
        ):  # a batch before, so that there are remembered vectors
            t.step(t.objective.sampler.epoch(0), 1)
            t.model.load_state_dict(plain.model.state_dict())
        epoch = t.objective.sampler.epoch(0)
        t.optimizer.zero_grad()
        t._seed(0)
        _, alone, mimicry = t.objective(epoch, 0, t.progress.step)
        loss = alone + mimicry
        torch.autograd.backward(loss)
        grads = {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}
        found.append((loss.item(), grads))
    epoch = plain.objective.sampler.epoch(0)
    part = plain.objective.examples(epoch, 0)[2]
    user, item = epoch.all.user[part], epoch.all.item[part]
    if isinstance(plain.objective, PointwiseObjective):
        liked = epoch.all.label[part] > 0
        user, item = user[liked], item[liked]
    # The rows as the batch knows them.
    captured: dict[str, Any] = {}

    def capture(*args: Any, weights: Tensor | None = None) -> Tensor:
        captured["args"] = args
        assert weights is None
        return mimic_of(*args)

    mimic_of = dat.objective.mimic_loss
    monkeypatch.setattr(dat.objective, "mimic_loss", capture)
    dat._seed(0)
    with torch.no_grad():
        dat.objective(epoch, 0, dat.progress.step)
    _, _, us, vs, ui, vi, *_ = captured["args"]
    by_row_user, by_row_item = us[ui], vs[vi]
    d, total = 4, 0.0
    mine, theirs = dat.model.towers("user")[0], dat.model.towers("item")[0]
    tables = [t.augmented.table.weight.detach() for t in (mine, theirs)]  # type: ignore[union-attr]
    temperature = float(dat.model.temperature.detach())
    of_users, of_items = dat.objective.users._lookup, dat.objective.items._lookup
    assert of_users is not None
    assert of_items is not None
    for u, i, uv, iv in zip(user, item, by_row_user, by_row_item, strict=True):
        a_u, a_v = tables[0][of_users[u, 0]], tables[1][of_items[i, 0]]
        total += float((a_u - iv[:d]).square().sum() + (a_v - uv[:d] * temperature).square().sum())
    assert found[1][0] - found[0][0] == pytest.approx(0.5 * total / len(user), rel=1e-3)
    for name, gradient in found[0][1].items():
        other = found[1][1][name]
        assert torch.allclose(gradient, other, atol=1e-7) == ("augmented" not in name), name


def test_unknown_ids_read_a_row_that_training_moves() -> None:
    data = build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, Config().split)
    config = settings(model=dual(width=8, unknown_rate=0.3), loss={"mimic": 1.0})
    trainer = Trainer(data, config)
    trainer.run()
    for side in ("user", "item"):
        augmented = trainer.model.towers(side)[0].augmented
        assert augmented is not None
        assert augmented.table.weight[0].abs().max() > 1e-3
        inputs = (trainer.objective.users if side == "user" else trainer.objective.items).take(np.arange(3))
        inputs.lookup[:, augmented.column] = 0
        assert torch.equal(augmented(inputs), augmented.table.weight[:1].expand(3, -1))


def test_mimicry_brings_the_augmented_vectors_near_the_mean_of_what_an_id_likes() -> None:
    data = build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, Config().split)
    cosines = []
    for weight in (0.0, 1.0):
        config = settings(
            model=dual(width=8, unknown_rate=0.0, bias=False), loss={"mimic": weight},
            train={"epochs": 15, "batch_size": 128, "lr": 0.02, "device": "cpu"},
        )  # fmt: skip
        trainer = Trainer(data, config)
        trainer.run()
        factors, pairs = trainer.factors(), data.train
        own = trainer.model.towers("user")[0].augmented.table.weight.detach()  # type: ignore[union-attr]
        liked = [factors.items[pairs.item[pairs.positive & (pairs.user == u)]].mean(0) for u in range(40)]
        lookup = trainer.objective.users._lookup
        assert lookup is not None
        codes = lookup[:, 0]
        cosines.append(float(nn.functional.cosine_similarity(own[codes], torch.stack(liked)).mean()))
    assert cosines[1] > 0.8
    assert abs(cosines[0]) < 0.5, "not by itself"


def test_mimicry_without_a_vector_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tower has them; set augment = true"):
        parse_config({"loss": {"mimic": 1.0}})
    parse_config({"loss": {"mimic": 1.0}, "model": dual()})


# ---- a run with all of it


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_checkerboard_is_solved_through_every_branch(kind: str, precision: str) -> None:
    features = (*CHECKERBOARD_SCHEMA.features, Categorical(name="again", column="user_id", side="user"),
                Categorical(name="again", column="item_id", side="item"))  # fmt: skip
    schema = CHECKERBOARD_SCHEMA.model_copy(update={"features": features})
    data = build_dataset(check(*checkerboard(), schema), schema, Config().split)
    side = {"layers": [8], "branches": [branch(kind, **({"widths": [8, 8]} if kind == "cin" else {}))]}
    config = settings(
        model={"width": 8, "pairs": [{"user": side, "item": side}]},
        train={"epochs": 15, "batch_size": 64, "lr": 0.03, "precision": precision, "validate_every": 5},
    )
    found = [h["validation.auc"] for h in Trainer(data, config).run().history if "validation.auc" in h]
    assert max(found) > 0.97, found


def test_the_training_loss_that_is_reported_is_without_the_mimicry() -> None:
    data = build_dataset(check(*checkerboard(), CHECKERBOARD_SCHEMA), CHECKERBOARD_SCHEMA, Config().split)
    found = {}
    for weight in (0.0, 5.0):
        trainer = Trainer(data, settings(model=dual(width=8), loss={"mimic": weight}, train={"epochs": 1, "lr": 1e-6}))
        found[weight] = trainer.run().history[0]
    # Steps this small move nothing, so that the two differ by what is counted alone.
    assert found[5.0]["train.loss"] == pytest.approx(found[0.0]["train.loss"], rel=1e-3)
    assert found[5.0]["train.mimic"] > 0.1
    assert "train.mimic" not in found[0.0]


@pytest.mark.parametrize("branch", [{"kind": "cin", "widths": [4, 1]}, {"kind": "fm"}])
def test_a_branch_whose_norm_would_say_nothing_is_refused(branch: dict[str, Any]) -> None:
    data = build_dataset(check(*everything(), EVERYTHING_SCHEMA), EVERYTHING_SCHEMA, Config().split)
    user = {"layers": [4], "fields": ["uid", "city"], "branches": [branch]}
    width = 1 if branch["kind"] == "fm" else 8
    model = settings(model={"width": width, "pairs": [{"user": user, "item": {"layers": [4]}}]}).model
    with pytest.raises(ConfigError, match="an output of width 1"):
        TwoTower(model, data.encoders.fields("user"), data.encoders.fields("item"))
