"""What is kept beside a flow, its index entries and records, and what a flow says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import attrs

from redisflow.codec import pairs, read_flow
from redisflow.errors import InvalidData
from redisflow.flow import Flow, FlowStatus
from redisflow.keys import Key, Partition
from redisflow.ops.findings import readable
from redisflow.waits import to_us


class Kept(NamedTuple):
    """A key that something of a flow is kept under, and what it is kept for: as lua/reconcile.lua has it."""

    key: bytes
    kind: str
    name: bytes = b""

    @property
    def label(self) -> str:
        """How to speak of it."""
        name = self.name[:-1].replace(b"\0", b", ") if self.kind == "waiters" else self.name
        return f"{self.kind}:{readable(name)}" if name else self.kind


class Entry(NamedTuple):
    """An index entry, and the flow it is of."""

    key: Key
    text: bytes
    member: bytes

    @classmethod
    def of(cls, key: Key, text: bytes) -> Entry:
        """Take an entry apart."""
        return cls(key, text, text.rpartition(b"\0")[2] if key.kind == "waiters" else text)

    @property
    def kept(self) -> Kept:
        """As lua/reconcile.lua has it."""
        name = self.text[: -len(self.member)] if self.key.kind == "waiters" else self.key.name
        return Kept(self.key.text, self.key.kind, name)

    def fits(self, owner: bytes | None, status: bytes | None, waiter: bytes | None) -> bool:
        """Whether it may be right, by fields of its flow. In which statuses a flow is listed, the flow itself tells."""
        match self.key.kind:
            case "owner":
                return owner == self.key.name
            case "waiters":
                return status == b"waiting" and waiter == self.kept.name
            case _:
                return status is not None


@attrs.frozen
class Seen:
    """A flow as it was last seen, or the lack of one.

    Attributes:
        wait: as it is stored.
        due_at: when an engine must look at that wait.
        beside: what should be kept beside it: all of it but steps, which may be absent.
    """

    partition: Partition
    member: bytes
    flow: Flow | None = None
    wait: bytes = b""
    due_at: bytes = b""
    beside: Sequence[Kept] = ()

    @classmethod
    def of(cls, partition: Partition, member: bytes, flat: Sequence[bytes]) -> Seen:
        """Read the hash of a flow.

        Raises:
            InvalidData: it is damaged.
        """
        flow = read_flow(UUID(member.decode()), flat)
        if flow is None:
            return cls(partition, member)
        fields = pairs(flat)
        wait, waiter, due_at = fields.get(b"wait", b""), b"", b""
        if flow.status is FlowStatus.WAITING:
            if not wait:
                raise InvalidData("it is waiting, and its hash has no wait")
            condition = flow.condition
            waiter = b"" if condition is None else condition.waiter
            if fields.get(b"waiter", b"") != waiter:
                raise InvalidData("its fields 'wait' and 'waiter' contradict each other")
            due_at = b"" if condition is None or condition.due is None else b"%d" % to_us(condition.due)
        owner = fields[b"owner_session_key"]
        beside = [
            *(Kept(partition.status(status), "status", status.encode()) for status in FlowStatus),
            Kept(partition.owner(owner), "owner", owner),
            Kept(partition.due, "due"),
            *([Kept(partition.waiters, "waiters", waiter)] if waiter else []),
            Kept(partition.events(member), "events"),
        ]
        return cls(partition, member, flow, wait, due_at, beside)
