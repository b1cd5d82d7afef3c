"""The keys of one prefix as they lie on the servers: their names, types and values. Nothing is judged here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

if TYPE_CHECKING:
    import redis

T = TypeVar("T")

_PAGE = 500
_KEY = re.compile(rb"\{([^}]*)\}:([^:]*)(?::(.*))?", re.DOTALL)


@attrs.frozen(eq=False)
class StoredKey:
    """A key.

    Attributes:
        client: of the node that has it.
        type: as TYPE says.
        expires: whether it has a time to live.
        tag, kind, rest: the parts of its name; `kind` is empty where it has another form.
    """

    client: redis.Redis
    name: bytes
    type: str
    expires: bool
    tag: str = ""
    kind: str = ""
    rest: bytes | None = None


def keys_of(clients: Iterable[redis.Redis], prefix: str) -> Iterator[StoredKey]:
    """Find every key of a prefix, on one node after the other."""
    heads = (f"{prefix}:".encode(), b"{%b:" % prefix.encode())
    for client in clients:
        names = sorted({name for name in client.scan_iter(count=1000) if name.startswith(heads)})
        for page in paged(names, _PAGE):
            pipe = client.pipeline(transaction=False)
            for name in page:
                pipe.type(name)
                pipe.pttl(name)
            answers = pipe.execute()
            for name, kind, left_ms in zip(page, answers[::2], answers[1::2], strict=True):
                parts = _KEY.fullmatch(name)
                found = StoredKey(client, name, kind.decode(), left_ms >= 0)
                yield (
                    found
                    if parts is None
                    else attrs.evolve(found, tag=_text(parts[1]), kind=_text(parts[2]), rest=parts[3])
                )


def values_of(keys: Sequence[StoredKey]) -> list[Any]:
    """Read whole values, in the order of the keys: a mapping, entries, or members with their scores."""
    numbers: dict[redis.Redis, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        numbers[key.client].append(number)
    values: dict[int, Any] = {}
    for client, asked in numbers.items():
        pipe = client.pipeline(transaction=False)
        for number in asked:
            name = keys[number].name
            match keys[number].type:
                case "hash":
                    pipe.hgetall(name)
                case "stream":
                    pipe.xrange(name)
                case "zset":
                    pipe.zrange(name, 0, -1, withscores=True)
                case _:
                    pipe.exists(name)
        values |= zip(asked, pipe.execute(), strict=True)
    return [values[number] for number in range(len(keys))]


def paged(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut into pages."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
