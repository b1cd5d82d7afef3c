"""What the documentation says a user must be permitted, and all that he can do with it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import attrs

import redisflow
from redisflow import StepObservation
from tests.support.pages import ROOT, commands_of
from tests.support.subjects import WHO

# What an engine hears of new timers by.
LISTENING = ("&{redisflow:*", "+subscribe", "+publish")
DOCTORS = {"+scan", "+zscan", "+type", "+memory|usage"}  # nothing else uses them


def _rules() -> list[list[str]]:
    """The rules of docs/backends.md for the user `flows`, as arguments of ACL SETUSER behind the name."""
    commands = commands_of(ROOT / "docs/backends.md", "redis-cli")
    return [words[3:] for words in commands if words[:3] == ["ACL", "SETUSER", "flows"]]


def permissions() -> list[str]:
    """What he needs on any server."""
    rule, _, _ = _rules()
    return rule


def for_durability() -> list[str]:
    """What he needs to wait for replicas."""
    _, rule, _ = _rules()
    return rule


def for_clusters() -> list[str]:
    """What he needs on the nodes of a cluster."""
    _, _, rule = _rules()
    return rule


def for_sentinels() -> list[str]:
    """What a user of Sentinels' own needs there."""
    commands = commands_of(ROOT / "docs/backends.md", "redis-cli")
    (rule,) = (words[5:] for words in commands if words[:5] == ["-p", "26379", "ACL", "SETUSER", "finder"])
    return rule


def make_flow(flows: Any) -> redisflow.Flow:
    """Make a running flow."""
    flow: redisflow.Flow = flows.create_mirrored(**WHO, state={"order": 1009, "tmp": 1})
    return flow


def exercise(flows: Any, engine: Any) -> None:
    """Do everything the library does, with a manager and an engine of one shell."""
    flow = flows.update_state(make_flow(flows), {"x": []}, increment={"order": 2}, unset=["tmp"])
    for patch in ("whole", {"k": 1}, ["whole"], {"k": 1}):
        flow = flows.update_state(flow.id, patch)
    flow = flows.set_waiting(flow, redisflow.ExternalEvent("t", "1", deadline=flow.created_at + timedelta(days=1)))
    assert engine.tick().still_waiting == 1
    (flow,) = engine.resume_waiters("t", "1")
    flow = flows.mutate(flow, lambda current: attrs.evolve(current, current_step="next"), kind="moved")
    flows.append_event(flow, "note", op_id="00" * 16)
    flows.record_step_observation(StepObservation(flow.id, "run", "task", "running"))
    assert flows.list_steps(flow) == [flows.find_step_by_run_id(flow, "run")]
    assert list(flows.iter_events(flow))[::-1] == flows.list_events(flow)
    assert flows.get_many([flow.id]) == [flow]
    assert flows.list_by_owner(flow.owner_session_key) == flows.list_by_status("running") == [flow]
    assert sum(flows.count_by_status().values()) == 1
    assert list(flows.watch(flow, timeout=0.02)) == []
    view = flows.for_owner(flow.owner_session_key)
    assert view.list_by_status("running") == [view.get(flow)] == [flow]
    assert view.count_by_status() == flows.count_by_status()
    flow = flows.set_waiting(flow, redisflow.Manual(deadline=flow.created_at))
    flow = flows.request_cancel(flow)
    assert engine.tick().cancelled == 1
    assert flows.wait_for(flow, timeout=1).status == "cancelled"
    assert flows.prune_terminal_flows(timedelta(0)) == 1
    assert flows.delete(make_flow(flows))
    flows.doctor(repair=True)
