"""Wait engines: they resume flows whose wait has ended.

Any number may run at once, in any processes: each due flow is resumed exactly once, because an engine resumes
just the version it has read.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import datetime
from typing import Any

from redisflow.aio import AsyncFlowManager
from redisflow.aio_wire import AsyncEar
from redisflow.errors import InvalidData, StorageError, shown
from redisflow.flow import Flow, FlowRef
from redisflow.manager import FlowManager
from redisflow.ops import waits
from redisflow.ops.namespace import seconds_of
from redisflow.ops.waits import Tick, TickReport
from redisflow.wire import Ear

__all__ = ["AsyncWaitEngine", "TickReport", "WaitEngine"]

log = logging.getLogger("redisflow")


def _interval_of(interval: float) -> float:
    seconds = seconds_of("interval", interval)
    if not seconds:
        raise InvalidData(f"interval must be a number of seconds above 0, not {shown(interval)}")
    return seconds


def _sleep_s(tick: Tick, interval_s: float) -> float:
    """Until the next due time, at most the interval."""
    return interval_s if tick.next_due_s is None else min(interval_s, max(0.0, tick.next_due_s))


def _lost(error: StorageError) -> None:
    log.warning("the wait engine cannot reach the server and goes on trying: %s", error)


class WaitEngine:
    """Resumes waiting flows of a `FlowManager`."""

    def __init__(self, flows: FlowManager) -> None:
        self._flows = flows

    def tick(self, now: datetime | None = None) -> TickReport:
        """Resume what is due, cancel waiting flows whose cancel was requested.

        Args:
            now: an aware datetime; by default the server's time.
        """
        return self._tick(now).report

    def _tick(self, now: datetime | None = None) -> Tick:
        return self._flows.perform(waits.tick(self._flows.namespace, now))

    def run(self, interval: float = 1.0, stop: threading.Event | None = None) -> None:
        """Tick until `stop` is set, for ever without one.

        Sleeps until the next due time, at most `interval` seconds, and goes on through lost connections. It is told of
        a wait that ends sooner than it meant to sleep.
        """
        interval_s = _interval_of(interval)
        stop = threading.Event() if stop is None else stop
        ear = Ear(self._subscribe)
        try:
            while not stop.is_set():
                sleep_s = interval_s
                try:
                    ear.attend()  # before the tick: what that does not see yet is heard
                    sleep_s = _sleep_s(self._tick(), interval_s)
                except StorageError as error:
                    _lost(error)
                ear.hear(sleep_s, stop)
        finally:
            ear.close()

    def _subscribe(self) -> Any:
        return self._flows.connect().subscribe(waits.channels(self._flows.namespace))

    def try_resume_external(
        self,
        flow_id: FlowRef,
        topic: str,
        correlation_id: str,
        payload: Any = None,
        *,
        op_id: str | None = None,
    ) -> Flow | None:
        """Resume the flow if it waits for just this event, and return it; `None` otherwise.

        A payload, if given, becomes `state["resume_event"]`.
        """
        return self._flows.perform(
            waits.try_resume_external(self._flows.namespace, flow_id, topic, correlation_id, payload, op_id=op_id)
        )

    def resume_waiters(self, topic: str, correlation_id: str, payload: Any = None) -> list[Flow]:
        """Resume every flow that waits for this event, many to a round trip, and return them.

        Raises:
            PartialFailure: some could not be resumed; the error names each, and has those that were.
        """
        return self._flows.perform(waits.resume_waiters(self._flows.namespace, topic, correlation_id, payload))


class AsyncWaitEngine:
    """Resumes waiting flows of an `AsyncFlowManager`, as `WaitEngine` does."""

    def __init__(self, flows: AsyncFlowManager) -> None:
        self._flows = flows

    async def tick(self, now: datetime | None = None) -> TickReport:
        """Resume what is due, cancel waiting flows whose cancel was requested."""
        return (await self._tick(now)).report

    async def _tick(self, now: datetime | None = None) -> Tick:
        return await self._flows.perform(waits.tick(self._flows.namespace, now))

    async def run(self, interval: float = 1.0, stop: asyncio.Event | None = None) -> None:
        """Tick until `stop` is set; for ever, or until cancelled, without one."""
        interval_s = _interval_of(interval)
        stop = asyncio.Event() if stop is None else stop
        ear = AsyncEar(self._subscribe)
        try:
            while not stop.is_set():
                sleep_s = interval_s
                try:
                    await ear.attend()
                    sleep_s = _sleep_s(await self._tick(), interval_s)
                except StorageError as error:
                    _lost(error)
                await ear.hear(sleep_s, stop)
        finally:
            await ear.close()

    async def _subscribe(self) -> Any:
        wire = await self._flows.connect()
        return await wire.subscribe(waits.channels(self._flows.namespace))

    async def try_resume_external(
        self,
        flow_id: FlowRef,
        topic: str,
        correlation_id: str,
        payload: Any = None,
        *,
        op_id: str | None = None,
    ) -> Flow | None:
        """Resume the flow if it waits for just this event, and return it; `None` otherwise."""
        return await self._flows.perform(
            waits.try_resume_external(self._flows.namespace, flow_id, topic, correlation_id, payload, op_id=op_id)
        )

    async def resume_waiters(self, topic: str, correlation_id: str, payload: Any = None) -> list[Flow]:
        """Resume every flow that waits for this event, many to a round trip, and return them.

        Raises:
            PartialFailure: some could not be resumed; the error names each, and has those that were.
        """
        return await self._flows.perform(waits.resume_waiters(self._flows.namespace, topic, correlation_id, payload))
