"""The Lua scripts, one constant per file of `lua/`, their includes expanded.

Scripts are addressed by the SHA of their text, which versions them with the client: two releases of this
library can share a server.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import attrs

from redisflow.flow import REWRITES, TERMINAL, VERBS, FlowStatus, Verb

ALLOW_OOM = "allow-oom"

_INCLUDE = re.compile(r"^ *--- include: (\S+)\n", re.MULTILINE)


def _directory() -> Path:
    """Where the scripts are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return next(path for path in (here / "lua", here.parent / "lua") if path.is_dir())


def expanded(name: str) -> str:
    """Read a script with its `--- include:` lines replaced by the files they name."""
    text = (_directory() / name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: expanded(f"include/{match[1]}"), text)


@attrs.frozen(eq=False)
class Source:
    """A script's text and the SHA the server knows it by."""

    text: bytes
    sha: bytes

    @classmethod
    def of(cls, text: str) -> Source:
        """Address a text."""
        encoded = text.encode()
        return cls(encoded, hashlib.sha1(encoded, usedforsecurity=False).hexdigest().encode())


@attrs.frozen(eq=False)
class Script:
    """One operation's script.

    Attributes:
        name: the file's name.
        source: begins with `#!lua`, which lets the server check declared keys and memory before it runs.
        plain: without that line, for fakeredis, which does not know it.
    """

    name: str
    source: Source
    plain: Source

    @classmethod
    def load(cls, name: str, *, flags: str = "", prelude: str = "") -> Script:
        """Load `lua/<name>.lua`, behind a prelude of its own."""
        body = prelude + expanded(f"{name}.lua")
        shebang = f"#!lua flags={flags}" if flags else "#!lua"
        return cls(name, Source.of(f"{shebang}\n{body}"), Source.of(body))


CREATE = Script.load("create")
APPEND_EVENT = Script.load("append_event")
OBSERVE_STEP = Script.load("observe_step")
DELETE = Script.load("delete", flags=ALLOW_OOM)


# --- transitions ---------------------------------------------------------------------------------------

_FIRST_KEY, _FIRST_ARG = 3, 8
_OPTIONAL = (
    "merge", "due_at", "waiter", "wake", "stamp_field", "stamp_head", "stamp_tail", "n_unset", "n_increment",
)  # fmt: skip


def spaced(statuses: Iterable[FlowStatus]) -> str:
    """Statuses as the scripts look them up: each between spaces."""
    return "".join(f" {status} " for status in statuses)


def _prelude(verb: Verb) -> str:
    """A verb's row of the transition table as the constants and bindings that lua/transition.lua names."""
    keys = (f"KEYS[{n}]" for n in count(_FIRST_KEY))
    sources = ", ".join(f"{status} = {next(keys)}" for status in verb.sources)
    target_key = "nil" if verb.target is None else next(keys)
    due_key, waiters_key = (next(keys), next(keys)) if verb.touches_waits else ("nil", "nil")
    args = {name: f"ARGV[{n}]" for n, name in enumerate(verb.takes, _FIRST_ARG)}
    constants = {
        "TARGET": "nil" if verb.target is None else f"'{verb.target}'",
        "WHEN_PENDING": f"'{verb.when_cancel_pending}'",
        "WHEN_TERMINAL": f"'{verb.when_terminal}'",
        "STATUSES": f"'{spaced(FlowStatus)}'",
        "TERMINAL": f"'{spaced(TERMINAL)}'",
        "WITH_EVENT": "false" if verb.kind else "true",
        "FIELDS_FROM": str(_FIRST_ARG + len(verb.takes)),
        "source_keys": f"{{{sources}}}",
        "target_key": target_key,
        "due_key": due_key,
        "waiters_key": waiters_key,
        **{name: args.get(name, "nil") for name in _OPTIONAL},
    }
    return f"local {', '.join(constants)} =\n  {', '.join(constants.values())}\n"


# What ends or frees work goes on when the server is out of memory.
TRANSITIONS = {
    verb: Script.load("transition", flags=ALLOW_OOM if verb.allow_oom else "", prelude=_prelude(verb))
    for verb in (*VERBS, *REWRITES.values())
}
