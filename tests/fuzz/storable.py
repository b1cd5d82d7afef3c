"""What can be stored, by the documentation alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from math import isfinite
from typing import Any

INT64_MIN, INT64_MAX, MAX_DEPTH = -(2**63), 2**63 - 1, 64


class Unstorable(Exception):
    """The table in docs/concepts.md has no row for it."""


def stored_form(value: Any, room: int = MAX_DEPTH) -> Any:  # noqa: PLR0911 - one case and return per row
    """What comes back of a value, by the table in docs/concepts.md."""
    match value:
        case None | bool():
            return value
        case str():
            with suppress(UnicodeEncodeError):
                return value.encode().decode()
        case bytes():
            return value
        case int() if INT64_MIN <= value <= INT64_MAX:
            return int(value)
        case float() if isfinite(value):
            return value
        case datetime() if value.tzinfo is not None:
            with suppress(OverflowError):
                return value.astimezone(UTC).replace(fold=0)
        case list() | tuple() if room:
            return [stored_form(item, room - 1) for item in value]
        case Mapping() if room and all(isinstance(key, str) for key in value):
            return {stored_form(key): stored_form(item, room - 1) for key, item in value.items()}
    raise Unstorable
