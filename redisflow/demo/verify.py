"""The verification: what the flows, their audit trails, the indexes and a recount must agree on."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs

from redisflow.demo.plan import OWNER, Route
from redisflow.demo.sources import COUNTERS
from redisflow.engine import WaitEngine
from redisflow.flow import FlowStatus, FlowStepStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from uuid import UUID

    from redisflow.flow import Flow, FlowEvent
    from redisflow.manager import FlowManager

# Entries of an audit trail that change no flow and so make no revision.
_NO_REVISION = {"step_observed"}
_LEADS_TO = {
    "created": FlowStatus.CREATED,
    "started": FlowStatus.RUNNING,
    "waiting": FlowStatus.WAITING,
    "resumed": FlowStatus.RUNNING,
    "finished": FlowStatus.FINISHED,
    "failed": FlowStatus.FAILED,
    "cancelled": FlowStatus.CANCELLED,
}


@attrs.frozen
class Outcome:
    """Everything the verification looks at, read once.

    Attributes:
        flows: the flows by id; a flow that is gone is missing.
        trails: the whole audit trail of each, oldest first.
        recount: what one process counted without flows: by path, the counts or why there are none.
    """

    flows: dict[UUID, Flow]
    trails: dict[UUID, list[FlowEvent]]
    recount: Mapping[str, dict[str, int] | str]

    @classmethod
    def read(cls, flows: FlowManager, ids: Sequence[UUID], recount: Mapping[str, dict[str, int] | str]) -> Outcome:
        """Read the flows and their trails."""
        stored = {flow.id: flow for flow in flows.get_many(ids) if flow is not None}
        return cls(stored, {flow_id: list(flows.iter_events(flow_id)) for flow_id in stored}, recount)

    @property
    def n_events(self) -> int:
        """How many audit entries there are."""
        return sum(len(trail) for trail in self.trails.values())

    def ended_as(self, status: FlowStatus) -> list[Flow]:
        """The flows in `status`."""
        return [flow for flow in self.flows.values() if flow.status is status]

    def totals(self) -> dict[str, int]:
        """Every counter, summed over the finished flows."""
        finished = self.ended_as(FlowStatus.FINISHED)
        return {counter: sum(flow.state[counter] for flow in finished) for counter in COUNTERS}

    def takeovers(self, worker: str | None = None) -> int:
        """How often a flow changed hands, from `worker` or from any."""
        patches = (patch_of(event) for trail in self.trails.values() for event in trail)
        return sum("taken_from" in patch and worker in (None, patch["taken_from"]) for patch in patches)

    def resumed(self, route: Route) -> int:
        """How often a wait of `route` was over."""
        return sum(
            event.kind == "resumed"
            for flow_id, trail in self.trails.items()
            for event in trail
            if self.flows[flow_id].state["route"] == route
        )


def patch_of(event: FlowEvent) -> Mapping[str, Any]:
    """The state patch a `state_updated` event records."""
    patch = event.payload.get("patch") if event.kind == "state_updated" else None
    return patch or {}


def verify(flows: FlowManager, ids: Sequence[UUID], outcome: Outcome, victim: str | None) -> list[str]:
    """Return what is off, in words; nothing if all is well."""
    return [
        *check_flows(ids, outcome, victim),
        *check_totals(outcome),
        *(
            problem
            for flow_id, trail in outcome.trails.items()
            for problem in check_trail(outcome.flows[flow_id], trail)
        ),
        *check_indexes(flows, outcome.flows.values()),
        *check_steps(flows, outcome),
        *check_nothing_is_due(flows),
    ]


def check_flows(ids: Iterable[UUID], outcome: Outcome, victim: str | None) -> Iterator[str]:
    """Every flow is there and ended as it had to; the killed worker's flows were taken over."""
    yield from (f"flow {flow_id} is gone" for flow_id in ids if flow_id not in outcome.flows)
    for flow in outcome.flows.values():
        parses = isinstance(outcome.recount.get(flow.state["path"]), dict)
        if not flow.status.is_terminal:
            yield f"flow {flow.id} is still {flow.status}"
        elif flow.cancel_requested != (flow.status is FlowStatus.CANCELLED):
            asked = "requested" if flow.cancel_requested else "not requested"
            yield f"flow {flow.id} is {flow.status}, its cancel was {asked}"
        elif flow.status is FlowStatus.FINISHED and not parses:
            yield f"flow {flow.id} finished on {flow.state['path']}, which cannot be counted"
        elif flow.status is FlowStatus.FAILED and parses:
            yield f"flow {flow.id} failed on {flow.state['path']}: {flow.state['failure']['reason']}"
    if victim is None:
        yield "no worker was killed"
    elif outcome.takeovers(victim) == 0:
        yield f"no flow of {victim} was taken over"


def check_totals(outcome: Outcome) -> Iterator[str]:
    """What the finished flows counted is what one process counts."""
    recounted: Counter[str] = Counter()
    for flow in outcome.ended_as(FlowStatus.FINISHED):
        counts = outcome.recount.get(flow.state["path"])
        if not isinstance(counts, dict):
            continue  # said above
        recounted.update(counts)
        counted = {counter: flow.state[counter] for counter in COUNTERS}
        if counted != counts:
            yield f"flow {flow.id} counted {counted} in {flow.state['path']}, the recount {counts}"
    for counter, total in outcome.totals().items():
        if total != recounted[counter]:
            yield f"the finished flows have {total} {counter}, the recount {recounted[counter]}"


def check_trail(flow: Flow, trail: Iterable[FlowEvent]) -> Iterator[str]:
    """A trail has each revision once and in order, no operation twice, and ends where the flow stands."""
    due = 0
    status = None
    operations: set[str] = set()
    for event in trail:
        makes_revision = event.kind not in _NO_REVISION
        wanted = due if makes_revision else due - 1
        if event.revision != wanted:
            yield f"flow {flow.id} has {event.kind} at revision {event.revision} where {wanted} belongs"
        if event.op_id in operations:
            yield f"flow {flow.id} has operation {event.op_id} twice, the second time as {event.kind}"
        operations.add(event.op_id)
        if makes_revision:
            due = event.revision + 1
        status = _LEADS_TO.get(event.kind, status)
    if due != flow.revision + 1:
        yield f"flow {flow.id} is at revision {flow.revision}, its trail ends at {due - 1}"
    if status != flow.status:
        yield f"flow {flow.id} is {flow.status}, its trail leads to {status}"


def check_indexes(flows: FlowManager, stored: Iterable[Flow]) -> Iterator[str]:
    """Each index holds just the flows whose hashes say so."""
    by_status: dict[FlowStatus, set[UUID]] = {status: set() for status in FlowStatus}
    for flow in stored:
        by_status[flow.status].add(flow.id)
    counts = flows.count_by_status()
    for status, ids in by_status.items():
        yield from _difference(f"status {status}", {flow.id for flow in flows.iter_by_status(status)}, ids)
        if counts[status] != len(ids):
            yield f"the index of status {status} counts {counts[status]} flows, there are {len(ids)}"
    owned = {flow.id for flow in flows.iter_by_owner(OWNER)}
    yield from _difference(f"owner {OWNER}", owned, set().union(*by_status.values()))


def _difference(index: str, listed: set[UUID], stored: set[UUID]) -> Iterator[str]:
    yield from (f"flow {flow_id} is missing from the index of {index}" for flow_id in stored - listed)
    yield from (f"flow {flow_id} does not belong in the index of {index}" for flow_id in listed - stored)


def check_steps(flows: FlowManager, outcome: Outcome) -> Iterator[str]:
    """Every reviewed file that was counted has its review on record, once."""
    for flow in outcome.ended_as(FlowStatus.FINISHED):
        if flow.state["route"] == Route.REVIEW:
            reviews = [step.status for step in flows.list_steps(flow.id)]
            if reviews != [FlowStepStatus.SUCCEEDED]:
                yield f"flow {flow.id} has reviews {[str(review) for review in reviews]}, not one that succeeded"


def check_nothing_is_due(flows: FlowManager) -> Iterator[str]:
    """An engine finds nothing left to look at."""
    report = WaitEngine(flows).tick()
    if report.scanned:
        yield f"an engine still finds {report.scanned} flows due"
