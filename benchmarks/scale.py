"""What a large store costs: a tick with nothing due, and the first page of 100 of a listing.

Subject: a namespace of a million waiting flows whose timers are far away. Yardstick: one of 1,000 such flows, on the
same server, asked by the same code, wall time in turns with what lies between them.

Fair, because each listing returns 100 flows of the same size from any. The flows are copies of one that the library
made: its hash under other ids, with the entries of the owner, status and due indexes beside it; their event streams,
which neither call reads, are left out. All are one owner's: the longest such index there can be.

The million takes about 1 GB of the server's memory, as they are without streams.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from uuid import UUID, uuid4

from benchmarks.lives import create, fields_of
from benchmarks.measure import Command, Curve, Plan, RawConnection, Row, compare, interleaved, pack
from benchmarks.server import Server
from redisflow import Flow, FlowManager, FlowStatus, Timer, WaitEngine
from redisflow.keys import Partition
from redisflow.waits import to_us

_SIZES = (1_000, 10_000, 100_000, 1_000_000)
_PAGE = 100
_CALLS = 20
_PER_PACKET = 1000
_FAR = datetime(2100, 1, 1, tzinfo=UTC)
_TIMES = (b"created_at", b"updated_at")


def run(server: Server, plan: Plan) -> Iterator[Row | Curve]:
    """Measure the rows."""
    sizes = [plan.size(size) for size in _SIZES]
    with (
        server.client() as client,
        RawConnection(server.port) as connection,
    ):
        client.flushall()
        namespaces = [FlowManager(client, prefix=f"of-{size}") for size in sizes]
        for flows, size in zip(namespaces, sizes, strict=True):
            _fill(flows, connection, size)
            assert flows.count_by_status()[FlowStatus.WAITING] == size
        owner = namespaces[0].list_by_status("waiting", limit=1)[0].owner_session_key
        for name, call in (
            ("tick, none due", _tick),
            ("page of list_by_status", lambda flows: _page(flows.list_by_status("waiting", limit=_PAGE))),
            ("page of list_by_owner", lambda flows: _page(flows.list_by_owner(owner, limit=_PAGE))),
        ):
            rounds = interleaved(plan.repeats, *(partial(_ms, call, flows) for flows in namespaces))
            pairs = [(costs[-1], costs[0]) for costs in rounds]
            yield compare(f"{name}, {sizes[-1]:,} flows", f"{sizes[0]:,} flows", pairs, unit="ms", at_most=1.5)
            costs = map(statistics.median, zip(*rounds, strict=True))
            points = list(zip(sizes, costs, strict=True))
            yield Curve("Cost against number of flows", name, "waiting flows", "ms per call", points)


def _ms(call: Callable[[FlowManager], None], flows: FlowManager) -> float:
    began = time.perf_counter()
    for _ in range(_CALLS):
        call(flows)
    return 1000 * (time.perf_counter() - began) / _CALLS


def _tick(flows: FlowManager) -> None:
    report = WaitEngine(flows).tick()
    assert not report.resumed, report


def _page(page: Sequence[Flow]) -> None:
    assert len(page) == _PAGE


def _fill(flows: FlowManager, connection: RawConnection, how_many: int) -> None:
    """Fill a namespace with copies of one waiting flow, a microsecond apart."""
    model = flows.set_waiting(flows.start_running(create(flows, uuid4(), uuid4().hex)), Timer(at=_FAR))
    began_us = to_us(model.created_at)
    copies = ((UUID(int=model.id.int ^ n), b"%d" % (began_us + n)) for n in range(1, how_many))
    while packet := list(islice(copies, _PER_PACKET)):
        writes = list(_copied(flows, model, packet))
        connection.exchange(pack(writes), len(writes))


def _copied(flows: FlowManager, model: Flow, copies: Iterable[tuple[UUID, bytes]]) -> Iterator[Command]:
    """The writes of a packet: a hash for each copy, and one write of each index for all of them in a partition."""
    fields = fields_of(model)
    same = [part for pair in fields.items() if pair[0] not in _TIMES for part in pair]
    due = b"%d" % to_us(_FAR)
    members: dict[Partition, list[tuple[bytes, bytes]]] = {}
    for flow_id, time_us in copies:
        place = flows.namespace.keyspace.partition_of(flow_id)
        member = str(flow_id).encode()
        members.setdefault(place, []).append((time_us, member))
        yield (b"HSET", place.flow(member), *same, b"created_at", time_us, b"updated_at", time_us)
    for place, entries in members.items():
        by_time = [part for entry in entries for part in entry]
        yield (b"ZADD", place.owner(fields[b"owner_session_key"]), *by_time)
        yield (b"ZADD", place.status(FlowStatus.WAITING), *by_time)
        yield (b"ZADD", place.due, *(part for _, member in entries for part in (due, member)))
