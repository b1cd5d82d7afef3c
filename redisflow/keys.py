"""Every key name, and where each flow lives.

A key is `{tag}:<kind>[:<name>]`. The hash tag comes first, so no name can move a key; all keys of one flow
share the tag, so one script may touch them on a cluster too. The layout is documented in docs/layout.md.
"""

from __future__ import annotations

import re
from binascii import crc_hqx
from itertools import count
from typing import NamedTuple
from uuid import UUID

import attrs

from redisflow.errors import InvalidData, shown
from redisflow.flow import FlowStatus

LAYOUT_VERSION = 1
DEFAULT_PARTITIONS = 16
MAX_PARTITIONS = 1024
SLOTS = 16_384
_PREFIX = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def slot_of(tag: str) -> int:
    """The cluster slot of a hash tag: CRC16 (XMODEM) modulo 16,384, as the cluster specification has it."""
    return crc_hqx(tag.encode(), 0) % SLOTS


def require_prefix(prefix: object) -> str:
    """Return `prefix` if it can begin a key.

    Raises:
        InvalidData: not 1 to 64 characters of `A-Za-z0-9_.-`.
    """
    if not isinstance(prefix, str) or _PREFIX.fullmatch(prefix) is None:
        raise InvalidData(f"prefix {shown(prefix)} is not 1 to 64 characters of A-Z a-z 0-9 _ . -")
    return prefix


def require_partitions(partitions: object) -> int:
    """Return `partitions` if a namespace can have that many."""
    if isinstance(partitions, bool) or not isinstance(partitions, int) or not 1 <= partitions <= MAX_PARTITIONS:
        raise InvalidData(f"partitions must be a whole number from 1 to {MAX_PARTITIONS}, not {shown(partitions)}")
    return partitions


def meta_key(prefix: str) -> str:
    """The hash with the namespace's layout version and partition count."""
    return f"{prefix}:meta"


@attrs.frozen(eq=False)
class Partition:
    """The key names of one partition. `owner` names arrive encoded, checked by the caller.

    Attributes:
        index_keys: what each script was given of them before.
    """

    number: int
    tag: str
    slot: int
    due: bytes
    waiters: bytes
    scratch: bytes
    _flow: bytes = attrs.field(repr=False)
    _events: bytes = attrs.field(repr=False)
    _steps: bytes = attrs.field(repr=False)
    _seen: bytes = attrs.field(repr=False)
    _owner: bytes = attrs.field(repr=False)
    _statuses: dict[FlowStatus, bytes] = attrs.field(repr=False)
    index_keys: dict[object, tuple[bytes, ...]] = attrs.field(factory=dict, repr=False)

    @classmethod
    def named(cls, prefix: str, number: int, partitions: int) -> Partition:
        """Find the tag of partition `number`: the first that lands in its share of the slots."""
        tags = (f"{prefix}:{number}.{n}" for n in count())
        tag = next(tag for tag in tags if slot_of(tag) * partitions // SLOTS == number)
        head = f"{{{tag}}}:".encode()
        return cls(
            number=number,
            tag=tag,
            slot=slot_of(tag),
            due=head + b"due",
            waiters=head + b"waiters",
            scratch=head + b"scratch",
            statuses={status: head + b"status:" + status.encode() for status in FlowStatus},
            flow=head + b"flow:",
            events=head + b"events:",
            steps=head + b"steps:",
            seen=head + b"seen:",
            owner=head + b"owner:",
        )

    def flow(self, flow_id: bytes) -> bytes:
        """The hash of a flow."""
        return self._flow + flow_id

    def events(self, flow_id: bytes) -> bytes:
        """The stream of a flow's events."""
        return self._events + flow_id

    def steps(self, flow_id: bytes) -> bytes:
        """The hash of a flow's steps, by run id."""
        return self._steps + flow_id

    def seen(self, flow_id: bytes) -> bytes:
        """The sorted set of the operation ids that callers brought, by their events' times."""
        return self._seen + flow_id

    def owner(self, owner: bytes) -> bytes:
        """The sorted set of an owner's flows, by creation."""
        return self._owner + owner

    def status(self, status: FlowStatus) -> bytes:
        """The sorted set of the flows in a status, by last change."""
        return self._statuses[status]


class Key(NamedTuple):
    """A key of a partition, taken apart.

    Attributes:
        text: all of it.
        kind: flow, events, steps, seen, owner, status, due, waiters or scratch.
        name: what it is for: a flow's id, an owner, a status; empty where the partition has one key of the kind.
    """

    partition: Partition
    text: bytes
    kind: str
    name: bytes


_STATUSES = {status.encode() for status in FlowStatus}


@attrs.frozen(eq=False)
class Keyspace:
    """The partitions of one namespace."""

    prefix: str
    partitions: tuple[Partition, ...]
    _by_tag: dict[bytes, Partition] = attrs.field(
        init=False,
        repr=False,
        default=attrs.Factory(lambda self: {b"{%b" % p.tag.encode(): p for p in self.partitions}, takes_self=True),
    )

    @classmethod
    def of(cls, prefix: str, partitions: int) -> Keyspace:
        """Name every partition of a namespace."""
        return cls(prefix, tuple(Partition.named(prefix, number, partitions) for number in range(partitions)))

    def partition_of(self, flow_id: UUID) -> Partition:
        """The partition a flow lives in."""
        return self.partitions[flow_id.int % len(self.partitions)]

    @property
    def pattern(self) -> bytes:
        """What every key of a partition matches, and none of another namespace: no prefix holds a colon."""
        return b"{%b:*" % self.prefix.encode()

    def parse(self, text: bytes) -> Key | None:
        """Take a key apart; `None` for one that the layout has no name for."""
        tag, _, rest = text.partition(b"}:")
        kind, _, name = rest.partition(b":")
        partition = self._by_tag.get(tag)
        if partition is None:
            return None
        match kind:
            case b"flow" | b"events" | b"steps" | b"seen":
                known = self.holds(partition, name)
            case b"owner":
                known = name != b""
            case b"status":
                known = name in _STATUSES
            case b"due" | b"waiters" | b"scratch":
                known = rest == kind
            case _:
                known = False
        return Key(partition, text, kind.decode(), name) if known else None

    def holds(self, partition: Partition, member: bytes) -> bool:
        """Whether something is the id of a flow of the partition, written as the library writes ids."""
        try:
            flow_id = UUID(member.decode())
        except ValueError:
            return False
        return str(flow_id).encode() == member and self.partition_of(flow_id) is partition
