"""Lives of flows, prepared: each change as the library's own script call, and as the plain writes it amounts to."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Any, cast
from uuid import UUID, uuid4

import attrs

from benchmarks.measure import Command
from redisflow import Flow, FlowManager, Timer, codec
from redisflow.calls import Packet
from redisflow.codec import StoredFlow
from redisflow.delivery import Policy, deliver
from redisflow.keys import DEFAULT_PARTITIONS
from redisflow.ops import changes
from redisflow.ops.namespace import Namespace
from redisflow.waits import to_us, wire_form

Fields = Mapping[bytes, bytes]

_TIMER = Timer(at=datetime(2100, 1, 1, tzinfo=UTC))
_FIRST = {"processed": 3, "last_message": "inbox/2026/17", "errors": ["timeout"]}
_LATER = {"processed": 7, "last_message": "inbox/2026/21", "errors": []}
_APPROVED = {"approved": True}
_FINAL = {"summary": "10 messages, 1 error"}
_VERB: dict[str, Any] = {"expected_revision": None, "op_id": None}
_UPDATE: dict[str, Any] = _VERB | {"next_step": None, "increment": None, "unset": ()}

Operation = Callable[[Namespace, Flow], Generator[Any, Any, Flow]]
# Each verb of a life: its name, its operation, the event it leaves.
LIFE: list[tuple[str, Operation, str, dict[str, Any]]] = [
    ("start_running", lambda ns, flow: changes.start_running(ns, flow, **_VERB), "started", {}),
    (
        "update_state",
        lambda ns, flow: changes.update_state(ns, flow, _FIRST, **_UPDATE),
        "state_updated",
        {"patch": _FIRST, "next_step": None},
    ),
    (
        "set_waiting",
        lambda ns, flow: changes.set_waiting(ns, flow, _TIMER, **_VERB),
        "waiting",
        {"wait": wire_form(_TIMER)},
    ),
    ("resume", lambda ns, flow: changes.resume(ns, flow, _APPROVED, **_VERB), "resumed", {"state_patch": _APPROVED}),
    (
        "update_state",
        lambda ns, flow: changes.update_state(ns, flow, _LATER, **_UPDATE),
        "state_updated",
        {"patch": _LATER, "next_step": None},
    ),
    ("finish", lambda ns, flow: changes.finish(ns, flow, _FINAL, **_VERB), "finished", {"final_state": _FINAL}),
]
_clock_us = count(1_760_000_000_000_000)


@attrs.frozen
class ScriptCall:
    """A change's command as the library sends it, but for when the server made the version before it."""

    _command: Command
    _held_at: int

    def after(self, changed_at: bytes) -> Command:
        """Build the command for a caller whose copy the server changed last at a time, in microseconds."""
        command, held_at = self._command, self._held_at
        etag = command[held_at].partition(b" ")[0]
        return (*command[:held_at], b"%b %b" % (etag, changed_at), *command[held_at + 1 :])


@attrs.frozen
class Change:
    """One change of one flow."""

    flow_key: bytes
    plain_writes: Sequence[Command]
    _script_call: ScriptCall

    def script_call(self, changed_at: bytes) -> Command:
        """Build the library's command, for a caller whose copy the server changed last at a time, in microseconds."""
        return self._script_call.after(changed_at)


@attrs.frozen(eq=False)
class Life:
    """One flow from its creation to its end."""

    flow_id: UUID
    op_id: str
    changes: Sequence[Change]


def load_scripts(flows: FlowManager) -> None:
    """Live lives through the manager: from then on every node knows the scripts, and nothing is answered NOSCRIPT."""
    for flow_id in spread(DEFAULT_PARTITIONS):
        flow = create(flows, flow_id, uuid4().hex)
        for _, operation, _, _ in LIFE:
            flow = flows.perform(operation(flows.namespace, flow))


def spread(how_many: int) -> list[UUID]:
    """Draw ids of flows that take the partitions in turn."""
    drawn = (uuid4().int // DEFAULT_PARTITIONS * DEFAULT_PARTITIONS for _ in range(how_many))
    return [UUID(int=number + turn % DEFAULT_PARTITIONS) for turn, number in enumerate(drawn)]


def is_small(reply: object) -> bool:
    """Whether a script's reply says that it was applied and that the caller's copy was current."""
    return isinstance(reply, bytes)


def answered(operation: Generator[Any, Any, Flow]) -> tuple[Command, Flow]:
    """Drive an operation without a server: the command it sends, and the flow it makes of the small reply."""
    steps = deliver(operation, Policy(deadline_s=1.0))
    packet = next(steps)
    assert isinstance(packet, Packet)
    (command,) = packet.commands
    try:
        steps.send([b"%d" % next(_clock_us)])
    except StopIteration as stop:
        return tuple(command), stop.value
    raise AssertionError("a verb is one command")


def recorded(flow: Flow, operation: Generator[Any, Any, Flow]) -> tuple[ScriptCall, Flow]:
    """Drive an operation on a copy of a flow without a server: its command, and the flow after it."""
    command, changed = answered(operation)
    return ScriptCall(command, command.index(cast("StoredFlow", flow._base).held)), changed


def fields_of(flow: Flow) -> Fields:
    """The hash of a flow as the caller's copy has it."""
    return cast("StoredFlow", flow._base).fields


def create(flows: FlowManager, flow_id: UUID, op_id: str) -> Flow:
    """Create a flow; with the same arguments, the same one."""
    return flows.create_managed(
        controller_id="kate/inbox",
        goal="triage inbox",
        owner_session_key="agent:kate:session:abc",
        requester_origin="user-1",
        current_step="classify",
        state={"messages": 10, "processed": 0},
        flow_id=flow_id,
        op_id=op_id,
    )


def prepare(flows: FlowManager, how_many: int) -> list[Life]:
    """Prepare lives of new flows. Creates them: to live one, create it again in an empty database."""
    return [_life(flows, uuid4(), uuid4().hex) for _ in range(how_many)]


def _life(flows: FlowManager, flow_id: UUID, op_id: str) -> Life:
    flow = create(flows, flow_id, op_id)
    done = []
    for _, operation, kind, payload in LIFE:
        flow_key = flows.namespace.keyspace.partition_of(flow_id).flow(str(flow_id).encode())
        call, changed = recorded(flow, operation(flows.namespace, flow))
        event = (kind.encode(), codec.pack("payload", payload))
        done.append(Change(flow_key, _plain_writes(flows.namespace, flow, changed, event), call))
        flow = changed
    return Life(flow_id, op_id, done)


def _plain_writes(namespace: Namespace, before: Flow, after: Flow, event: tuple[bytes, bytes]) -> list[Command]:
    """What the change amounts to: the fields that differ, the moves between the indexes, the event."""
    partition = namespace.keyspace.partition_of(after.id)
    member = str(after.id).encode()
    old, new = fields_of(before), fields_of(after)
    changed = [part for field, value in new.items() if old.get(field) != value for part in (field, value)]
    writes: list[Command] = [(b"HSET", partition.flow(member), *changed)]
    if removed := old.keys() - new.keys():
        writes.append((b"HDEL", partition.flow(member), *removed))
    if before.status is not after.status:
        writes.append((b"ZREM", partition.status(before.status), member))
    writes.append((b"ZADD", partition.status(after.status), new[b"updated_at"], member))
    if before.wait is not None:
        writes.append((b"ZREM", partition.due, member))
    if after.wait is not None:
        writes.append((b"ZADD", partition.due, b"%d" % to_us(_TIMER.at), member))
    kind, payload = event
    facts = (b"rev", new[b"revision"], b"kind", kind, b"op", new[b"etag"], b"payload", payload)
    writes.append((b"XADD", partition.events(member), b"*", *facts))
    return writes
