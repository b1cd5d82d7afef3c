"""`event_maxlen` bounds the trail of a long-lived flow, and nothing else of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import contains
from typing import Any

import attrs
import pytest

from redisflow import Flow, FlowStatus
from redisflow.scripts import UNTRIMMED, Appending
from tests.support.subjects import BACKENDS, Subject, create, flow_in, observed
from tests.support.waiting import wait_until

BLOCK = 100  # entries the servers drop at once, at most


def events_key(subject: Subject, flow: Flow) -> bytes:
    """The stream of a flow."""
    return subject.keyspace.partition_of(flow.id).events(str(flow.id).encode())


def append_raw(subject: Subject, flow: Flow, count: int) -> None:
    """Lengthen a trail behind the library's back."""
    pipe = subject.raw.pipeline(transaction=False)
    for _ in range(count):
        pipe.xadd(events_key(subject, flow), {"rev": 1, "kind": "old", "op": "0" * 32, "payload": b"\x80"})
    pipe.execute()


ADDING: dict[str, Callable[[Any, Flow, int], object]] = {
    "update_state": lambda flows, flow, n: flows.update_state(flow.id, {"n": n}),
    "update_state, the copy current": lambda flows, flow, n: flows.update_state(flows.get(flow.id), {"n": n}),
    "mutate": lambda flows, flow, n: flows.mutate(flow.id, lambda f: attrs.evolve(f, state={"n": n}), kind="moved"),
    "append_event": lambda flows, flow, n: flows.append_event(flow, "note", {"n": n}),
    "record_step_observation": lambda flows, flow, n: flows.record_step_observation(observed(flow.id, f"run-{n}")),
}


@pytest.mark.parametrize("name", ADDING)
def test_whatever_adds_an_event_bounds_the_trail(subject: Subject, name: str) -> None:
    """At least so many of the newest are kept, and at most a block more; in order, and the last one is the last."""
    flows = subject.manager(event_maxlen=100)
    flow = flow_in(flows, "running")
    append_raw(subject, flow, 300)
    old = kept = list(flows.iter_events(flow))
    for n in range(BLOCK + 20):
        ADDING[name](flows, flow, n)
        kept = list(flows.iter_events(flow))
        assert 100 <= len(kept) <= 100 + BLOCK
    assert [event.id for event in kept] == sorted({event.id for event in kept}, key=read_id)
    assert not {event.id for event in old} & {event.id for event in kept[-BLOCK - 20 :]}
    assert list(reversed(kept)) == flows.list_events(flow, limit=None)


def read_id(event_id: str) -> tuple[int, ...]:
    """An id as its two numbers."""
    return tuple(map(int, event_id.split("-")))


def test_the_flow_itself_is_not_touched(subject: Subject) -> None:
    """Revision, state, steps and indexes are those of a flow whose trail is whole."""
    flows = subject.manager(event_maxlen=100)
    flow = flow_in(flows, "running")
    flows.record_step_observation(observed(flow.id))
    for n in range(400):
        flow = flows.update_state(flow, {"last": n}, increment={"sum": n})
    assert flow == flows.get(flow.id)
    assert (flow.revision, flow.state["sum"], flow.state["last"]) == (401, sum(range(400)), 399)
    assert [step.run_id for step in flows.list_steps(flow)] == ["cron-42"]
    kept = list(flows.iter_events(flow))
    assert [event.revision for event in kept] == list(range(402 - len(kept), 402))
    assert flows.finish(flow).status is FlowStatus.FINISHED
    assert flows.count_by_status()[FlowStatus.FINISHED] == 1
    assert flows.delete(flow)
    assert subject.only_tombstones_of(flow.id)


def test_a_trail_below_the_bound_is_whole(subject: Subject) -> None:
    """From the creation on."""
    flows = subject.manager(event_maxlen=100)
    flow = flow_in(flows, "running")
    for n in range(98):
        flow = flows.update_state(flow, {"n": n})
    assert [event.revision for event in flows.iter_events(flow)] == list(range(100))


def test_managers_with_and_without_it_share_a_namespace(subject: Subject) -> None:
    """Each trims what it adds to, or does not; all see the same."""
    bounded, wider, unbounded = subject.manager(event_maxlen=100), subject.manager(event_maxlen=250), subject.manager()
    flow = flow_in(unbounded, "running")
    lengths = []
    for flows, count in ((unbounded, 600), (wider, 1), (unbounded, 50), (bounded, 1), (unbounded, 300)):
        for n in range(count):
            flow = flows.update_state(flow, {"n": n})
        lengths.append(len(unbounded.list_events(flow, limit=None)))
        assert bounded.get(flow.id) == unbounded.get(flow.id) == flow
    assert lengths[0] == 602
    assert 250 <= lengths[1] <= 250 + BLOCK
    assert lengths[2] == lengths[1] + 50
    assert 100 <= lengths[3] <= 100 + BLOCK
    assert lengths[4] == lengths[3] + 300


def test_reading_goes_on_over_what_is_gone(subject: Subject) -> None:
    """`iter_events` and `watch` behind an event that was trimmed yield the oldest kept and all later ones."""
    flows = subject.manager(event_maxlen=100)
    flow = flow_in(flows, "running")
    first = flows.list_events(flow)[-1]
    for n in range(300):
        flow = flows.update_state(flow, {"n": n})
    flow = flows.finish(flow)
    kept = list(flows.iter_events(flow))
    assert first not in kept
    assert list(flows.iter_events(flow, after=first.id)) == kept
    assert list(flows.watch(flow, after=first.id, timeout=5)) == kept
    assert list(flows.watch(flow, after="0-0", timeout=5)) == kept
    assert flows.wait_for(flow, timeout=5) == flow


def test_a_follower_keeps_up_with_a_trail_that_is_trimmed(subject: Subject) -> None:
    """It gets each event once, in order, and the last, though those it has seen go."""
    flows, follower = subject.manager(event_maxlen=100), subject.manager()
    flow = flow_in(flows, "running")
    seen: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(
            lambda: seen.extend(event.revision for event in follower.watch(flow.id, after="0-0", timeout=30))
        )
        for n in range(2, 302):
            flows.update_state(flow.id, {"n": n})
            if n % 50 == 0:
                wait_until(partial(contains, seen, n), description="the follower to be there")
        flows.finish(flow.id)
        following.result()
    assert seen == list(range(303))


# Of the servers alone: fakeredis trims all at once.
@pytest.mark.parametrize(
    "subject",
    [f"{name}-{shell}" for name, engine in BACKENDS.items() if engine is not None for shell in ("sync", "asyncio")],
    indirect=True,
)
def test_a_trail_that_was_long_before_gets_shorter_bit_by_bit(subject: Subject) -> None:
    """No change has to wait until all that is too much is gone: 10,000 at a time."""
    flows = subject.manager(event_maxlen=100)
    flow = flow_in(flows, "running")
    append_raw(subject, flow, 25_000)
    lengths = []
    for n in range(3):
        flow = flows.update_state(flow, {"n": n})
        lengths.append(subject.raw.xlen(events_key(subject, flow)))
    assert 15_000 <= lengths[0] < 15_200
    assert 5_000 <= lengths[1] < 5_400
    assert 100 <= lengths[2] <= 100 + BLOCK


def test_the_largest_bound_is_one_that_the_server_takes(subject: Subject) -> None:
    """Or an event would be refused after its change was written."""
    flows = subject.manager(event_maxlen=2**63 - 1)
    flow = flows.finish(flow_in(flows, "running"))
    flows.append_event(flow, "note")
    flows.record_step_observation(observed(flow.id))
    assert len(flows.list_events(flow)) == 5


def test_a_new_flow_is_not_trimmed(subject: Subject) -> None:
    """A creation has one event or two."""
    flows = subject.manager(event_maxlen=100)
    assert [event.kind for event in flows.iter_events(create(flows))] == ["created"]


def test_managers_with_the_same_bound_share_their_scripts() -> None:
    """They are loaded once, and what no bound needs is not in them."""
    assert Appending.keeping(100) is Appending.keeping(100)
    assert Appending.keeping(None) is UNTRIMMED
    assert Appending.keeping(100).append_event.source.sha != Appending.keeping(101).append_event.source.sha
