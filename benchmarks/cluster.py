"""A cluster of three masters beside one server: what a call costs the client, and what a change costs the servers.

Subject: three masters without replicas, a process each, on this machine. Yardstick: one server of the same program
with the same settings. Both are driven in turns by the same code, in two ways:

- Called: `update_state` by one thread, and by 1, 50 and 500 tasks, who pass the Flows they hold. "Client CPU" is the
  CPU time of this process for each call, "server CPU" that of all nodes together. Many tasks fill the one core that a
  process can use, and that limits their rate, not the servers.
- Sent: whole lives, prepared as for `transition_cpu`, 100 changes to a packet, a thread for each node and two packets
  under way to it. To send them costs little, so here the servers are the limit, and the cores they share.

What more cores would do is computed, and the row says so: with a core for each node, and clients enough, the busiest
node is the limit, at its CPU time for each transition of all. Three masters are not equally busy, because they cannot
have equally many of the 16 partitions: one has six.

Fair, because flows take the partitions in turn or at random, so every master is asked; and every change must count.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

import attrs

from benchmarks.lives import LIFE, Life, create, is_small, load_scripts, prepare, spread
from benchmarks.measure import Plan, RawConnection, Row, ServerCpu, alone, compare, interleaved, pack
from benchmarks.server import Cluster, Server, clustering
from redisflow import AsyncFlowManager, Flow, FlowManager, FlowStatus
from redisflow.keys import DEFAULT_PARTITIONS, SLOTS, slot_of
from redisflow.waits import to_us

if TYPE_CHECKING:
    import redis

_MASTERS = 3
_PREFIX = "spread"
_TASKS = {1: 500, 50: 10_000, 500: 10_000}  # calls of all of them together
_THREAD_CALLS = 500
# Short turns, and many: neighbours in time are disturbed alike.
_TURNS = 4
_LIVES = 3_000
_PER_PACKET = 100
_CLIENT_AT_MOST = 1.15


@attrs.frozen
class Cost:
    """What a number of calls or changes came to.

    Attributes:
        rate: of them in a second.
        client_us: CPU time of this process for each.
        node_us: CPU time of each node, also for each of them all.
    """

    rate: float
    client_us: float
    node_us: Sequence[float]

    @property
    def server_us(self) -> float:
        return sum(self.node_us)

    @property
    def client_cores(self) -> float:
        return self.client_us * self.rate / 1e6

    @property
    def server_cores(self) -> float:
        return self.server_us * self.rate / 1e6

    @property
    def busiest(self) -> float:
        """The busiest node's share of the servers' CPU time, in per cent."""
        return 100 * max(self.node_us) / self.server_us

    @property
    def idlest(self) -> float:
        return 100 * min(self.node_us) / self.server_us

    @property
    def with_a_core_each(self) -> float:
        """The rate if every node had a core to itself, and clients enough."""
        return 1e6 / max(self.node_us)


# Of three masters and of one server, by round.
Rounds = Sequence[tuple[Cost, Cost]]


@attrs.frozen
class Store:
    """One server or a cluster, with its managers and what measures it."""

    clients: Sequence[redis.Redis]
    connections: Sequence[RawConnection]
    flows: FlowManager
    task_flows: AsyncFlowManager
    runner: asyncio.Runner

    @classmethod
    @contextmanager
    def on(cls, place: Server | Cluster, runner: asyncio.Runner) -> Iterator[Store]:
        """Use a server or a cluster, emptied."""
        nodes = place.masters if isinstance(place, Cluster) else [place]
        with ExitStack() as stack:
            clients = [stack.enter_context(node.client()) for node in nodes]
            connections = [stack.enter_context(RawConnection(node.port)) for node in nodes]
            flows = stack.enter_context(FlowManager.from_url(place.url, prefix=_PREFIX))
            task_flows = AsyncFlowManager.from_url(place.url, prefix=_PREFIX)
            store = cls(clients, connections, flows, task_flows, runner)
            store.empty()
            load_scripts(flows)
            try:
                yield store
            finally:
                runner.run(task_flows.aclose())

    def empty(self) -> None:
        for client in self.clients:
            client.flushall()

    def cost(self, count: int, work: Callable[[], None]) -> Cost:
        """Do work that comes to so many calls or changes."""
        nodes = [ServerCpu(client) for client in self.clients]
        before = [node.used_s() for node in nodes]
        client_s, began = time.process_time(), time.perf_counter()
        work()
        seconds, client_s = time.perf_counter() - began, time.process_time() - client_s
        spent = [node.used_s() - used for node, used in zip(nodes, before, strict=True)]
        return Cost(count / seconds, 1e6 * client_s / count, [1e6 * node_s / count for node_s in spent])


def run(server: Server, plan: Plan) -> Iterator[Row]:
    """Measure the rows."""
    with clustering(server, _MASTERS) as cluster, asyncio.Runner() as runner, ExitStack() as stack:
        three, one = (stack.enter_context(Store.on(place, runner)) for place in (cluster, server))
        yield from _called(three, one, plan)
        yield from _sent(three, one, plan)


def _rounds(repeats: int, three: Callable[[], Cost], one: Callable[[], Cost]) -> Rounds:
    return [(a, b) for a, b in interleaved(repeats, three, one)]


def _row(name: str, rounds: Rounds, figure: str, unit: str, at_most: float | None = None) -> Row:
    pairs = [(getattr(three, figure), getattr(one, figure)) for three, one in rounds]
    return compare(name, "one server", pairs, unit=unit, at_most=at_most)


def _median(costs: Sequence[Cost], figure: str) -> float:
    median: float = statistics.median(getattr(cost, figure) for cost in costs)
    return median


def _note(text: str) -> None:
    print(f"cluster: {text}")


# --- called ----------------------------------------------------------------------------------------------


def _called(three: Store, one: Store, plan: Plan) -> Iterator[Row]:
    loads: dict[str, Callable[[Store], Callable[[], Cost]]] = {
        "1 thread": partial(_by_thread, calls=plan.size(_THREAD_CALLS))
    }
    for tasks, calls in _TASKS.items():
        loads[_tasks_named(tasks)] = partial(_by_tasks, tasks=tasks, calls=plan.size(calls))
    measured = {
        load: _rounds(plan.repeats * _TURNS, contestant(three), contestant(one)) for load, contestant in loads.items()
    }
    for load, rounds in measured.items():
        name = f"update_state, {_MASTERS} masters, {load}"
        yield _row(f"{name}: client CPU", rounds, "client_us", "µs", _CLIENT_AT_MOST)
        yield _row(f"{name}: server CPU", rounds, "server_us", "µs")
        yield _row(f"{name}: rate", rounds, "rate", "calls/s")
        yield _row(f"{name}: client's cores", rounds, "client_cores", "cores")
    most = _tasks_named(max(_TASKS))
    of_three, of_one = zip(*measured[most], strict=True)
    _note(
        f"{most}: the client, one process, fills {_median(of_three, 'client_cores'):.0%} of a core on {_MASTERS} "
        f"masters, {_median(of_one, 'client_cores'):.0%} on one server; near 100% it is the limit, not they."
    )


def _tasks_named(tasks: int) -> str:
    return f"{tasks} {'task' if tasks == 1 else 'tasks'}"


def _held(store: Store, callers: int) -> list[list[Flow]]:
    """Running flows for each caller, of all callers together in every partition."""
    ids = spread(max(callers, DEFAULT_PARTITIONS))
    made = [store.flows.start_running(create(store.flows, flow_id, uuid4().hex)) for flow_id in ids]
    return [made[caller::callers] for caller in range(callers)]


def _changes(held: Sequence[Sequence[Flow]]) -> int:
    return sum(flow.revision for flows in held for flow in flows)


def _by_thread(store: Store, *, calls: int) -> Callable[[], Cost]:
    (held,) = _held(store, 1)

    def work() -> None:
        for number in range(calls):
            turn = number % len(held)
            held[turn] = store.flows.update_state(held[turn], _patch(number))

    return partial(_counted, store, [held], calls, work)


def _by_tasks(store: Store, *, tasks: int, calls: int) -> Callable[[], Cost]:
    held = _held(store, tasks)

    async def drive(flows: list[Flow]) -> None:
        for number in range(calls // tasks):
            turn = number % len(flows)
            flows[turn] = await store.task_flows.update_state(flows[turn], _patch(number))

    async def drive_all() -> None:
        await asyncio.gather(*map(drive, held))

    return partial(_counted, store, held, calls, lambda: store.runner.run(drive_all()))


def _counted(store: Store, held: Sequence[Sequence[Flow]], calls: int, work: Callable[[], None]) -> Cost:
    before = _changes(held)
    cost = store.cost(calls, work)
    assert _changes(held) == before + calls, "changes were lost"
    return cost


def _patch(number: int) -> dict[str, object]:
    return {"processed": number, "last_message": "inbox/2026/17"}


# --- sent ------------------------------------------------------------------------------------------------


def _sent(three: Store, one: Store, plan: Plan) -> Iterator[Row]:
    lives = prepare(one.flows, plan.size(_LIVES))
    with ThreadPoolExecutor(_MASTERS) as pool:
        rounds = _rounds(plan.repeats, *(partial(_live, store, pool, lives) for store in (three, one)))
    name = f"sent lives, {_MASTERS} masters"
    yield _row(f"{name}: server CPU", rounds, "server_us", "µs")
    yield _row(f"{name}: rate", rounds, "rate", "transitions/s")
    yield _row(f"{name}: servers' cores", rounds, "server_cores", "cores")
    yield _row(f"{name}: client's cores", rounds, "client_cores", "cores")
    yield _row(f"{name}: computed, a core each", rounds, "with_a_core_each", "transitions/s")
    of_three, of_one = zip(*rounds, strict=True)
    for which in ("busiest", "idlest"):
        shares = [getattr(cost, which) for cost in of_three]
        yield alone(f"{name}: {which} node's share of server CPU", shares, unit="%")
    _note_on_cores(of_three, of_one)


def _live(store: Store, pool: ThreadPoolExecutor, lives: Sequence[Life]) -> Cost:
    """Live prepared lives in an empty store."""
    store.empty()
    by_node: list[dict[Life, bytes]] = [{} for _ in store.connections]
    for life in lives:
        created_at = create(store.flows, life.flow_id, life.op_id).created_at
        tag = life.changes[0].flow_key.partition(b"}")[0].removeprefix(b"{").decode()
        by_node[slot_of(tag) * len(by_node) // SLOTS][life] = b"%d" % to_us(created_at)

    def work() -> None:
        assert all(pool.map(_send, store.connections, by_node)), "a change was refused"

    cost = store.cost(len(lives) * len(LIFE), work)
    assert store.flows.count_by_status()[FlowStatus.FINISHED] == len(lives), "changes were lost"
    return cost


def _send(connection: RawConnection, lives: dict[Life, bytes]) -> bool:
    """Send the changes of lives, last changed at those times; each packet before the one ahead of it is answered.

    Returns whether all were applied.
    """
    applied, ahead = True, list[Life]()

    def exchange(packet: bytes) -> None:
        nonlocal applied
        for life, reply in zip(ahead, connection.exchange(packet, len(ahead)), strict=True):
            applied = is_small(reply) and applied
            lives[life] = reply

    in_order = list(lives)
    chunks = [in_order[start : start + _PER_PACKET] for start in range(0, len(in_order), _PER_PACKET)]
    for number in range(len(LIFE)):
        for chunk in chunks:
            if chunk is ahead:  # there is no other
                exchange(b"")
                ahead = []
            exchange(pack([life.changes[number].script_call(lives[life]) for life in chunk]))
            ahead = chunk
    exchange(b"")
    return applied


def _note_on_cores(of_three: Sequence[Cost], of_one: Sequence[Cost]) -> None:
    three, one = partial(_median, of_three), partial(_median, of_one)
    _note(
        f"sent lives, measured: {three('rate'):,.0f} transitions/s on {_MASTERS} masters, {one('rate'):,.0f} on one "
        f"server, x {three('rate') / one('rate'):.2f}. Of the {os.cpu_count()} cores here {_MASTERS} masters took "
        f"{three('server_cores'):.2f} and the client {three('client_cores'):.2f}; one server {one('server_cores'):.2f} "
        f"and the client {one('client_cores'):.2f}. Where they take all, the cores are the limit."
    )
    _note(
        f"sent lives, computed: a transition takes {three('server_us'):.1f} µs of server CPU on {_MASTERS} masters, "
        f"{one('server_us'):.1f} µs on one server; the busiest master has {three('busiest'):.0f}% of it, the idlest "
        f"{three('idlest'):.0f}%. With a core for each node, and clients enough, that makes "
        f"{three('with_a_core_each'):,.0f} transitions/s on {_MASTERS} masters, {one('with_a_core_each'):,.0f} on one "
        f"server, x {three('with_a_core_each') / one('with_a_core_each'):.2f}."
    )
