"""Real clusters for tests: nodes joined by `CLUSTER` commands, failed over, and their slots moved."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from itertools import combinations
from typing import Any, Self

import attrs
import redis

from tests.support.proxy import FaultProxy
from tests.support.servers import QUICK_SYNC, Engine, Server
from tests.support.waiting import wait_until

SLOTS = 16_384
# Linux answers on all of 127/8, so a proxy may have the port of the node behind it.
PROXY_HOST = "127.0.0.2"
_HEALTHY_WITHIN_S = 30.0
_GIVEN_UP_AFTER_S = 6.0  # a node gives a manual failover up after five seconds, and tells nobody
_SETTINGS = (
    *QUICK_SYNC,
    *("--cluster-enabled", "yes"),
    *("--cluster-allow-replica-migration", "no"),  # replicas stay where a test has put them
    *("--cluster-replica-validity-factor", "0"),  # and stand for election however long they were cut off
    *("--repl-ping-replica-period", "1"),  # clients are told of a replica once it has received something
)


@attrs.frozen
class Peer:
    """A line of `CLUSTER NODES`: a node as one of them sees it."""

    id: str
    address: str
    flags: frozenset[str]
    primary_id: str
    linked: bool
    epoch: int
    slots: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read a line."""
        node_id, address, flags, primary_id, _, _, epoch, link, *slots = line.split()
        settled = tuple(item for item in slots if not item.startswith("["))  # the others are on their way
        who = frozenset(flags.split(",")) - {"myself"}
        return cls(node_id, address, who, primary_id, link == "connected", int(epoch), settled)

    @property
    def ranges(self) -> list[range]:
        """The slots it serves."""
        pairs = [(first, last or first) for first, _, last in (item.partition("-") for item in self.slots)]
        return [range(int(first), int(last) + 1) for first, last in pairs]

    @property
    def standing(self) -> tuple[Any, ...]:
        """What all must agree upon."""
        return self.address, self.flags, self.primary_id, self.slots


@attrs.define(eq=False)
class Node:
    """A server of a cluster, and the proxy in front of it, if there is one."""

    server: Server
    id: str
    proxy: FaultProxy | None = None

    def __str__(self) -> str:
        return f"node {self.server.port}"

    @property
    def address(self) -> str:
        """Where clients are told to find it."""
        return f"{self.proxy.host if self.proxy else '127.0.0.1'}:{self.server.port}"

    @property
    def role(self) -> str:
        """What it takes itself for: `primary` or `replica`."""
        return "replica" if "slave" in self.myself().flags else "primary"

    def cluster(self, *args: Any) -> Any:
        """Run a `CLUSTER` command on it."""
        return self.server.raw.execute_command("CLUSTER", *args)

    def peers(self) -> dict[str, Peer]:
        """Every node it knows, itself too, by id."""
        lines = self.cluster("NODES").splitlines()
        return {peer.id: peer for peer in map(Peer.parse, lines)}

    def myself(self) -> Peer:
        """Return its own line."""
        return self.peers()[self.id]

    def replicate(self, primary: Node) -> None:
        """Make it a replica, once it knows the primary by its true id."""
        wait_until(lambda: primary.id in self.peers(), description=f"{self} knows {primary}")
        self.cluster("REPLICATE", primary.id)


class Cluster:
    """A Redis Cluster on 127.0.0.1; leaving the context ends every node.

    A crashed primary is replaced within about three seconds. Replicas move to no other primary by themselves.

    Proxied, a node's proxy listens on the node's port of 127.0.0.2, and the nodes announce that host: a client
    that follows `CLUSTER SLOTS`, `CLUSTER SHARDS`, `MOVED` or `ASK` goes through the proxies. Replication,
    `MIGRATE` and the cluster bus do not.
    """

    def __init__(
        self,
        engine: Engine,
        *config_args: str,
        masters: int = 3,
        replicas: int = 1,
        persistence: bool = True,
        proxied: bool = False,
        node_timeout_ms: int = 1000,
        tls: Sequence[str] = (),
    ) -> None:
        """Describe a cluster; entering the context starts it.

        Args:
            engine: what every node runs.
            config_args: for every node, as for a `Server`.
            masters: how many nodes share the slots, evenly.
            replicas: how many each of them has.
            persistence: whether nodes keep their data over a restart.
            proxied: whether clients are led through a `FaultProxy` per node.
            node_timeout_ms: after which silence a node is taken for dead.
            tls: settings of a certificate, as for a `Server`; nodes then speak TLS with each other, too.
        """
        self.engine = engine
        self.masters = masters
        self.replicas = replicas
        self.persistence = persistence
        self.proxied = proxied
        self.nodes: list[Node] = []
        self._config_args = (*_SETTINGS, "--cluster-node-timeout", str(node_timeout_ms), *config_args)
        if proxied:
            announced = ("--cluster-announce-hostname", PROXY_HOST, "--cluster-preferred-endpoint-type", "hostname")
            self._config_args += announced
        self._tls = tls
        if tls:
            self._config_args += ("--tls-cluster", "yes")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    # --- looking at it

    @property
    def url(self) -> str:
        """Every node, running or not."""
        return f"redis{'s' if self._tls else ''}+cluster://" + ",".join(node.address for node in self.nodes)

    @property
    def up(self) -> list[Node]:
        """The nodes that run and are not frozen."""
        return [node for node in self.nodes if node.server.up]

    @property
    def primaries(self) -> list[Node]:
        """The nodes of these that take themselves for primaries, those without slots too."""
        return [node for node in self.up if node.role == "primary"]

    def primary_of(self, slot: int) -> Node:
        """Return who serves a slot; the newest, if several say so."""
        claims = [(node.myself(), node) for node in self.primaries]
        found = [(own.epoch, node) for own, node in claims if any(slot in served for served in own.ranges)]
        assert found, f"nobody serves slot {slot}"
        return max(found, key=lambda claim: claim[0])[1]

    def replicas_of(self, primary: Node) -> list[Node]:
        """Return the nodes that say they follow it."""
        return [node for node in self.up if node.myself().primary_id == primary.id]

    def clients(self) -> list[redis.Redis]:
        """Return a client of each primary; they go through no proxy."""
        return [node.server.client() for node in self.primaries]

    def await_healthy(self) -> None:
        """Wait until the nodes that run serve all slots, agree on who serves what, and replicate.

        A node that is down is no illness, unless it is thought to serve a slot.
        """
        wait_until(
            self._check,
            description="the cluster is healthy",
            timeout_s=_HEALTHY_WITHIN_S,
            ignoring=(AssertionError, redis.RedisError),
        )

    # --- faults

    def kill(self, node: Node) -> None:
        """End it as a crash would."""
        node.server.kill()

    def restart(self, node: Node) -> None:
        """Start it again, where it was, with the data it has kept; stop it first if it runs."""
        node.server.restart()

    def pause(self, node: Node) -> None:
        """Freeze it."""
        node.server.pause()

    def resume(self, node: Node) -> None:
        """Let it go on; it may take itself for a primary for a moment more."""
        node.server.resume()

    def fail_over(self, replica: Node, how: str = "") -> None:
        """Make a replica the primary, and wait until all know.

        Redis 7.0 takes its time over a replica that was elected less than four seconds ago: it may win by the votes
        of that election, and be put right by the others, or wait for new ones in vain.

        Args:
            replica: who shall be primary.
            how: `""` hands over without losing a write; `"FORCE"` does not ask the primary, `"TAKEOVER"` nobody.
        """
        deadline = time.monotonic() + _HEALTHY_WITHIN_S
        while replica.role != "primary":
            assert time.monotonic() < deadline, f"{replica} is not promoted"
            replica.cluster("FAILOVER", *how.split())
            with suppress(AssertionError):
                wait_until(lambda: replica.role == "primary", description="it is promoted", timeout_s=_GIVEN_UP_AFTER_S)
            self.await_healthy()

    # --- slots

    def add_empty_node(self) -> Node:
        """Return a new primary without slots, once all know it."""
        node = self._add_node()
        for other in self.up:
            if other is not node:
                node.cluster("MEET", "127.0.0.1", other.server.port)
        self.await_healthy()
        return node

    def move_slots(
        self,
        slots: Iterable[int],
        source: Node,
        target: Node,
        *,
        keys_per_migrate: int = 10,
        pause_between: float = 0.0,
    ) -> None:
        """Reshard while clients go on: one slot after the other, as `redis-cli --cluster reshard` does.

        Args:
            slots: what to move.
            source: the primary that serves them.
            target: the primary that shall.
            keys_per_migrate: how many keys travel at once.
            pause_between: seconds of rest after each such lot.
        """
        for slot in slots:
            move = SlotMove(self, slot, source, target)
            move.begin()
            while move.move_keys(keys_per_migrate):
                time.sleep(pause_between)
            move.finish()
        self.await_healthy()

    def _start(self) -> None:
        for _ in range(self.masters * (1 + self.replicas)):
            self._add_node()
        for number, node in enumerate(self.nodes, 1):  # or they would have to settle who has which
            node.cluster("SET-CONFIG-EPOCH", number)
        primaries, replicas = self.nodes[: self.masters], self.nodes[self.masters :]
        for number, primary in enumerate(primaries):
            first, end = (SLOTS * n // self.masters for n in (number, number + 1))
            primary.cluster("ADDSLOTSRANGE", first, end - 1)
        for node, other in combinations(self.nodes, 2):  # all of them: hearsay takes its time
            node.cluster("MEET", "127.0.0.1", other.server.port)
        for number, replica in enumerate(replicas):
            replica.replicate(primaries[number % self.masters])
        self.await_healthy()

    def _add_node(self) -> Node:
        server = self._stack.enter_context(
            Server(self.engine, *self._config_args, persistence=self.persistence, tls=self._tls)
        )
        proxy = None
        if self.proxied:
            proxy = self._stack.enter_context(FaultProxy(server.port, host=PROXY_HOST, port=server.port))
        node = Node(server, server.raw.execute_command("CLUSTER", "MYID"), proxy)
        self.nodes.append(node)
        return node

    def _check(self) -> bool:
        up = {node.id: node for node in self.up}
        views = {node: node.peers() for node in up.values()}
        own = {node_id: views[node][node_id] for node_id, node in up.items()}
        for node, peers in views.items():
            assert "cluster_state:ok" in node.cluster("INFO"), f"{node} says the cluster fails"
            for node_id, peer in own.items():
                assert node_id in peers, f"{node} does not know {up[node_id]}"
                assert peers[node_id].linked, f"{node} has no link to {up[node_id]}"
                assert peers[node_id].standing == peer.standing, f"{node} knows old things of {up[node_id]}"
        assert sum(len(served) for peer in own.values() for served in peer.ranges) == SLOTS, "slots are not served"
        followers = {up[node_id]: peer.primary_id for node_id, peer in own.items() if "slave" in peer.flags}
        for node, primary_id in followers.items():
            assert primary_id in up, f"{node} follows a dead primary"
            port, primary_port = node.server.port, up[primary_id].server.port
            _, _, *following = node.server.raw.execute_command("ROLE")
            assert following[:2] == [primary_port, "connected"], f"{node} has no link to its primary"
            _, _, followed_by = up[primary_id].server.raw.execute_command("ROLE")
            assert str(port) in {other for _, other, _ in followed_by}, f"{node} is not online"
        for node in views:
            told = {about[2] for served in node.cluster("SLOTS") for about in served[2:]}
            for replica, primary_id in followers.items():
                assert replica.id in told or not own[primary_id].slots, f"{node} tells clients nothing of {replica}"
        return True


class SlotMove:
    """A slot on its way from one primary to another, step by step: a test may stop in the midst of it.

    Between `begin` and `finish` the source answers for the keys it still has and sends clients on (`ASK`) for
    all others; a command on keys here and there gets `TRYAGAIN`.
    """

    def __init__(self, cluster: Cluster, slot: int, source: Node, target: Node) -> None:
        self.slot = slot
        self.source = source
        self.target = target
        self._cluster = cluster
        self._keys_at_source: Any = source.server.client()  # names of keys need not be text

    def begin(self) -> None:
        """Say on both sides what is coming; no key moves yet."""
        self.target.cluster("SETSLOT", self.slot, "IMPORTING", self.source.id)
        self.source.cluster("SETSLOT", self.slot, "MIGRATING", self.target.id)

    def move_keys(self, count: int) -> int:
        """Move up to so many keys; return how many went."""
        names = self._keys_at_source.execute_command("CLUSTER", "GETKEYSINSLOT", self.slot, count)
        if names:
            where = ("127.0.0.1", self.target.server.port, "", 0, 5000)
            self._keys_at_source.execute_command("MIGRATE", *where, "KEYS", *names)
        return len(names)

    def finish(self) -> None:
        """Move what is left, and give the slot to the target."""
        while self.move_keys(100):
            pass
        # The target first: were the source first, nobody would serve the slot for a moment.
        others = [node for node in self._cluster.primaries if node not in {self.source, self.target}]
        for node in (self.target, self.source, *others):
            node.cluster("SETSLOT", self.slot, "NODE", self.target.id)
