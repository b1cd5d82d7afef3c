"""The flows that schedules begin with, made once by the library's operations."""

from __future__ import annotations

import enum
from collections.abc import Generator
from functools import cache
from typing import Any
from uuid import UUID

import attrs

from redisflow.calls import Packet
from redisflow.codec import StoredFlow
from redisflow.delivery import Policy, deliver
from redisflow.flow import Flow
from redisflow.ops import changes, creation, namespace, records, upkeep
from redisflow.ops.namespace import Namespace
from redisflow.scripts import Appending
from redisflow.waits import Manual
from tests.protocol.model import Server
from tests.protocol.scripts import Library
from tests.protocol.store import Hash, Life, Stream

BOUND = 3  # of the trails that some clients trim
NODE_SIZE = 2
PREFIX, PARTITIONS = "m", 2
LIBRARY = Library([None, BOUND])
N_FLOWS = 3
ALWAYS: dict[str, Any] = {"expected_revision": None, "op_id": None}

_PAST_US = 1_699_999_990_000_000


def drawn(number: int) -> str:
    """Return an operation id as the library draws it."""
    return f"{number:012x}{namespace._DRAWN}{number:016x}"


@cache
def _some_op_ids(first: int) -> list[str]:
    return [drawn(first + number) for number in range(99, -1, -1)]


def fill_op_ids(first: int) -> None:
    """Have the library draw the same ids in each run."""
    namespace._unused_op_ids[:] = _some_op_ids(first)


def joined(event_maxlen: int | None, owner: str = "") -> Namespace:
    """Return a namespace as it is once connected."""
    made = Namespace(PREFIX, PARTITIONS, appending=Appending.keeping(event_maxlen))
    made.connected(PARTITIONS)
    return made.for_owner(owner) if owner else made


NAMESPACES = {(bound, owner): joined(bound, owner) for bound in (None, BOUND) for owner in ("", "o", "p")}


def new_flow(
    space: Namespace, flow_id: UUID | None, op_id: str | None, *, owner: str = "o", mirrored: bool, exist_ok: bool
) -> Generator[Any, Any, Flow]:
    """Create a flow."""
    return creation.create(
        space,
        mirrored=mirrored,
        controller_id="c",
        goal="g",
        owner_session_key=None if space.owner else owner,
        requester_origin="r",
        current_step="s",
        state={"n": 0},
        flow_id=flow_id,
        exist_ok=exist_ok,
        op_id=op_id,
    )


def increment(space: Namespace, flow: Flow | UUID, expected: int | None, op_id: str | None) -> Any:
    """Add one to a counter in the state."""
    return changes.update_state(
        space, flow, None, next_step=None, increment={"n": 1}, unset=(), expected_revision=expected, op_id=op_id
    )


@attrs.frozen(eq=False)
class Beginning:
    """What is stored of a flow at first, its history, and the copies that callers have of it."""

    hashes: dict[bytes, Hash]
    streams: dict[bytes, Stream]
    sets: dict[bytes, dict[bytes, int]]
    expiring: frozenset[bytes]
    flow_key: bytes
    lives: tuple[Life, ...]
    copies: tuple[Flow, ...]

    def set_up(self, server: Server) -> None:
        """Put the flow on a server."""
        for key, fields in self.hashes.items():
            server.db[key] = fields.copy()
        for key, stream in self.streams.items():
            server.db[key] = stream.copy()
        for key, members in self.sets.items():
            server.db.setdefault(key, {}).update(members)
        server.expiring |= self.expiring
        server.lives[self.flow_key] = [life.copy() for life in self.lives]


class _Making:
    """A flow of one id on a server of its own, and what is done to it by hand."""

    def __init__(self, flow_id: UUID) -> None:
        self.flow_id = flow_id
        self.server = Server(LIBRARY, NODE_SIZE)
        self.server.now_us = _PAST_US
        self.server.now_s = -10.0
        self.space, self.trimming = NAMESPACES[None, ""], NAMESPACES[BOUND, ""]
        self.partition = self.space.keyspace.partition_of(flow_id)
        self.flow_key = self.partition.flow(str(flow_id).encode())
        self.events_key = self.partition.events(str(flow_id).encode())
        self.copies: list[Flow] = []

    def do(self, op: Generator[Any, Any, Any]) -> Any:
        """Carry an operation out."""
        steps = deliver(op, Policy(15.0))
        try:
            step = next(steps)
            while True:
                assert isinstance(step, Packet)
                self.server.now_us += 1500
                step = steps.send([self.server.execute(command) for command in step.commands])
        except StopIteration as stop:
            if isinstance(stop.value, Flow):
                self.copies.append(stop.value)
            return stop.value

    def created(self, space: Namespace | None = None, owner: str = "o") -> Flow:
        op = new_flow(space or self.space, self.flow_id, None, owner=owner, mirrored=False, exist_ok=False)
        made: Flow = self.do(op)
        return made

    def running(self, space: Namespace | None = None) -> Flow:
        made: Flow = self.do(changes.start_running(self.space, self.created(space), **ALWAYS))
        return made

    def noted(self, times: int, space: Namespace | None = None) -> None:
        for _ in range(times):
            self.do(records.append_event(space or self.space, self.flow_id, "note", None, **ALWAYS))

    def deleted(self) -> None:
        self.do(upkeep.delete(self.space, self.flow_id, **ALWAYS))

    def settled(self) -> None:
        self.server.execute((b"EVALSHA", SETTLE_SHA, b"2", self.flow_key, self.events_key, b"", b"*", b"+", b"9", b"0"))
        found: Hash = self.server.db[self.flow_key]
        if b"gone" not in found:
            self.copies.append(copy_of(self.flow_id, found))

    def beginning(self) -> Beginning:
        db = self.server.db
        is_set = {key: b":flow:" not in key and b":steps:" not in key for key in db}
        return Beginning(
            {key: value for key, value in db.items() if not is_set[key]},
            {key: value for key, value in db.items() if isinstance(value, Stream)},
            {key: value for key, value in db.items() if is_set[key] and not isinstance(value, Stream)},
            frozenset(self.server.expiring),
            self.flow_key,
            tuple(self.server.lives.get(self.flow_key, ())),
            tuple(self.copies),
        )


SETTLE_SHA = next(sha for sha, known in LIBRARY.by_sha.items() if known.name == "settle")


def copy_of(flow_id: UUID, fields: Hash) -> Flow:
    """Return the copy that a caller would read."""
    return Flow.from_stored(StoredFlow(flow_id, str(flow_id).encode(), fields.copy()))


class Kind(enum.Enum):
    """What a flow is when a schedule begins."""

    ABSENT = enum.auto()
    CREATED = enum.auto()
    OF_ANOTHER_OWNER = enum.auto()
    RUNNING = enum.auto()
    WAITING = enum.auto()
    LONG = enum.auto()  # its trail
    KEPT_SHORT = enum.auto()  # its trail, by those that add to it
    TRIMMED_BY_HAND = enum.auto()
    SETTLED = enum.auto()
    DELETED = enum.auto()
    REBORN = enum.auto()


KINDS = tuple(Kind)


def _make(making: _Making, kind: Kind) -> None:  # noqa: C901 - one case for each kind
    match kind:
        case Kind.ABSENT:
            pass
        case Kind.CREATED:
            making.created()
        case Kind.OF_ANOTHER_OWNER:
            making.created(owner="p")
        case Kind.RUNNING:
            making.running()
        case Kind.WAITING:
            making.do(changes.set_waiting(making.space, making.running(), Manual(), **ALWAYS))
        case Kind.LONG:
            making.running()
            making.noted(7)
        case Kind.KEPT_SHORT:
            making.running(making.trimming)
            making.noted(5, making.trimming)
        case Kind.TRIMMED_BY_HAND:
            making.created()
            making.noted(3)
            making.server.trim(making.events_key, 1)
        case Kind.SETTLED:
            making.running()
            making.settled()
        case Kind.DELETED:
            making.created()
            making.deleted()
        case Kind.REBORN:
            making.created()
            making.deleted()
            making.running()


@cache
def beginnings() -> dict[tuple[int, Kind], Beginning]:
    """Make every kind of beginning for each flow, by its number."""
    made = {}
    for number in range(N_FLOWS):
        for kind in KINDS:
            fill_op_ids(0xF00000)
            making = _Making(flow_id(number))
            _make(making, kind)
            made[number, kind] = making.beginning()
    return made


class _FlowId(UUID):
    """An id that is written out once."""

    def __str__(self) -> str:
        return _text_of(self.int)


@cache
def _text_of(number: int) -> str:
    return str(UUID(int=number))


@cache
def flow_id(number: int) -> UUID:
    """Return the id of a flow of schedules. They share their partitions."""
    return _FlowId(int=(0xABC << 64) + number)
