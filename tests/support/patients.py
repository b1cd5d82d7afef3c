"""Stores to be examined, and hands to damage them behind the library's back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs

from redisflow import Diagnosis, ExternalEvent, Finding, FlowStatus, Manual, Severity, Timer
from tests.support.subjects import WHO, Subject, brought_id, drawn_id, flow_in, observed

if TYPE_CHECKING:
    from redisflow.keys import Partition

SOON = datetime.now(UTC) + timedelta(hours=1)
OWNER = WHO["owner_session_key"].encode()
_RECORDS = (b"}:flow:", b"}:events:", b"}:steps:", b"}:seen:")


def problems(diagnosis: Diagnosis) -> list[Finding]:
    """What is wrong with a store, mended or not."""
    return [found for found in diagnosis.findings if found.severity in {Severity.WARNING, Severity.ERROR}]


@attrs.define
class Patient:
    """A store with flows in every status and waits of every kind, by name.

    And `absent`, the id of no flow; `deleted`, that of a flow which has left a tombstone.
    """

    subject: Subject
    flows: Any
    ids: dict[str, UUID] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        for status in FlowStatus:
            self.make(status, status)
        self.make("timer", "waiting", wait=Timer(at=SOON))
        self.make("event", "waiting", wait=ExternalEvent("approvals", "42"))
        self.make("deadline", "waiting", wait=Manual(deadline=SOON))
        self.make("own", "waiting", wait={"kind": "of my own"})
        self.make("unwanted", "waiting")
        self.flows.request_cancel(self.ids["unwanted"])
        self.flows.record_step_observation(observed(self.ids["running"]), op_id=brought_id())
        self.flows.append_event(self.ids["finished"], "note", op_id=drawn_id())
        self.ids["absent"] = uuid4()
        self.make("deleted", "waiting", wait=ExternalEvent("approvals", "42"))
        self.flows.delete(self.ids["deleted"])

    @property
    def raw(self) -> Any:
        return self.subject.raw

    def make(self, name: str, status: FlowStatus | str, **options: Any) -> str:
        """Make a flow, and give it a name."""
        self.ids[name] = flow_in(self.flows, status, **options).id
        return name

    def diagnose(self, **options: Any) -> Diagnosis:
        """Examine it."""
        diagnosis: Diagnosis = self.flows.doctor(**options)
        return diagnosis

    def lives(self) -> dict[bytes, bytes]:
        """Every flow, trail and set of steps, byte by byte."""
        records = [key for key in self.subject.all_keys() if any(part in key for part in _RECORDS)]
        return {key: self.raw.dump(key) for key in records}

    # --- keys ---

    def member(self, name: str) -> bytes:
        """A flow's id, as sets have it."""
        return str(self.ids[name]).encode()

    def partition(self, name: str) -> Partition:
        """Where a flow lives."""
        return self.subject.keyspace.partition_of(self.ids[name])

    def elsewhere(self, name: str) -> Partition:
        """Where it does not."""
        return self.subject.keyspace.partitions[self.partition(name).number - 1]

    def key(self, name: str, kind: str) -> bytes:
        """A key of a flow's partition: `due`, `waiters`, `scratch`, `status:<status>`, `owner:<owner>`."""
        partition = self.partition(name)
        what, _, rest = kind.partition(":")
        match what:
            case "status":
                return partition.status(FlowStatus(rest))
            case "owner":
                return partition.owner(rest.encode())
            case "flow" | "events" | "steps" | "seen":
                return bytes(getattr(partition, what)(self.member(name)))
        return bytes(getattr(partition, what))

    # --- damage: each returns the name of the flow, or the key, that is the worse for it ---

    def enlist(self, name: str, kind: str, score: float = 1, *, waiting_for: bytes = b"") -> str:
        """Add a flow to an index, or give it another score."""
        self.raw.zadd(self.key(name, kind), {waiting_for + self.member(name): score})
        return name

    def strike(self, name: str, kind: str, *, waiting_for: bytes = b"") -> str:
        """Remove a flow from an index."""
        assert self.raw.zrem(self.key(name, kind), waiting_for + self.member(name)) == 1
        return name

    def scribble(self, key: bytes, entry: bytes) -> str:
        """Add anything to an index."""
        self.raw.zadd(key, {entry: 1})
        return key.decode()

    def overwrite(self, key: bytes) -> str:
        """Put a text in place of what is under a key."""
        self.raw.set(key, "mine")
        return key.decode(errors="backslashreplace")

    def spoil(self, name: str, field: str, value: str | bytes | None) -> str:
        """Set a field of a flow's hash, or delete it."""
        if value is None:
            assert self.raw.hdel(self.key(name, "flow"), field) == 1
        else:
            self.raw.hset(self.key(name, "flow"), field, value)
        return name

    def record(self, name: str, kind: str) -> str:
        """Write an event, a step or a brought operation id of a flow."""
        if kind == "events":
            self.raw.xadd(self.key(name, kind), {"rev": 0, "kind": "created", "op": "", "payload": b"\x80"})
        elif kind == "seen":
            self.raw.zadd(self.key(name, kind), {brought_id(): 1})
        else:
            self.raw.hset(self.key(name, kind), "run-1", b"\x99")
        return name

    def remove(self, name: str, kind: str) -> str:
        """Delete a key of a flow."""
        assert self.raw.delete(self.key(name, kind)) == 1
        return name

    def age(self, name: str, updated_at_us: int) -> str:
        """Make a waiting flow whose cancel was requested one that has not changed since."""
        self.spoil(name, "updated_at", str(updated_at_us))
        self.enlist(name, "status:waiting", updated_at_us)
        return self.enlist(name, "due", updated_at_us)
