"""One answer for all who ask at a time, which the field calls single flight: a crowd is one question to a server.

Nobody gets an answer that was under way before they asked, because it may be out of date.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Hashable
from typing import Any, Generic, TypeVar

from redisflow.calls import Lost, Together

T = TypeVar("T")

_BUSY = "others were still being served"


class _Latest(Generic[T]):
    """The latest outcome, and when it was asked for."""

    def __init__(self, failing: str, slack_s: float) -> None:
        self._failing = failing
        self._slack_s = slack_s
        self._asked_s = -math.inf
        self._outcome: T | Exception

    def wanted_since(self) -> float:
        """The moment an answer must have been asked for, for who comes now."""
        return time.monotonic() - self._slack_s

    def serves(self, since_s: float) -> bool:
        """Whether it was asked for since then."""
        return self._asked_s >= since_s

    def note(self, asked_s: float, outcome: T | Exception) -> None:
        """Take in an outcome."""
        self._asked_s, self._outcome = asked_s, outcome

    def late(self) -> Lost:
        """The failure of who could not wait for an answer."""
        return Lost(f"{self._failing}: the deadline passed", sent=False)

    def result(self) -> T:
        """The answer, or the failure, raised."""
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class SingleFlight(Generic[T]):
    """Asks for many threads."""

    def __init__(self, ask: Callable[..., T], *, failing: str = "cannot connect", slack_s: float = 0.0) -> None:
        """Ask by calling `ask`.

        Args:
            ask: asks.
            failing: what to say where there is no answer in time.
            slack_s: how many seconds later one may come and be served with the same answer.
        """
        self._ask = ask
        self._latest = _Latest[T](failing, slack_s)
        self._lock = threading.Lock()

    def __call__(self, until_s: float, *args: Any) -> T:
        """An answer asked for since this call; others are waited for at most until `until_s`.

        Raises:
            Lost: others were still asking by then.
        """
        latest, since_s = self._latest, self._latest.wanted_since()
        left_s = until_s - time.monotonic()
        if not self._lock.acquire(timeout=min(max(left_s, 0.0), threading.TIMEOUT_MAX)):
            raise latest.late()
        try:
            if not latest.serves(since_s):
                asked_s = time.monotonic()
                try:
                    latest.note(asked_s, self._ask(*args))
                except Exception as error:  # noqa: BLE001 - raised below, for all who wait
                    latest.note(asked_s, error)
            return latest.result()
        finally:
            self._lock.release()


class Gathering:
    """Carries out what threads want together: those that come while a run is under way are served by the next."""

    def __init__(self) -> None:
        self._wanted: dict[Hashable, dict[int, Together]] = {}
        self._flights: dict[Hashable, SingleFlight[Any]] = {}

    def __call__(self, step: Together, drive: Callable[[Generator[Any, Any, Any]], Any]) -> Any:
        """Carry out a step by driving the steps it makes.

        Raises:
            Lost: others were still at it at the caller's deadline.
        """
        wanted = self._wanted.setdefault(step.key, {})
        flight = self._flights.setdefault(step.key, SingleFlight(_run_together, failing=_BUSY))
        wanted[id(step)] = step
        try:
            return flight(step.until_s, wanted, drive)
        finally:
            del wanted[id(step)]


def _run_together(wanted: dict[int, Together], drive: Callable[[Generator[Any, Any, Any]], T]) -> T:
    """Drive the steps that serve all callers that wait."""
    steps = list(wanted.values())
    return drive(steps[0].run([item for step in steps for item in step.items]))


class AsyncGathering:
    """Carries out what tasks want together, as `Gathering` does."""

    def __init__(self) -> None:
        self._wanted: dict[Hashable, dict[int, Together]] = {}
        self._flights: dict[Hashable, AsyncSingleFlight[Any]] = {}

    async def __call__(self, step: Together, drive: Callable[[Generator[Any, Any, Any]], Awaitable[Any]]) -> Any:
        """Carry out a step by driving the steps it makes.

        Raises:
            Lost: others were still at it at the caller's deadline.
        """
        wanted = self._wanted.setdefault(step.key, {})
        flight = self._flights.setdefault(step.key, AsyncSingleFlight(_run_together, failing=_BUSY))
        wanted[id(step)] = step
        try:
            return await flight(step.until_s, wanted, drive)
        finally:
            del wanted[id(step)]


class AsyncSingleFlight(Generic[T]):
    """Asks for many tasks."""

    def __init__(
        self, ask: Callable[..., Awaitable[T]], *, failing: str = "cannot connect", slack_s: float = 0.0
    ) -> None:
        """Ask as `SingleFlight` does."""
        self._ask = ask
        self._latest = _Latest[T](failing, slack_s)
        self._lock = asyncio.Lock()

    async def __call__(self, until_s: float, *args: Any) -> T:
        """An answer asked for since this call; others are waited for at most until `until_s`.

        Raises:
            Lost: others were still asking by then.
        """
        latest, since_s = self._latest, self._latest.wanted_since()
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                await self._lock.acquire()
        except TimeoutError:
            raise latest.late() from None
        try:
            if not latest.serves(since_s):
                asked_s = time.monotonic()
                try:
                    latest.note(asked_s, await self._ask(*args))
                except Exception as error:  # noqa: BLE001 - raised below, for all who wait
                    latest.note(asked_s, error)
            return latest.result()
        finally:
            self._lock.release()
