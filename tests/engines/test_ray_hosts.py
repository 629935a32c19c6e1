"""Hosts of a Ray: the head that is silent for a while, and the hosts that are lost."""

from __future__ import annotations

import socket

import pytest
from ray_worlds import address_of, imported_ray

from twotower.engines.ray_hosts import LEFT, Head


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
