"""What a large store costs: a tick with nothing due, and the first page of 100 of a listing.

Subject: a namespace of 100,000 waiting flows whose timers are far away. Yardstick: one of 100 such flows, on the
same server, asked by the same code, wall time in turns.

Fair, because each listing returns 100 flows of the same size from either. The flows are copies of one that the
library made: its hash under other ids, with the entries of the owner, status and due indexes beside it; their
event streams, which neither call reads, are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from uuid import UUID, uuid4

from benchmarks.lives import create, fields_of
from benchmarks.measure import Command, Plan, RawConnection, Row, compare, interleaved, pack
from benchmarks.server import Server
from redisflow import Flow, FlowManager, FlowStatus, Timer, WaitEngine
from redisflow.ops.namespace import Namespace
from redisflow.waits import to_us

_SMALL, _LARGE = 100, 100_000
_PAGE = 100
_CALLS = 20
_PER_PACKET = 1000
_FAR = datetime(2100, 1, 1, tzinfo=UTC)


def run(server: Server, plan: Plan) -> Iterator[Row]:
    """Measure the rows."""
    large = plan.size(_LARGE)
    with (
        server.client() as client,
        RawConnection(server.port) as connection,
    ):
        client.flushall()
        few, many = FlowManager(client, prefix="small"), FlowManager(client, prefix="large")
        for flows, how_many in ((few, _SMALL), (many, large)):
            _load(flows, connection, how_many)
            assert flows.count_by_status()[FlowStatus.WAITING] == how_many
        owner = many.list_by_status("waiting", limit=1)[0].owner_session_key
        for name, call in (
            ("tick, none due", _tick),
            ("page of list_by_status", lambda flows: _page(flows.list_by_status("waiting", limit=_PAGE))),
            ("page of list_by_owner", lambda flows: _page(flows.list_by_owner(owner, limit=_PAGE))),
        ):
            rounds = interleaved(plan.repeats, partial(_ms, call, many), partial(_ms, call, few))
            pairs = [(subject, yardstick) for subject, yardstick in rounds]
            yield compare(f"{name}, {large:,} flows", f"{_SMALL} flows", pairs, unit="ms", at_most=1.5)


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


def _load(flows: FlowManager, connection: RawConnection, how_many: int) -> None:
    """Fill a namespace with copies of one waiting flow, a microsecond apart."""
    model = flows.set_waiting(flows.start_running(create(flows, uuid4(), uuid4().hex)), Timer(at=_FAR))
    began_us = to_us(model.created_at)
    copies = [
        write
        for number in range(1, how_many)
        for write in _copied(flows.namespace, model, UUID(int=model.id.int ^ number), b"%d" % (began_us + number))
    ]
    for start in range(0, len(copies), _PER_PACKET):
        packet = copies[start : start + _PER_PACKET]
        connection.exchange(pack(packet), len(packet))


def _copied(namespace: Namespace, model: Flow, flow_id: UUID, time_us: bytes) -> list[Command]:
    place = namespace.keyspace.partition_of(flow_id)
    member = str(flow_id).encode()
    fields = {**fields_of(model), b"created_at": time_us, b"updated_at": time_us}
    return [
        (b"HSET", place.flow(member), *(part for pair in fields.items() for part in pair)),
        (b"ZADD", place.owner(fields[b"owner_session_key"]), time_us, member),
        (b"ZADD", place.status(FlowStatus.WAITING), time_us, member),
        (b"ZADD", place.due, b"%d" % to_us(_FAR), member),
    ]
