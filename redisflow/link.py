"""The connection of a sync manager, and views that share it."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeVar

from redisflow.calls import Block, Lost, Packet, Primaries, T, Together
from redisflow.cluster_wire import ClusterWire, wire_to
from redisflow.connection import ClusterEndpoint, Endpoint
from redisflow.delivery import Policy, Step, deliver
from redisflow.ops import upkeep
from redisflow.ops.namespace import Namespace
from redisflow.settings import Settings
from redisflow.singleflight import SingleFlight
from redisflow.wire import Wire

M = TypeVar("M")


class Link:
    """How a manager and its views reach their server: connected when it is first needed.

    Attributes:
        wire: carries packets; `None` while there is no connection.
        policy: how calls are delivered over it.
        may_confirm: whether the user is known to have the permissions to wait for replicas.
        settings: the options.
    """

    policy: Policy

    def __init__(self, endpoint: Callable[[], Endpoint | ClusterEndpoint], settings: Settings) -> None:
        """Take what finds out where to connect to, and the options."""
        self.wire: Wire | ClusterWire | None = None
        self.may_confirm = False
        self._endpoint = endpoint
        self.settings = settings
        self._lock = threading.Lock()
        self._connecting = SingleFlight[Wire | ClusterWire](self._connect)

    def connect(self, namespace: Namespace, *, confirms: bool = False) -> Wire | ClusterWire:
        """Connect, unless that is done, and check the server and the namespace.

        Args:
            namespace: which.
            confirms: whether a view wants to wait for replicas, though the link may not.
        """
        wire = self._connecting(math.inf, namespace)
        if confirms and not self.may_confirm:
            drive(wire, deliver(upkeep.check_confirming(namespace), self.policy))
            self.may_confirm = True
        return wire

    def _connect(self, namespace: Namespace) -> Wire | ClusterWire:
        with self._lock:
            if self.wire is None:
                endpoint, settings = self._endpoint(), self.settings
                wire = wire_to(
                    endpoint, max_connections=settings.max_connections, acquire_timeout_s=settings.deadline_s
                )
                self.policy = settings.policy(real_server=endpoint.real_server, cluster=endpoint.is_cluster)
                self.may_confirm = self.policy.confirm is not None
                check = upkeep.connect(
                    namespace,
                    real_server=endpoint.real_server,
                    allow_eviction=settings.allow_eviction,
                    confirms=self.may_confirm,
                )
                try:
                    drive(wire, deliver(check, self.policy))
                except BaseException:
                    wire.close()
                    raise
                self.wire = wire
            return self.wire

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            wire, self.wire = self.wire, None
        if wire is not None:
            wire.close()

    def confirming(self, durability: str) -> LinkView:
        """The same connection, with changes that wait for other replicas."""
        return LinkView(self, durability)


class LinkView:
    """A link, of either kind, with changes that wait for other replicas. It is never closed: it is another's."""

    def __init__(self, link: Any, durability: str) -> None:
        """Share a link."""
        self._confirms = link.settings.confirming(Policy(0.0), durability).confirm is not None
        self._link = link
        self._durability = durability

    @property
    def wire(self) -> Any:
        """The link's, once it is known that its user may do what the view does."""
        return self._link.wire if self._link.may_confirm or not self._confirms else None

    @property
    def policy(self) -> Policy:
        """The link's, but for what changes wait for."""
        policy: Policy = self._link.settings.confirming(self._link.policy, self._durability)
        return policy

    def connect(self, namespace: Namespace) -> Any:
        """Connect the link."""
        return self._link.connect(namespace, confirms=self._confirms)

    def close(self) -> Any:
        """Leave the link open: a view closes nothing."""

    def confirming(self, durability: str) -> LinkView:
        """The same connection, with changes that wait for others again."""
        return LinkView(self._link, durability)


def drive(wire: Wire | ClusterWire, steps: Generator[Step, Any, T]) -> T:
    """Carry out the steps of a delivery, and return what it comes to."""
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, Packet):
                    reply: Any = wire.exchange(step)
                elif isinstance(step, Block):
                    reply = wire.block(step)
                elif isinstance(step, Primaries):
                    reply = wire.primaries(step)
                elif isinstance(step, Together):
                    reply = wire.gathering(step, partial(drive, wire))
                else:
                    wire.pause(step.seconds)
                    reply = None
            except Lost as lost:
                step = steps.throw(lost)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result


def view_of(manager: M, **replaced: Any) -> M:
    """A manager like another but for some attributes. It shares the other's connection and never closes it."""
    view = copy.copy(manager)
    vars(view).update(replaced, _is_view=True)
    return view
