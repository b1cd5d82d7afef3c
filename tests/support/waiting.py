"""Wait for what is about to happen, instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, overload

T = TypeVar("T")
_POLL_S = 0.01


def wait_until(
    predicate: Callable[[], T],
    *,
    description: str,
    timeout_s: float = 10.0,
    ignoring: tuple[type[Exception], ...] = (),
) -> T:
    """Return the predicate's value once it is true.

    Args:
        predicate: asked every 10 ms.
        description: what is waited for, as it should read in the failure.
        timeout_s: how long to wait, seconds.
        ignoring: errors that count as "not yet".

    Raises:
        AssertionError: it did not become true in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        outcome: object
        try:
            if value := predicate():
                return value
            outcome = value
        except ignoring as error:
            outcome = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {description} (last: {outcome!r})")
        time.sleep(_POLL_S)


@overload
async def wait_until_async(
    predicate: Callable[[], Coroutine[Any, Any, T]],
    *,
    description: str,
    timeout_s: float = ...,
    ignoring: tuple[type[Exception], ...] = ...,
) -> T: ...
@overload
async def wait_until_async(
    predicate: Callable[[], T],
    *,
    description: str,
    timeout_s: float = ...,
    ignoring: tuple[type[Exception], ...] = ...,
) -> T: ...
async def wait_until_async(
    predicate: Callable[[], Any],
    *,
    description: str,
    timeout_s: float = 10.0,
    ignoring: tuple[type[Exception], ...] = (),
) -> Any:
    """As `wait_until`, letting the event loop run; the predicate may be a coroutine function."""
    deadline = time.monotonic() + timeout_s
    while True:
        outcome: object
        try:
            outcome = predicate()
            if isinstance(outcome, Awaitable):
                outcome = await outcome
            if outcome:
                return outcome
        except ignoring as error:
            outcome = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {description} (last: {outcome!r})")
        await asyncio.sleep(_POLL_S)
