"""The connection of an asyncio manager and its views."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any

from redisflow.aio_cluster_wire import AsyncClusterWire, wire_to
from redisflow.aio_wire import AsyncWire
from redisflow.calls import Block, Lost, Packet, Primaries, T, Together
from redisflow.connection import ClusterEndpoint, Endpoint
from redisflow.delivery import Policy, Step, deliver
from redisflow.link import LinkView
from redisflow.ops import upkeep
from redisflow.ops.namespace import Namespace
from redisflow.settings import Settings
from redisflow.singleflight import AsyncSingleFlight


class AsyncLink:
    """How a manager and its views reach their server: connected when it is first needed.

    Attributes:
        wire: carries packets; `None` while there is no connection.
        policy: how calls are delivered over it.
        may_confirm: whether the user is known to have the permissions to wait for replicas.
        settings: the options.
    """

    policy: Policy

    def __init__(self, endpoint: Callable[[], Awaitable[Endpoint | ClusterEndpoint]], settings: Settings) -> None:
        """Take what finds out where to connect to, and the options."""
        self.wire: AsyncWire | AsyncClusterWire | None = None
        self.may_confirm = False
        self._endpoint = endpoint
        self.settings = settings
        self._connecting: AsyncSingleFlight[AsyncWire | AsyncClusterWire] | None = None

    async def connect(self, namespace: Namespace, *, confirms: bool = False) -> AsyncWire | AsyncClusterWire:
        """Connect, unless that is done, and check the server and the namespace.

        Args:
            namespace: which.
            confirms: whether a view wants to wait for replicas, though the link may not.
        """
        if self._connecting is None:
            self._connecting = AsyncSingleFlight(self._connect)
        wire = await self._connecting(math.inf, namespace)
        if confirms and not self.may_confirm:
            await drive(wire, deliver(upkeep.check_confirming(namespace), self.policy))
            self.may_confirm = True
        return wire

    async def _connect(self, namespace: Namespace) -> AsyncWire | AsyncClusterWire:
        if self.wire is None:
            endpoint, settings = await self._endpoint(), self.settings
            wire = wire_to(endpoint, max_connections=settings.max_connections, acquire_timeout_s=settings.deadline_s)
            self.policy = settings.policy(real_server=endpoint.real_server, cluster=endpoint.is_cluster)
            self.may_confirm = self.policy.confirm is not None
            check = upkeep.connect(
                namespace,
                real_server=endpoint.real_server,
                allow_eviction=settings.allow_eviction,
                confirms=self.may_confirm,
            )
            try:
                await drive(wire, deliver(check, self.policy))
            except BaseException:
                await wire.close()
                raise
            self.wire = wire
        return self.wire

    async def close(self) -> None:
        """Close the connections. The next may be opened in another event loop."""
        wire, self.wire, self._connecting = self.wire, None, None
        if wire is not None:
            await wire.close()

    def confirming(self, durability: str) -> LinkView:
        """The same connection, with changes that wait for other replicas."""
        return LinkView(self, durability)


async def drive(wire: AsyncWire | AsyncClusterWire, steps: Generator[Step, Any, T]) -> T:
    """Carry out the steps of a delivery, and return what it comes to."""
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, Packet):
                    reply: Any = await wire.exchange(step)
                elif isinstance(step, Block):
                    reply = await wire.block(step)
                elif isinstance(step, Primaries):
                    reply = await wire.primaries(step)
                elif isinstance(step, Together):
                    reply = await wire.gathering(step, partial(drive, wire))
                else:
                    await wire.pause(step.seconds)
                    reply = None
            except Lost as lost:
                step = steps.throw(lost)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result
