"""Deferred tables take no memory, and change no other draw."""

from __future__ import annotations

import torch
from model_worlds import build, pair_of, world

from twotower.model.tables import Table, blank_tables, deferred_tables, named_tables
from twotower.model.two_tower import TwoTower


def test_a_model_with_deferred_tables_has_the_other_weights_and_the_initial_rows_of_whole_tables() -> None:
    config, (users, items) = build().config, (world().users.fields, world().items.fields)
    torch.manual_seed(7)
    whole = TwoTower(config, users, items)
    after = torch.rand(3)
    torch.manual_seed(7)
    with deferred_tables():
        deferred = TwoTower(config, users, items)
    assert torch.equal(torch.rand(3), after)
    tables = dict(named_tables(deferred))
    assert all(table.weight.is_meta for table in tables.values())
    for name, parameter in deferred.named_parameters():
        assert name.removesuffix(".weight") in tables or torch.equal(parameter, whole.get_parameter(name)), name
    for name, table in named_tables(whole):
        drawn = [rows for _, rows in tables[name].initial_rows(block=64)]
        assert torch.equal(torch.cat(drawn) if drawn else torch.zeros_like(table.weight), table.weight), name


def test_blank_tables_draw_nothing_and_take_the_weights_that_are_loaded() -> None:
    config, (users, items) = build().config, (world().users.fields, world().items.fields)
    whole = build().eval()
    state = torch.get_rng_state()
    with blank_tables():
        table = Table(1000, 8)
        table.initialize(std=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    with blank_tables():
        loaded = TwoTower(config, users, items).eval()
    loaded.load_state_dict(whole.state_dict())
    assert torch.equal(loaded.user_vectors(world().inputs()[0]), whole.user_vectors(world().inputs()[0]))


def test_a_table_put_in_place_of_another_is_read_by_both_towers() -> None:
    model = build()
    users, items = world().inputs()
    before = model.user_vectors(users), model.item_vectors(items)
    of_item = pair_of(model).item.embeddings.tables
    name = of_item.place["iid"].table
    model.set_submodule(
        f"pairs.0.item.embeddings.tables.{name}",
        Table(of_item.table(name).num_embeddings, of_item.table(name).embedding_dim),
    )
    assert not torch.equal(model.user_vectors(users), before[0]), "through the shared history"
    assert not torch.equal(model.item_vectors(items), before[1])
