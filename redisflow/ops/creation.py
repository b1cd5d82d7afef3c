"""Creating flows."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any
from uuid import UUID

from redisflow.calls import Call
from redisflow.codec import (
    StoredFlow,
    pack,
)
from redisflow.errors import FlowExists, InvalidData, OutcomeUnknown, shown
from redisflow.flow import (
    START_RUNNING,
    Flow,
    FlowStatus,
)
from redisflow.ops.fields import flat, found, state_fields
from redisflow.ops.namespace import (
    Namespace,
    Target,
    flow_id_of,
    is_drawn,
    op_id_of,
    partition_of,
    raise_refusal,
)
from redisflow.waits import require_name

GOAL_LIMIT_BYTES = 64 * 1024


def create(
    namespace: Namespace,
    *,
    mirrored: bool,
    controller_id: str,
    goal: str,
    owner_session_key: str | None,
    requester_origin: str,
    current_step: str,
    state: Any,
    flow_id: UUID | str | None,
    exist_ok: bool,
    op_id: object,
) -> Generator[Call, Any, Flow]:
    """Create a flow: `created`, or running at once where it mirrors work that has begun elsewhere."""
    op = op_id_of(op_id)
    # The id of a flow is that of the operation that makes it: called again with its op_id, it is the same flow.
    target = Target.at(UUID(hex=op, version=4) if flow_id is None else flow_id_of(flow_id))
    owner = owner_of(namespace, owner_session_key)
    status = FlowStatus.RUNNING if mirrored else FlowStatus.CREATED
    fields = {
        b"controller_id": require_name("controller_id", controller_id),
        b"goal": require_name("goal", goal, limit=GOAL_LIMIT_BYTES),
        b"owner_session_key": owner,
        b"requester_origin": require_name("requester_origin", requester_origin),
        b"current_step": require_name("current_step", current_step),
    }
    _, initial = state_fields("state", {} if state is None else state)
    fields |= initial
    origin = {"controller_id": controller_id, "goal": goal, "current_step": current_step}
    events = [b"created", pack("payload", origin)]
    if mirrored:
        events += [START_RUNNING.kind.encode(), pack("payload", {})]
    namespace.require_room("state", initial.values())

    partition = partition_of(namespace, target)
    reply = yield Call(
        namespace.appending.create,
        partition.slot,
        (
            partition.flow(target.member),
            partition.events(target.member),
            partition.owner(owner),
            partition.status(status),
            partition.scratch,
            *(() if op_id is None else (partition.seen(target.member),)),
        ),
        (
            target.member,
            # An id that comes from the operation's is that of no other creation.
            owner if exist_ok or flow_id is None else b"",
            status.value.encode(),
            b"%d" % (len(events) // 2),
            *events,
            *flat(fields),
        ),
        target.flow_id,
        op,
        owner=namespace.owner,
        brought=op_id is not None,
        doubtful=op_id is not None and is_drawn(op),
        if_deleted=None,
    )
    match reply:
        case bytes() as created_at:
            fields |= {b"status": status.value.encode(), b"etag": op.encode()}
            fields |= {b"revision": b"%d" % (len(events) // 2 - 1)}
            fields |= {b"created_at": created_at, b"updated_at": created_at}
            return Flow.from_stored(StoredFlow(target.flow_id, target.member, fields))
        case [b"FLOW", stored]:
            return found(target, stored)
        case [b"EXISTS", is_whole]:
            if op_id is None or is_whole:
                raise FlowExists(target.flow_id)
            raise OutcomeUnknown(op, f"flow {target.flow_id}: it exists, and its trail does not tell who created it")
    raise_refusal(reply, target.flow_id, op)


def owner_of(namespace: Namespace, owner_session_key: str | None) -> bytes:
    """Whose flow a creation makes: the caller says so, unless bound to an owner."""
    if owner_session_key is None and not namespace.owner:
        raise InvalidData("owner_session_key must be a string; only a view of one owner's flows can do without")
    if owner_session_key is None:
        return namespace.owner
    owner = require_name("owner_session_key", owner_session_key)
    if namespace.owner not in {b"", owner}:
        raise InvalidData(
            f"owner_session_key is {shown(owner_session_key)}, in a view of the flows of {namespace.owner.decode()!r}"
        )
    return owner
