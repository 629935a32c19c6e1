"""The admin port (row D9 of the faults)."""

from __future__ import annotations

from pathlib import Path

from service_client import Make, bearer, problem

from twotower.store.store import Store


def test_fault_D9_administration_is_elsewhere_and_needs_its_scope(
    make: Make, key_file: tuple[Path, str, str], store: Path
) -> None:
    file, key, boss = key_file
    client, admin = make(keys=file), make(keys=file, admin=True)
    for path in ("/v1/rollback", "/v1/reload"):
        problem(client.post(path, {}, headers=bearer(boss)), "not-found")
        problem(admin.post(path, {}), "unauthorized")
        problem(admin.post(path, {}, headers=bearer(key)), "key-scope")
    first, second = (b.id for b in Store(store).bundles())
    reply = admin.post("/v1/rollback", {"to": first, "reason": "a test"}, headers=bearer(boss))
    assert reply.json() == {"current": first, "serving": first}
    listed = admin.get("/v1/bundles", headers=bearer(boss)).json()
    assert [b["id"] for b in listed["bundles"] if b["current"]] == [first]
    assert listed["history"][-1]["reason"] == "a test"
    Store(store).rollback(first, reason="caf\udce9")
    assert admin.get("/v1/bundles", headers=bearer(boss)).json()["history"][-1]["reason"] == "caf?"
    assert admin.post("/v1/rollback", {"to": second}, headers=bearer(boss)).json()["serving"] == second
    problem(admin.post("/v1/rollback", {"to": "none"}, headers=bearer(boss)), "conflict")
    assert admin.post("/v1/reload", {}, headers=bearer(boss)).json() == {"serving": second, "refused": ""}
    told = problem(admin.post("/v1/rollback", {"to": "none"}, headers=bearer(boss)), "conflict")
    assert str(store) not in told["detail"]
