"""Single flows and listings."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from datetime import datetime
from typing import Any

import attrs

from redisflow.calls import Command, Primaries, Read, command
from redisflow.codec import read_flow
from redisflow.errors import FlowError, InvalidData
from redisflow.flow import Flow, FlowRef, FlowStatus
from redisflow.keys import Partition
from redisflow.ops.namespace import (
    Namespace,
    Target,
    flow_id_of,
    if_own,
    limit_of,
    log,
    partition_of,
    score_before,
    status_of,
    targets_of,
    whole_number,
)
from redisflow.waits import require_name

_ALL = 2**31  # as one page: a listing without a limit is one look at each set


def get(namespace: Namespace, flow_id: FlowRef) -> Generator[Read | Primaries, Any, Flow | None]:
    """Read one flow; `None` if there is none."""
    target = Target.at(flow_id_of(flow_id))
    (flat,) = yield Read([hgetall(namespace, target)])
    return read_flow(target.flow_id, flat)


def get_many(namespace: Namespace, flow_ids: Iterable[FlowRef]) -> Generator[Read | Primaries, Any, list[Flow | None]]:
    """Read flows by id, in the order given; `None` for each there is not."""
    targets = [Target.at(flow_id_of(flow_id)) for flow_id in flow_ids]
    if not targets:
        return []
    replies = yield Read([hgetall(namespace, target) for target in targets])
    return [read_flow(target.flow_id, flat) for target, flat in zip(targets, replies, strict=True)]


def count_by_status(namespace: Namespace) -> Generator[Read | Primaries, Any, dict[FlowStatus, int]]:
    """How many flows are in each status."""
    partitions = namespace.keyspace.partitions
    commands = [_counting(namespace, partition, status) for status in FlowStatus for partition in partitions]
    counts = yield Read(commands)
    width = len(partitions)
    return {status: sum(counts[n * width : (n + 1) * width]) for n, status in enumerate(FlowStatus)}


def _counting(namespace: Namespace, partition: Partition, status: FlowStatus) -> Command:
    if not namespace.owner:
        return command(partition, b"ZCARD", partition.status(status))
    return command(partition, b"ZINTERCARD", 2, partition.status(status), partition.owner(namespace.owner))


# --- listings ------------------------------------------------------------------------------------------


@attrs.define
class _Source:
    """One partition's sorted set, read piece by piece in order of score.

    The next piece begins at the last score and skips what was seen at it: positions shift when members leave.
    """

    partition: Partition
    key: bytes
    bound: bytes
    buffer: deque[tuple[float, bytes]] = attrs.field(factory=deque)
    at_bound: set[bytes] = attrs.field(factory=set)
    asked: int = 0
    exhausted: bool = False

    def ask(self, count: int, end: bytes, *, newest_first: bool) -> Command:
        self.asked = count + len(self.at_bound)
        order = [b"BYSCORE", b"REV"] if newest_first else [b"BYSCORE"]
        return command(
            self.partition, b"ZRANGE", self.key, self.bound, end, *order, b"LIMIT", 0, self.asked, b"WITHSCORES"
        )

    def take(self, flat: Sequence[bytes]) -> None:
        self.exhausted = len(flat) < 2 * self.asked
        for member, score in zip(flat[::2], flat[1::2], strict=True):
            if score == self.bound and member in self.at_bound:
                continue
            if score != self.bound:
                self.bound, self.at_bound = score, set()
            self.at_bound.add(member)
            self.buffer.append((float(score), member))


class Listing:
    """The flows of an owner or a status over all partitions, merged in order, a page at a time.

    A change moves a flow to the end of its status. So that a listing comes to its end while flows go on changing,
    and meets none of them twice, its later pages leave out what has changed since the first was read.
    """

    def __init__(self, namespace: Namespace, page: int, *, owner: bytes, status: FlowStatus | None, end: bytes) -> None:
        """Start at the head of an owner's flows, or of those in a status; `end` bounds the score."""
        self._namespace = namespace
        self._owner = owner
        self._status = status
        self._end = end
        self._page = min(whole_number("page", page), _ALL)
        if self._page < 1:
            raise InvalidData(f"page must be 1 or more, not {page}")
        self._sources: list[_Source] = []

    @classmethod
    def of_owner(cls, namespace: Namespace, owner: str, page: int) -> Listing:
        """The flows of an owner, newest first."""
        return cls(namespace, page, owner=require_name("owner_session_key", owner), status=None, end=b"-inf")

    @classmethod
    def of_status(
        cls, namespace: Namespace, status: FlowStatus | str, updated_before: datetime | None, page: int
    ) -> Listing:
        """The flows in a status, the longest unchanged first."""
        end = score_before("updated_before", updated_before)
        kind = _OwnListing if namespace.owner else cls
        return kind(namespace, page, owner=b"", status=status_of(status), end=end)

    def next_page(self) -> Generator[Read | Primaries, Any, list[Flow] | None]:
        """The next flows in order; `None` after the last. A damaged flow must not hide the others."""
        targets = yield from self.next_targets()
        if targets is None:
            return None
        flows = yield from read_sound(self._namespace, targets, "left out of a listing")
        return [flow for flow in flows if self._belongs(flow)]

    def _belongs(self, flow: Flow) -> bool:
        """Whether the flow is still where the index had it when it was read."""
        return self._status is None or flow.status is self._status

    def next_targets(self) -> Generator[Read | Primaries, Any, list[Target] | None]:
        """The next ids in order; `None` after the last."""
        if not self._sources and not self._is_foreign():
            self._sources = [self._source(partition) for partition in self._namespace.keyspace.partitions]
        ids: list[bytes] = []
        while len(ids) < self._page:
            drained = [source for source in self._sources if not source.buffer and not source.exhausted]
            if drained:
                yield from self._refill(drained, self._page - len(ids))
            heads = [source for source in self._sources if source.buffer]
            if heads:
                first = min(heads, key=self._rank)
                ids.append(first.buffer.popleft()[1])
            elif all(source.exhausted for source in self._sources):
                break
        return targets_of(ids) if ids else None

    def _is_foreign(self) -> bool:
        """Whether it is of an owner whose flows the caller must not know of."""
        return self._status is None and self._namespace.owner not in {b"", self._owner}

    def _rank(self, source: _Source) -> float:
        score = source.buffer[0][0]
        return -score if self._status is None else score

    def _refill(self, sources: list[_Source], wanted: int) -> Generator[Read | Primaries, Any, None]:
        """Read the next piece of some sets: a fair share of what is wanted, with room for an uneven spread."""
        count = 2 * wanted // len(self._sources) + 8
        asks = [source.ask(count, self._end, newest_first=self._status is None) for source in sources]
        # Each node of a cluster has a clock of its own: what is there now must not be later than the end.
        clocks = (yield Primaries()) if self._end == b"+inf" else ()
        replies = yield Read([*(command(primary, b"TIME") for primary in clocks), *asks])
        for source, flat in zip(sources, replies[len(clocks) :], strict=True):
            source.take(flat)
        if clocks:
            self._end = max(b"%d%06d" % (int(seconds), int(micros)) for seconds, micros in replies[: len(clocks)])

    def _source(self, partition: Partition) -> _Source:
        if self._status is None:
            return _Source(partition, partition.owner(self._owner), b"+inf")
        return _Source(partition, partition.status(self._status), b"-inf")


class _OwnListing(Listing):
    """One owner's flows in a status. No server gives a page of an intersection, so all ids are read at once."""

    _members: deque[bytes] | None = None

    def next_targets(self) -> Generator[Read, Any, list[Target] | None]:
        """The next ids in order; `None` after the last."""
        if self._members is None:
            self._members = yield from self._intersection()
        page = [self._members.popleft() for _ in range(min(self._page, len(self._members)))]
        return targets_of(page) if page else None

    def _intersection(self) -> Generator[Read, Any, deque[bytes]]:
        weights = (b"WEIGHTS", 1, 0, b"WITHSCORES")
        replies = yield Read(
            [
                command(p, b"ZINTER", 2, self._source(p).key, p.owner(self._namespace.owner), *weights)
                for p in self._namespace.keyspace.partitions
            ]
        )
        before = float(self._end.removeprefix(b"("))
        scored = [
            (float(score), member) for flat in replies for member, score in zip(flat[::2], flat[1::2], strict=True)
        ]
        return deque(member for score, member in sorted(scored) if score < before)


def list_by_owner(namespace: Namespace, owner: str, limit: int | None) -> Generator[Read | Primaries, Any, list[Flow]]:
    """The flows of an owner, newest first."""
    limit = limit_of(limit)
    return _first(Listing.of_owner(namespace, owner, limit or _ALL), limit)


def list_by_status(
    namespace: Namespace, status: FlowStatus | str, limit: int | None, updated_before: datetime | None
) -> Generator[Read | Primaries, Any, list[Flow]]:
    """The flows in a status, the longest unchanged first."""
    limit = limit_of(limit)
    return _first(Listing.of_status(namespace, status, updated_before, limit or _ALL), limit)


def _first(listing: Listing, limit: int | None) -> Generator[Read | Primaries, Any, list[Flow]]:
    flows: list[Flow] = []
    while limit is None or len(flows) < limit:
        page = yield from listing.next_page()
        if page is None:
            break
        flows += page
    return flows[:limit]


def read_sound(
    namespace: Namespace, targets: Sequence[Target], otherwise: str, level: int = logging.WARNING
) -> Generator[Read | Primaries, Any, list[Flow]]:
    """Read flows, without those that are gone; a damaged one is logged, with what became of it."""
    replies = yield Read([hgetall(namespace, target) for target in targets], tolerant=True)
    flows: list[Flow] = []
    for target, reply in zip(targets, replies, strict=True):
        try:
            if isinstance(reply, FlowError):
                raise reply
            flow = read_flow(target.flow_id, reply)
        except InvalidData as error:
            log.log(level, "%s: flow %s: %s", otherwise, target.flow_id, error)
        else:
            flows += [] if flow is None else [flow]
    return flows


def hgetall(namespace: Namespace, target: Target) -> Command:
    """Read the whole hash of a flow."""
    partition = partition_of(namespace, target)
    return if_own(namespace, target, command(partition, b"HGETALL", partition.flow(target.member)))
