"""Hosts of a Ray: the head that is silent for a while, and the hosts that are lost."""

from __future__ import annotations

import socket
from threading import Event

import pytest
from ray_worlds import address_of, imported_ray

from twotower.engines.ray_hosts import LEFT, NODE, Head, Hosts, ask, elsewhere


class Nodes:
    """Stands for the hosts of a Ray: a set of those that take connections, and one of those that Ray has taken for lost."""

    gcs_address = "head:6379"

    def __init__(self, *names: str) -> None:
        self.names, self.on, self.dead, self.asked = names, {*names, "head"}, set[str](), list[str]()
        self.head = "head"

    def nodes(self) -> list[dict[str, object]]:
        return [
            {
                "NodeID": name,
                "Alive": name not in self.dead,
                "NodeManagerAddress": name,
                "NodeManagerPort": 7,
                "Resources": {} if name == self.head else {"CPU": 1.0},
            }
            for name in self.names
        ]

    def connect(self, address: str, seconds: float) -> None:
        self.asked.append(address)
        if address.partition(":")[0] not in self.on:
            raise OSError("no route")

    def get_runtime_context(self) -> Nodes:
        return self


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    found, ray = Nodes("a", "b", "c"), imported_ray()
    for name in ("nodes", "get_runtime_context"):
        monkeypatch.setattr(ray, name, getattr(found, name))
    monkeypatch.setattr("twotower.engines.ray_hosts.connect", found.connect)
    return found


def test_a_host_that_is_silent_is_lost_once_until_it_answers(nodes: Nodes) -> None:
    hosts = Hosts(0.0)
    assert hosts.look() == []
    nodes.on -= {"b"}
    assert (hosts.look(), hosts.silent) == (["b:7"], frozenset("b"))
    assert (hosts.look(), hosts.silent) == ([], frozenset("b"))
    nodes.dead |= {"b"}  # Ray knows later
    assert (hosts.look(), hosts.silent) == ([], frozenset("b"))


def test_a_host_that_comes_back_may_be_lost_again(nodes: Nodes) -> None:
    """And another is none that was lost before."""
    hosts = Hosts(0.0)
    nodes.on -= {"a"}
    assert hosts.look() == ["a:7"]
    nodes.on = {"head", "a", "c"}
    assert (hosts.look(), hosts.silent) == (["b:7"], frozenset("b"))
    nodes.dead |= {"a"}
    assert (hosts.look(), hosts.silent) == (["a:7"], frozenset("b"))


def test_a_process_to_which_all_hosts_are_silent_has_lost_none(nodes: Nodes) -> None:
    """It is cut off, or may open no connection. The head alone makes no shard."""
    hosts = Hosts(0.0)
    nodes.head = "a"
    nodes.on = {"head", "a"}
    assert (hosts.look(), hosts.silent) == ([], frozenset())
    nodes.head = ""
    assert (hosts.look(), hosts.silent) == (["b:7", "c:7"], frozenset("bc"))


def test_where_the_head_is_silent_ray_is_asked_nothing(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not answer."""
    hosts = Hosts(0.0)
    nodes.on -= {"head"}
    monkeypatch.setattr(imported_ray(), "nodes", lambda: pytest.fail("Ray is asked"))
    assert hosts.look() == []
    assert nodes.asked == ["head:6379"]


def test_a_host_that_leaves_while_it_is_connected_to_is_none_that_is_lost(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = Hosts(0.0)
    nodes.on -= {"b"}
    known = iter([nodes.nodes(), nodes.nodes()[::2]])
    monkeypatch.setattr(imported_ray(), "nodes", lambda: next(known))
    assert (hosts.look(), hosts.silent) == ([], frozenset())


def test_a_look_after_another_asks_nobody(nodes: Nodes) -> None:
    hosts = Hosts(3600.0)
    nodes.dead |= {"a"}
    assert hosts.look() == []
    assert not nodes.asked


def test_hosts_that_were_lost_before_are_none_that_are_lost(nodes: Nodes) -> None:
    nodes.dead |= {"a"}
    assert Hosts(0.0).look() == []
    assert {*nodes.asked} == {"head:6379", "b:7", "c:7"}


def test_by_the_client_of_ray_no_host_is_connected_to(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may reach the head alone, so what Ray says is what it knows."""
    monkeypatch.setattr(imported_ray().util.client.ray, "is_connected", lambda: True)
    nodes.on.clear()
    hosts = Hosts(0.0)
    assert hosts.look() == []
    nodes.dead |= {"a"}
    assert (hosts.look(), hosts.silent, nodes.asked) == (["a:7"], frozenset(), [])


def test_the_selector_of_other_hosts_is_one_of_the_installed_ray() -> None:
    ray = imported_ray()
    from ray._private.label_utils import validate_label_selector

    assert ray._raylet.RAY_NODE_ID_KEY == NODE
    assert elsewhere(frozenset()) is None
    ids = frozenset(f"{n:056x}" for n in range(50))
    for some in (frozenset(["a"]), ids):
        assert validate_label_selector(elsewhere(some)) is None


def test_reasons_of_a_death_are_those_of_the_installed_ray() -> None:
    imported_ray()
    from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]

    assert {NodeDeathInfo.EXPECTED_TERMINATION, NodeDeathInfo.AUTOSCALER_DRAIN_IDLE} == LEFT


def test_a_head_that_comes_back_is_waited_for(held: socket.socket) -> None:
    hasty, patient = Head(address_of(held), 0.0), Head(address_of(held), 3600.0)
    with pytest.raises(ConnectionError, match=rf"its head, {address_of(held)}, is silent for 0 seconds: .*refused"):
        hasty.look()
    patient.every = 0.0
    patient.look()
    assert not patient.answers
    held.listen()
    for head in (patient, hasty):
        head.look()
        assert head.answers


def test_a_head_that_is_lost_while_it_is_asked_gives_no_answer() -> None:
    never = Event()
    try:
        with pytest.raises(ConnectionError, match=r"its head gives no answer within 0\.1 seconds"):
            ask(never.wait, 0.1)
    finally:
        never.set()
    assert ask(lambda: 7) == 7
    with pytest.raises(ValueError, match="odd"):
        ask(lambda: int("odd"))
