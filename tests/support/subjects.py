"""What the contract suite runs against: every backend, and both shells behind one synchronous face."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Self
from uuid import UUID, uuid4

import attrs
import fakeredis
import redis

from redisflow import (
    AsyncFlowManager,
    AsyncWaitEngine,
    ExternalEvent,
    Flow,
    FlowManager,
    FlowStatus,
    Manual,
    StepObservation,
    WaitEngine,
    connection,
)
from redisflow.calls import Packet
from redisflow.codec import OP_DIGITS
from redisflow.keys import DEFAULT_PARTITIONS, SLOTS, Keyspace
from redisflow.ops.namespace import is_drawn, op_id_of
from tests.support.clusters import Cluster
from tests.support.servers import ENGINES, Engine, Server

_CALL_TIMEOUT_S = 60.0

# The newest of each product: another Valkey would cost the suite a third of its time again.
NEWEST = list({engine.is_valkey: engine for engine in sorted(ENGINES, key=lambda engine: engine.version)}.values())
BACKENDS = {"memory": None, **{engine.name: engine for engine in NEWEST}}
CLUSTER = "cluster"  # of the first engine

TOMBSTONE_FIELDS = {b"gone", b"etag", b"past", b"life"}

WHO: dict[str, Any] = {
    "controller_id": "kate/inbox",
    "goal": "triage inbox",
    "owner_session_key": "agent:kate:session:abc",
    "requester_origin": "user-1",
    "current_step": "classify",
}
STATE = {"messages": 10, "processed": 0}


class LoopThread:
    """An event loop in a thread of its own, which runs coroutines for other threads."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the event loop does not stop"
        self.loop.close()

    def run(self, awaitable: Awaitable[Any], *, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        """Wait for an awaitable's value."""

        async def main() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(main(), self.loop).result(timeout_s)

    def iterate(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        """Yield what an async iterator does."""
        end = object()
        try:
            while (item := self.run(anext(items, end))) is not end:
                yield item
        finally:
            if (aclose := getattr(items, "aclose", None)) is not None:  # one that is no generator needs no closing
                self.run(aclose())


class Blocking:
    """An asyncio object with its coroutine methods made synchronous."""

    def __init__(self, target: Any, thread: LoopThread) -> None:
        self.target = target
        self._thread = thread

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.target, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **options: Any) -> Any:
            outcome = attribute(*args, **options)
            if isinstance(outcome, AsyncIterator):
                return self._thread.iterate(outcome)
            if isinstance(outcome, type(self.target)):
                return Blocking(outcome, self._thread)
            return self._thread.run(outcome)

        return call

    def close(self) -> None:
        """Do what a sync manager calls `close`."""
        self._thread.run(self.target.aclose())


@attrs.frozen
class Backend:
    """One place to keep flows: its URL, and a raw client to look behind the library's back."""

    name: str
    url: str
    raw: redis.Redis
    server: Server | None = None  # None: fakeredis, or a cluster
    fake: fakeredis.FakeServer | None = None
    nodes: Sequence[redis.Redis] = ()

    @classmethod
    def of_server(cls, server: Server) -> Backend:
        """Wrap a running server."""
        return cls(server.engine.name, server.url, server.client(), server)

    @classmethod
    def of_cluster(cls, cluster: Cluster) -> Backend:
        """Wrap a running cluster."""
        port = cluster.nodes[0].server.port
        raw: Any = redis.RedisCluster(host="127.0.0.1", port=port)
        return cls(CLUSTER, cluster.url, raw, nodes=cluster.clients())

    def node_of(self, slot: int) -> redis.Redis:
        """A client of the node that has a slot."""
        return self.nodes[slot * len(self.nodes) // SLOTS] if self.nodes else self.raw

    @classmethod
    def in_memory(cls) -> Backend:
        """Make a fakeredis server of its own, which `memory://` finds by name."""
        name, fake = secrets.token_hex(8), fakeredis.FakeServer()
        connection._fake_servers[name] = fake
        return cls("memory", f"memory://{name}", fakeredis.FakeRedis(server=fake), fake=fake)


class Servers:
    """One running server per engine, started when first asked for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._servers: dict[str, Server] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    @cached_property
    def cluster(self) -> Cluster:
        """Three primaries, without replicas."""
        return self._stack.enter_context(Cluster(ENGINES[0], replicas=0))

    def of(self, engine: Engine) -> Server:
        """Return the server of an engine."""
        if engine.name not in self._servers:
            self._servers[engine.name] = self._stack.enter_context(Server(engine))
        return self._servers[engine.name]


class Subject:
    """One backend under one shell, in a namespace of its own."""

    def __init__(self, backend: Backend, thread: LoopThread | None) -> None:
        """Choose a fresh prefix; `thread` runs the asyncio shell, `None` is the sync one."""
        self.backend = backend
        self.thread = thread
        self.prefix = f"t-{secrets.token_hex(6)}"
        self.keyspace = Keyspace.of(self.prefix, DEFAULT_PARTITIONS)
        self._managers: list[Any] = []

    @property
    def raw(self) -> redis.Redis:
        return self.backend.raw

    @property
    def is_async(self) -> bool:
        return self.thread is not None

    def manager(self, url: str | None = None, **options: Any) -> Any:
        """Return a manager of this shell, closed with the test."""
        cls = FlowManager if self.thread is None else AsyncFlowManager
        manager: Any = cls.from_url(url or self.backend.url, prefix=options.pop("prefix", self.prefix), **options)
        if self.thread is not None:
            manager = Blocking(manager, self.thread)
        self._managers.append(manager)
        return manager

    def rival(self) -> FlowManager:
        """Return a sync manager of the namespace: usable inside a callback, whatever the shell."""
        manager = FlowManager.from_url(self.backend.url, prefix=self.prefix)
        self._managers.append(manager)
        return manager

    def engine(self, flows: Any) -> Any:
        """Return a wait engine of this shell."""
        if self.thread is None:
            return WaitEngine(flows)
        return Blocking(AsyncWaitEngine(flows.target), self.thread)

    @contextmanager
    def running(self, engine: Any, interval: float) -> Iterator[Callable[[], None]]:
        """Run an engine in the background; yields what stops it and waits until it has."""
        if self.thread is None:
            stop = threading.Event()
            failures: list[BaseException] = []

            def run() -> None:
                try:
                    engine.run(interval, stop)
                except BaseException as error:  # noqa: BLE001 - raised where the engine is stopped
                    failures.append(error)

            worker = threading.Thread(target=run, daemon=True)
            worker.start()

            def halt() -> None:
                stop.set()
                worker.join(10)
                assert not worker.is_alive(), "the engine does not stop"
                if failures:
                    raise failures[0]
        else:
            loop_stop = asyncio.Event()
            future = asyncio.run_coroutine_threadsafe(engine.target.run(interval, loop_stop), self.thread.loop)
            loop = self.thread.loop

            def halt() -> None:
                loop.call_soon_threadsafe(loop_stop.set)
                future.result(10)

        try:
            yield halt
        finally:
            halt()

    # --- behind the library's back ---

    def all_keys(self) -> list[bytes]:
        """Every key of the namespace but the one that describes it."""
        found = self.raw.scan_iter(match=f"*{self.prefix}*", count=1000)
        return sorted(key for key in found if key != f"{self.prefix}:meta".encode())

    def snapshot(self) -> dict[bytes, Any]:
        """Return all that the namespace holds, without the tombstones of flows that do not exist."""
        contents = {key: self.read_key(key) for key in self.all_keys()}
        return {
            key: (kind, value) for key, (kind, value) in contents.items() if kind != b"hash" or b"gone" not in value
        }

    def only_tombstones_of(self, *flow_ids: UUID) -> bool:
        """Tell whether the namespace holds the tombstones of these deleted flows, and nothing else."""
        assert self.all_keys() == sorted(self.flow_key(flow_id) for flow_id in flow_ids)
        return all(self.is_tombstone(flow_id) for flow_id in flow_ids)

    def is_tombstone(self, flow_id: UUID) -> bool:
        """Tell whether all that is left of a deleted flow is a tombstone, which is itself gone within an hour."""
        key = self.flow_key(flow_id)
        assert [key] == [kept for kept in self.all_keys() if str(flow_id).encode() in kept]
        kind, fields = self.read_key(key)
        assert (kind, fields.keys()) == (b"hash", TOMBSTONE_FIELDS)
        return 0 < self.raw.pttl(key) <= 3_600_000

    def read_key(self, key: bytes) -> Any:
        """One key's type and content."""
        kind = self.raw.type(key)
        match kind:
            case b"hash":
                return kind, self.raw.hgetall(key)
            case b"zset":
                return kind, self.raw.zrange(key, 0, -1, withscores=True)
            case b"stream":
                return kind, self.raw.xrange(key)
            case b"list":
                return kind, self.raw.lrange(key, 0, -1)
            case b"set":
                return kind, self.raw.smembers(key)
        return kind, self.raw.get(key)

    def flow_key(self, flow_id: UUID) -> bytes:
        """The key of a flow's hash."""
        return self.keyspace.partition_of(flow_id).flow(str(flow_id).encode())

    def fence_of(self, flow_id: UUID) -> bytes:
        """Return a flow's fence, which follows the operation's id in the etag; empty if it has none."""
        etag: Any = self.raw.hget(self.flow_key(flow_id), "etag")
        return bytes(etag or b"")[OP_DIGITS + 1 :]

    def unfenced(self) -> dict[bytes, Any]:
        """Return all that the namespace holds but tombstones, fences and refusals, which a refused call may write."""
        contents = self.snapshot()
        for key, (kind, value) in list(contents.items()):
            if kind == b"hash" and b"etag" in value:
                value[b"etag"] = value[b"etag"][:OP_DIGITS]
            elif b"}:seen:" in key:
                # An operation that was refused has a negative score.
                applied = [(op, score) for op, score in value if score >= 0]
                contents[key] = (kind, applied)
                if not applied:
                    del contents[key]
        return contents

    def events_key(self, flow_id: UUID) -> bytes:
        """The key of a flow's trail."""
        return self.keyspace.partition_of(flow_id).events(str(flow_id).encode())

    def seen_key(self, flow_id: UUID) -> bytes:
        """The key of a flow's index of the operation ids that callers brought."""
        return self.keyspace.partition_of(flow_id).seen(str(flow_id).encode())

    def lengthen(self, flow_id: UUID, count: int) -> None:
        """Add so many events to a trail, behind the library's back."""
        key = self.events_key(flow_id)
        with self.raw.pipeline(transaction=False) as pipe:
            for _ in range(count):
                pipe.xadd(key, {"rev": 1, "kind": "aside", "op": "0" * OP_DIGITS, "payload": b"\x80"})
            pipe.execute()

    def trim(self, flow_id: UUID, kept: int) -> None:
        """Leave just the last events of a trail, behind the library's back."""
        self.raw.xtrim(self.events_key(flow_id), maxlen=kept, approximate=False)

    def listeners(self, channel: bytes) -> int:
        """How many subscribe to a channel."""
        counts = [client.pubsub_numsub(channel) for client in self.backend.nodes or [self.raw]]
        return sum(int(count) for ((_, count),) in counts)

    def members(self, kind: str) -> dict[bytes, float]:
        """The `due` or `waiters` index, all partitions together."""
        index: dict[bytes, float] = {}
        for partition in self.keyspace.partitions:
            scored: Any = self.raw.zrange(getattr(partition, kind), 0, -1, withscores=True)
            index |= dict(scored)
        return index

    def close(self) -> None:
        """Close every manager that was handed out."""
        for manager in self._managers:
            manager.close()


# --- operation ids -------------------------------------------------------------------------------------


def brought_id() -> str:
    """Return a fresh operation id as a caller brings one: a UUID's, which never looks like one of the library's."""
    return uuid4().hex


def drawn_id() -> str:
    """Return a fresh operation id as the library draws one: a caller who brings it has it settled before it is sent."""
    op_id = op_id_of(None)
    assert is_drawn(op_id)
    return op_id


# --- packets -------------------------------------------------------------------------------------------


@contextmanager
def sent_by(manager: FlowManager) -> Iterator[list[Packet]]:
    """Note the packets that a sync manager sends in the block."""
    wire, packets = manager.connect(), []
    exchange = wire.exchange

    def noting(packet: Packet) -> list[Any]:
        packets.append(packet)
        return exchange(packet)

    wire.exchange = noting  # type: ignore[method-assign]  # what is looked through
    try:
        yield packets
    finally:
        wire.exchange = exchange  # type: ignore[method-assign]  # as it was


# --- flows to begin with -------------------------------------------------------------------------------


def create(flows: Any, **options: Any) -> Flow:
    """Create the flow most tests begin with."""
    flow: Flow = flows.create_managed(**WHO | {"state": STATE} | options)
    return flow


def flow_in(flows: Any, status: FlowStatus | str, *, wait: Any = None, **options: Any) -> Flow:
    """Create a flow and lead it into a status by the verbs."""
    flow = create(flows, **options)
    path: dict[str, list[Callable[[Flow], Flow]]] = {
        "created": [],
        "running": [flows.start_running],
        "waiting": [flows.start_running, lambda f: flows.set_waiting(f, Manual() if wait is None else wait)],
        "finished": [flows.start_running, flows.finish],
        "failed": [flows.start_running, lambda f: flows.fail(f, "downstream 503")],
        "cancelled": [flows.cancel],
    }
    for verb in path[status]:
        flow = verb(flow)
    return flow


VERBS: dict[str, Callable[..., Flow]] = {
    "start_running": lambda flows, ref, **o: flows.start_running(ref, **o),
    "set_waiting": lambda flows, ref, **o: flows.set_waiting(ref, ExternalEvent("approvals", "42"), **o),
    "resume": lambda flows, ref, **o: flows.resume(ref, {"approved": True}, **o),
    "finish": lambda flows, ref, **o: flows.finish(ref, {"summary": "10 done"}, **o),
    "fail": lambda flows, ref, **o: flows.fail(ref, "downstream 503", **o),
    "request_cancel": lambda flows, ref, **o: flows.request_cancel(ref, **o),
    "cancel": lambda flows, ref, **o: flows.cancel(ref, **o),
    "update_state": lambda flows, ref, **o: flows.update_state(
        ref, {"errors": []}, next_step="fetch", increment={"processed": 3}, unset=["messages"], **o
    ),
}
# A status each verb may start from.
SOURCE = {"start_running": "created", "resume": "waiting"}


def source_of(verb: str) -> str:
    """A status the verb may start from."""
    return SOURCE.get(verb, "running")


def observed(flow: Any, run_id: str = "cron-42", **options: Any) -> StepObservation:
    """Build an observation of a step."""
    settings: dict[str, Any] = {"task": "classify", "status": "running"}
    return StepObservation(flow_id=flow, run_id=run_id, **settings | options)


def trail(flows: Any, flow: Any) -> list[tuple[str, int, Any]]:
    """Every event, oldest first: kind, revision, payload."""
    return [(event.kind, event.revision, event.payload) for event in flows.iter_events(flow)]


def works(flows: Any) -> None:
    """Lead a flow through its life, with a block in it."""
    flow = create(flows)
    flow = flows.start_running(flow)
    flow = flows.update_state(flow, increment={"processed": 1})
    assert [event.kind for event in flows.watch(flow, after="0", timeout=0.01)][:2] == ["created", "started"]
    flow = flows.finish(flow)
    assert flows.get(flow.id) == flow == flows.wait_for(flow, timeout=5)
    assert flow in flows.list_by_owner(WHO["owner_session_key"])
