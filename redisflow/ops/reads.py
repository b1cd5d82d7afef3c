"""Single flows and listings."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import attrs

from redisflow.calls import Command, Read, command
from redisflow.codec import read_flow
from redisflow.errors import InvalidData
from redisflow.flow import Flow, FlowRef, FlowStatus
from redisflow.keys import Partition
from redisflow.ops.namespace import (
    Namespace,
    Target,
    flow_id_of,
    limit_of,
    partition_of,
    score_before,
    status_of,
    whole_number,
)
from redisflow.waits import require_name

log = logging.getLogger("redisflow")


def get(namespace: Namespace, flow_id: FlowRef) -> Generator[Read, Any, Flow | None]:
    """Read one flow; `None` if there is none."""
    target = Target(flow_id_of(flow_id))
    (flat,) = yield Read([hgetall(namespace, target)])
    return read_flow(target.flow_id, flat)


def get_many(namespace: Namespace, flow_ids: Iterable[FlowRef]) -> Generator[Read, Any, list[Flow | None]]:
    """Read flows by id, in the order given; `None` for each there is not."""
    targets = [Target(flow_id_of(flow_id)) for flow_id in flow_ids]
    if not targets:
        return []
    replies = yield Read([hgetall(namespace, target) for target in targets])
    return [read_flow(target.flow_id, flat) for target, flat in zip(targets, replies, strict=True)]


def count_by_status(namespace: Namespace) -> Generator[Read, Any, dict[FlowStatus, int]]:
    """How many flows are in each status."""
    partitions = namespace.keyspace.partitions
    commands = [
        command(partition, b"ZCARD", partition.status(status)) for status in FlowStatus for partition in partitions
    ]
    counts = yield Read(commands)
    width = len(partitions)
    return {status: sum(counts[n * width : (n + 1) * width]) for n, status in enumerate(FlowStatus)}


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
    """The flows of an owner or a status over all partitions, merged in order, a page at a time."""

    def __init__(
        self,
        namespace: Namespace,
        *,
        owner: str | None = None,
        status: FlowStatus | str | None = None,
        updated_before: datetime | None = None,
        limit: int | None = None,
        page: int = 500,
    ) -> None:
        """Check the inputs. Either `owner` or `status` is given."""
        self._namespace = namespace
        self._owner = None if owner is None else require_name("owner_session_key", owner)
        self._status = None if status is None else status_of(status)
        self._newest_first = status is None
        self._upper = score_before("updated_before", updated_before)
        self.limit = limit_of(limit)
        self._page = whole_number("page", page)
        if self._page < 1:
            raise InvalidData(f"page must be 1 or more, not {page!r}")
        self._page = min(self._page, self.limit or self._page)
        self._sources: list[_Source] | None = None

    def next_page(self) -> Generator[Read, Any, list[Flow] | None]:
        """The next flows in order; `None` after the last."""
        ids = yield from self.next_ids()
        if not ids:
            return None
        targets = [Target(UUID(member.decode())) for member in ids]
        replies = yield Read([hgetall(self._namespace, target) for target in targets])
        flows = (_listed(target, flat) for target, flat in zip(targets, replies, strict=True))
        return [flow for flow in flows if flow is not None and self._belongs(flow)]

    def _belongs(self, flow: Flow) -> bool:
        """Whether the flow is still where the index had it when it was read."""
        return self._status is None or flow.status is self._status

    def next_ids(self) -> Generator[Read, Any, list[bytes]]:
        """The next ids in order; none after the last."""
        if self._sources is None:
            self._sources = [self._source(partition) for partition in self._namespace.keyspace.partitions]
        ids: list[bytes] = []
        while len(ids) < self._page:
            empty = [source for source in self._sources if not source.buffer and not source.exhausted]
            if empty:
                count = 2 * (self._page - len(ids)) // len(self._sources) + 8
                end = b"-inf" if self._newest_first else self._upper
                replies = yield Read([s.ask(count, end, newest_first=self._newest_first) for s in empty])
                for source, flat in zip(empty, replies, strict=True):
                    source.take(flat)
            heads = [source for source in self._sources if source.buffer]
            if not heads:
                if all(source.exhausted for source in self._sources):
                    break
                continue
            pick = max if self._newest_first else min
            ids.append(pick(heads, key=lambda source: source.buffer[0]).buffer.popleft()[1])
        return ids

    def _source(self, partition: Partition) -> _Source:
        if self._owner is not None:
            return _Source(partition, partition.owner(self._owner), b"+inf")
        if self._status is None:
            raise AssertionError
        return _Source(partition, partition.status(self._status), b"-inf")


def list_flows(listing: Listing) -> Generator[Read, Any, list[Flow]]:
    """The first flows of a listing, up to its limit."""
    flows: list[Flow] = []
    while listing.limit is None or len(flows) < listing.limit:
        page = yield from listing.next_page()
        if page is None:
            break
        flows += page
    return flows[: listing.limit]


def _listed(target: Target, flat: Sequence[bytes]) -> Flow | None:
    """A flow of a listing: one damaged flow must not hide the others."""
    try:
        return read_flow(target.flow_id, flat)
    except InvalidData as error:
        log.warning("left out of a listing: %s", error)
        return None


def hgetall(namespace: Namespace, target: Target) -> Command:
    """Read the whole hash of a flow."""
    partition = partition_of(namespace, target)
    return command(partition, b"HGETALL", partition.flow(target.member))
