"""The Lua scripts, one constant per file of `lua/`, their includes expanded.

Scripts are addressed by the SHA of their text, which versions them with the client: two releases of this
library can share a server.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import count
from pathlib import Path

import attrs

from redisflow.flow import REWRITES, TERMINAL, VERBS, FlowStatus, Verb
from redisflow.keys import Partition

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


SETTLE = Script.load("settle", flags=ALLOW_OOM)
DELETE = Script.load("delete", flags=ALLOW_OOM)
# The one that just looks cannot write: the server sees to that.
LOOK = Script.load("reconcile", flags=f"no-writes,{ALLOW_OOM}", prelude="local MEND = false\n")
MEND = Script.load("reconcile", flags=ALLOW_OOM, prelude="local MEND = true\n")
READ_OWN = Script.load("read_own", flags="no-writes")


# --- transitions ---------------------------------------------------------------------------------------

_FIRST_KEY, _FIRST_ARG = 3, 7
_SOURCE_KEYS = tuple(f"{status}_key" for status in FlowStatus if not status.is_terminal)
_OPTIONAL = (
    "merge", "due_at", "waiter", "wake", "stamp_field", "stamp_head", "stamp_tail", "n_unset", "n_increment",
)  # fmt: skip


def barred(statuses: Iterable[FlowStatus]) -> str:
    """Statuses as the scripts look them up: each between bars."""
    return f"|{'|'.join(statuses)}|"


@attrs.frozen(eq=False)
class TransitionScript:
    """The script of one verb, for flows in any status it may start from or in just one.

    Attributes:
        sources: those statuses: their sets come first in the keys behind flow and events.
        touches_waits: whether the due and waiters sets end the keys, behind the target's set.
    """

    verb: Verb
    sources: tuple[FlowStatus, ...]
    touches_waits: bool
    script: Script

    def keys(self, partition: Partition, member: bytes, *, brought: bool) -> tuple[bytes, ...]:
        """Return the KEYS for a flow, and for an operation whose id the caller brought or not."""
        indexes = partition.index_keys.get(self)
        if indexes is None:
            statuses = self.sources if self.verb.target is None else (*self.sources, self.verb.target)
            waits = (partition.due, partition.waiters) if self.touches_waits else ()
            indexes = partition.index_keys[self] = (*map(partition.status, statuses), *waits)
        seen = (partition.seen(member),) if brought else ()
        return (partition.flow(member), partition.events(member), *indexes, *seen)

    @classmethod
    def load(cls, verb: Verb, copy_status: FlowStatus | None, event_maxlen: int | None) -> TransitionScript:
        """Load lua/transition.lua behind the verb's prelude."""
        sources = verb.sources if copy_status is None else (copy_status,)
        changes_wait = verb.target is not None or "wake" in verb.takes
        touches_waits = verb.target is FlowStatus.WAITING or (changes_wait and FlowStatus.WAITING in sources)
        # What ends or frees work goes on when the server is out of memory.
        flags = ALLOW_OOM if verb.allow_oom else ""
        prelude = _verb_prelude(verb, copy_status, sources, touches_waits=touches_waits)
        return cls(
            verb,
            sources,
            touches_waits,
            Script.load("transition", flags=flags, prelude=_trail_prelude(event_maxlen) + prelude),
        )


def _trail_prelude(event_maxlen: int | None) -> str:
    bound = "nil" if event_maxlen is None else f"'{event_maxlen}'"
    return f"local EVENT_MAXLEN = {bound}\n"


def _verb_prelude(
    verb: Verb, copy_status: FlowStatus | None, sources: tuple[FlowStatus, ...], *, touches_waits: bool
) -> str:
    """A verb's row of the transition table as the constants and bindings that lua/transition.lua names."""
    keys = (f"KEYS[{n}]" for n in count(_FIRST_KEY))
    source_keys = {f"{status}_key": next(keys) for status in sources}
    args = {name: f"ARGV[{n}]" for n, name in enumerate(verb.takes, _FIRST_ARG)}
    bindings = {
        "COPY_STATUS": "nil" if copy_status is None else f"'{copy_status}'",
        "TARGET": "nil" if verb.target is None else f"'{verb.target}'",
        "WHEN_PENDING": f"'{verb.when_cancel_pending}'",
        "WHEN_TERMINAL": f"'{verb.when_terminal}'",
        "STATUSES": f"'{barred(FlowStatus)}'",
        "TERMINAL": f"'{barred(TERMINAL)}'",
        "SOURCES": f"'{barred(verb.sources)}'",
        "WITH_EVENT": "false" if verb.kind else "true",
        "FIELDS_FROM": str(_FIRST_ARG + len(verb.takes)),
        **{name: source_keys.get(name, "nil") for name in _SOURCE_KEYS},
        "target_key": "nil" if verb.target is None else next(keys),
        "due_key": next(keys) if touches_waits else "nil",
        "waiters_key": next(keys) if touches_waits else "nil",
        "seen_key": next(keys),  # nil where no such key is given
        "kind": f"'{verb.kind}'",
        **dict.fromkeys(_OPTIONAL, "nil"),
        **args,
    }
    return f"local {', '.join(bindings)} =\n  {', '.join(bindings.values())}\n"


# --- what appends to a trail ---------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Appending:
    """The scripts that append to a trail, for one bound of its length.

    Attributes:
        transitions: by verb and the status of the caller's copy as it is stored, where it is one the verb may start
            from.
    """

    create: Script
    append_event: Script
    observe_step: Script
    transitions: Mapping[tuple[Verb, bytes | None], TransitionScript]

    @classmethod
    @cache  # managers with the same bound share them
    def keeping(cls, event_maxlen: int | None) -> Appending:
        """Load those that keep about so many events of a flow, `None` for all."""
        prelude = _trail_prelude(event_maxlen)
        transitions = {
            (verb, None if copy_status is None else copy_status.encode()): TransitionScript.load(
                verb, copy_status, event_maxlen
            )
            for verb in (*VERBS, *REWRITES.values())
            for copy_status in (*verb.sources, None)
        }
        return cls(
            Script.load("create", prelude=prelude),
            Script.load("append_event", prelude=prelude),
            Script.load("observe_step", prelude=prelude),
            transitions,
        )


UNTRIMMED = Appending.keeping(None)
