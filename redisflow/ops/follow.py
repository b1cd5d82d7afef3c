"""Watching a flow and waiting for it, by blocking reads of its event stream."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

from redisflow.calls import Block, Command, Read, command
from redisflow.codec import StoredFlow, read_event, read_flow
from redisflow.errors import AlreadyTerminal, FlowNotFound
from redisflow.flow import TERMINAL, Flow, FlowEvent, FlowRef, FlowStatus
from redisflow.ops.namespace import Namespace, Target, flow_id_of, if_own, partition_of, seconds_of, status_of
from redisflow.ops.reads import hgetall
from redisflow.ops.records import EVENTS_PAGE, require_event_id

_FOREVER_S = float("inf")


class Watch:
    """The events of a flow as they happen, until the one that ends it or the timeout."""

    def __init__(self, namespace: Namespace, flow_id: FlowRef, after: str | None, timeout: float | None) -> None:
        """Check the inputs; `after=None` is from now on, `timeout` seconds."""
        self._namespace = namespace
        self._target = Target.at(flow_id_of(flow_id))
        self._after = None if after is None else require_event_id(after)
        timeout_s = seconds_of("timeout", timeout)
        self._until_s = _FOREVER_S if timeout_s is None else time.monotonic() + timeout_s
        self._done = self._ended = False

    def next_page(self) -> Generator[Read | Block, Any, list[FlowEvent] | None]:
        """The next events, waiting for them; `None` at the end."""
        namespace, target = self._namespace, self._target
        partition = partition_of(namespace, target)
        flow_key, stream = partition.flow(target.member), partition.events(target.member)
        if self._after is None:
            # Resolved to an id once: "from now" asked again after a lost connection would skip what came between.
            (last,) = yield Read([_last_entry(namespace, target)])
            self._after = last[0][0] if last else b"0-0"
        status_now = if_own(namespace, target, command(partition, b"HMGET", flow_key, b"status", b"revision"))
        while not self._done:
            # Status before events: when it says ended, the event that ended it is already in the stream. While a slot
            # moves to another node they may be read in the other order, and it is there the next time.
            behind = command(partition, b"XRANGE", stream, b"(" + self._after, b"+", b"COUNT", EVENTS_PAGE)
            (status, revision), entries = yield Read([status_now, if_own(namespace, target, behind)])
            if status is None or revision is None:
                raise FlowNotFound(target.flow_id)
            flow = StoredFlow(target.flow_id, target.member, {b"status": status, b"revision": revision})
            events = [read_event(target.flow_id, entry) for entry in entries]
            if flow.read("status").is_terminal:
                ended_by = next((n for n, event in enumerate(events) if event.revision == flow.revision), None)
                self._done = ended_by is not None or (self._ended and len(events) < EVENTS_PAGE)
                self._ended = True
                events = events[: None if ended_by is None else ended_by + 1]
            if events:
                self._after = events[-1].id.encode()
                return events
            left_s = self._until_s - time.monotonic()
            if left_s <= 0:
                self._done = True
            elif not self._done and not self._ended:
                yield Block(partition.slot, stream, self._after, left_s)
        return None


def wait_for(
    namespace: Namespace, flow_id: FlowRef, statuses: tuple[FlowStatus | str, ...], timeout: float | None
) -> Generator[Read | Block, Any, Flow]:
    """Wait until the flow is in one of `statuses`; by default, until it has ended."""
    target = Target.at(flow_id_of(flow_id))
    wanted = {status_of(status) for status in statuses} or set(TERMINAL)
    timeout_s = seconds_of("timeout", timeout)
    until_s = _FOREVER_S if timeout_s is None else time.monotonic() + timeout_s
    partition = partition_of(namespace, target)
    stream = partition.events(target.member)
    seen: Any = None
    while True:
        # The last event before the flow: a change after the flow was read comes after that event too. While a slot
        # moves to another node they may be read in the other order; then the event is of a later revision.
        last, flat = yield Read([_last_entry(namespace, target), hgetall(namespace, target)])
        flow = read_flow(target.flow_id, flat)
        if flow is None:
            raise FlowNotFound(target.flow_id)
        if flow.status in wanted:
            return flow
        if last and last != seen and read_event(target.flow_id, last[0]).revision > flow.revision:
            seen = last
            continue
        if flow.status.is_terminal:
            raise AlreadyTerminal(target.flow_id, flow.status)
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            names = ", ".join(sorted(wanted))
            raise TimeoutError(f"flow {target.flow_id} is {flow.status} after {timeout_s} s, not {names}")
        yield Block(partition.slot, stream, last[0][0] if last else b"0-0", left_s)


def _last_entry(namespace: Namespace, target: Target) -> Command:
    partition = partition_of(namespace, target)
    last = command(partition, b"XREVRANGE", partition.events(target.member), b"+", b"-", b"COUNT", 1)
    return if_own(namespace, target, last)
