"""What every contestant does, and how the worker drives it.

A change: one caller updates two keys of a record's ten-key state and records an entry of history that explains it. It
counts once the contestant has acknowledged it, as durable as its own defaults make it.

A contestant is a class that derives from `ThreadsPeer` if its calls block, from `TasksPeer` if they are coroutines.
This file runs in the peers' environment and in ours, so it needs nothing but the standard library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

STATE: Mapping[str, Any] = {
    "messages": 5000,
    "processed": 0,
    "last_message": "",
    "label": "invoices",
    "mailbox": "inbox/2026",
    "errors": ["timeout"],
    "attempt": 1,
    "budget": 12.5,
    "approved": False,
    "note": "skip newsletters, ask before deleting anything",
}
KIND = "state_updated"


def patch_of(number: int) -> dict[str, Any]:
    """The change with this number."""
    return {"processed": number, "last_message": f"inbox/2026/{number:05}"}


class Stored(NamedTuple):
    """What is found of a record after a measurement: its state, and the changes in its history, creation left out."""

    state: Mapping[str, Any]
    changes: int


class ThreadsPeer(ABC):
    """A contestant whose calls block: every caller is a thread."""

    @abstractmethod
    def open(self, folder: Path, redis_url: str) -> None:
        """Connect. A contestant that writes files writes them into the folder."""

    @abstractmethod
    def about(self) -> str:
        """Versions, and the durability settings as they are found to be."""

    @abstractmethod
    def create(self, records: int) -> None:
        """Make new records with the state of `STATE`, numbered from 0. Those from before are forgotten."""

    def caller(self, record: int, work: Callable[[], None]) -> None:  # noqa: ARG002  # those who override it need it
        """Run all the changes of one caller; for whoever needs something around them. It is not measured."""
        work()

    @abstractmethod
    def change(self, record: int, number: int) -> bool:
        """Apply `patch_of(number)`. Returns whether it was; `False`: refused because of another writer."""

    @abstractmethod
    def stored(self, record: int) -> Stored:
        """Read back what is stored."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""


class TasksPeer(ABC):
    """A contestant whose calls are coroutines: every caller is an asyncio task. The methods are those above."""

    @abstractmethod
    async def open(self, folder: Path, redis_url: str) -> None: ...

    @abstractmethod
    async def about(self) -> str: ...

    @abstractmethod
    async def create(self, records: int) -> None: ...

    async def caller(self, record: int, work: Callable[[], Awaitable[None]]) -> None:  # noqa: ARG002  # as above
        await work()

    @abstractmethod
    async def change(self, record: int, number: int) -> bool: ...

    @abstractmethod
    async def stored(self, record: int) -> Stored: ...

    @abstractmethod
    async def close(self) -> None: ...
