"""Carries packets to the nodes of a cluster, for the asyncio manager: a wire for each node."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from redisflow.aio_wire import AsyncWire
from redisflow.calls import Again, Block, Lost, Packet, Primaries, Refusal, Reply
from redisflow.cluster_wire import ANSWER_WITHIN_S, LOOK_EVERY_S, NO_NODE_ANSWERS, must_count
from redisflow.singleflight import AsyncGathering, AsyncSingleFlight
from redisflow.topology import SLOTS_COMMAND, Address, Part, Topology, no_cluster, uncovered
from redisflow.wire import COUNT_EVERY_S

try:
    from redisflow.multiplex import MultiplexedWire
except ImportError:  # it is made of hiredis, for which this machine has no wheel
    MultiplexedWire = AsyncWire  # type: ignore[assignment, misc]  # the same, a connection for each packet

if TYPE_CHECKING:
    from redisflow.connection import ClusterEndpoint, Endpoint


class AsyncClusterWire:
    """Connections to the nodes of a cluster, shared by the tasks of one event loop."""

    def __init__(self, cluster: ClusterEndpoint, *, max_connections: int, acquire_timeout_s: float) -> None:
        """Bind to the running event loop."""
        self._cluster = cluster
        self._wire_to = partial(MultiplexedWire, max_connections=max_connections, acquire_timeout_s=acquire_timeout_s)
        self._topology = Topology(cluster.seeds, cluster.remap)
        self._wires: dict[Address, AsyncWire] = {}
        self._wire_of: dict[int | None, AsyncWire] = {}  # by slot, as long as the topology stays
        self.gathering = AsyncGathering()
        self._looking = AsyncSingleFlight[None](self._ask_around, failing=NO_NODE_ANSWERS, slack_s=LOOK_EVERY_S)

    def exchange(self, packet: Packet) -> Awaitable[list[Reply]]:
        """Send the commands of a packet to their nodes and read a reply for each.

        Raises:
            Lost: no node could be asked where they belong.
        """
        slots = packet.slots
        if (
            packet.again is None
            and packet.confirm is None
            and len(slots) == 1
            and (wire := self._wire_of.get(slots[0])) is not None
        ):
            return wire.exchange(packet)
        return self._exchange(packet)

    async def _exchange(self, packet: Packet) -> list[Reply]:
        await self._look(packet.again, packet.until_s, counts=must_count(packet.confirm))
        replies: list[Reply] = [uncovered(slot) for slot in packet.slots]
        parts = list(self._topology.parts(packet.slots, packet.again))
        if len(packet.slots) == 1 and parts and not parts[0].asking and packet.slots[0] is not None:
            self._wire_of[packet.slots[0]] = self._at(parts[0].address)
        await asyncio.gather(*(self._carry(part, packet, replies) for part in parts))
        return replies

    async def _carry(self, part: Part, packet: Packet, replies: list[Reply]) -> None:
        try:
            part.place(await self._at(part.address).exchange(part.packet(packet)), replies)
        except Lost as lost:
            part.lose(lost, replies)

    async def block(self, block: Block) -> list[Reply]:
        """Wait for entries of a stream; one reply.

        Raises:
            Lost: the connection failed.
        """
        await self._look(block.again)
        part = self._topology.place(block.slot, block.again)
        if part is None:
            return [uncovered(block.slot)]
        return await self._at(part.address).block(block, asking=part.asking)

    async def subscribe(self, channels: Sequence[bytes]) -> Any:
        """A connection of its own that hears channels, on any node: a message reaches them all.

        Raises:
            Lost: the connection failed.
        """
        await self._look(None)
        address = self._topology.owner(None)
        return await self._at(address or self._cluster.seeds[0]).subscribe(channels)

    async def primaries(self, primaries: Primaries) -> list[tuple[int, ...]]:
        """A slot of each node that takes changes; one reply."""
        await self._look(primaries.again)
        return [self._topology.primaries()]

    async def pause(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Close every connection. A call under way is lost."""
        wires = list(self._wires.values())
        self._wires.clear()
        self._wire_of.clear()
        for wire in wires:
            await wire.close()

    def _at(self, address: Address) -> AsyncWire:
        wire = self._wires.get(address)
        if wire is None:
            wire = self._wires[address] = self._wire_to(self._cluster.endpoint_at(address))
        return wire

    async def _look(self, again: Again | None, until_s: float = math.inf, *, counts: bool = False) -> None:
        """Ask who has what, if nothing is known or what is known did not serve.

        Args:
            again: what earlier attempts came to.
            until_s: the deadline, in monotonic seconds.
            counts: ask also if the number of replicas that is known is old.

        Raises:
            Lost: no node said, and nothing is known.
        """
        if again is not None:
            self._topology.learn(again)
            self._wire_of.clear()
        elif self._topology.known and not (counts and self._topology.is_old(COUNT_EVERY_S)):
            return
        try:
            await self._looking(until_s, again)
        except Lost:
            if again is not None or not self._topology.known:
                raise

    async def _ask_around(self, again: Again | None) -> None:
        self._topology.note_asked()
        failure = Lost(NO_NODE_ANSWERS, sent=False)
        for address in self._topology.informants(again):
            try:
                packet = Packet((None,), (SLOTS_COMMAND,), time.monotonic() + ANSWER_WITHIN_S)
                (reply,) = await self._at(address).exchange(packet)
            except Lost as lost:
                message = f"{NO_NODE_ANSWERS}: {lost}"
                failure = Lost(message, sent=False, lasting=lost.lasting, code=lost.code)
                failure.__cause__ = lost.__cause__
                continue
            if not isinstance(reply, Refusal):
                self._topology.take(reply, address)
                return await self._drop_the_gone()
            failure = no_cluster(reply)
        raise failure

    async def _drop_the_gone(self) -> None:
        self._wire_of.clear()
        for address in self._wires.keys() - self._topology.nodes():
            await self._wires.pop(address).close(for_good=False)  # what was meant for it belongs to another node now


def wire_to(
    endpoint: Endpoint | ClusterEndpoint, *, max_connections: int, acquire_timeout_s: float
) -> AsyncWire | AsyncClusterWire:
    """The wire for an endpoint, bound to the running event loop."""
    kind: Any = AsyncClusterWire if endpoint.is_cluster else MultiplexedWire if endpoint.real_server else AsyncWire
    wire: AsyncWire | AsyncClusterWire = kind(
        endpoint, max_connections=max_connections, acquire_timeout_s=acquire_timeout_s
    )
    return wire
