"""The simulated server: what the scripts of lua/ do, line by line, in Python.

`test_model` compares it with real servers. Where the protocol has a rule that an older one had not, the class has a
constant that says so: `old_rules` has servers without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from redisflow.calls import Refusal
from tests.protocol.audits import append_event, observe_step
from tests.protocol.includes import NOTHING, Includes, flat
from tests.protocol.lives import create, delete
from tests.protocol.scripts import Known
from tests.protocol.settle import settle
from tests.protocol.transition import transition

_RUNS = frozenset({b"EVALSHA", b"EVAL"})


class Server(Includes):
    """A server with one database."""

    def execute(self, command: Sequence[bytes]) -> Any:
        """Execute a command. Returns the reply; a `Refusal` for an error."""
        name = command[0]
        if name in _RUNS:
            sha = command[1]
            if name == b"EVAL":
                sha = self.library.sha_of[sha]
                if sha not in self.known:
                    self.known = {*self.known, sha}
            elif sha not in self.known:
                return Refusal("NOSCRIPT", "NOSCRIPT No matching script.")
            script = self.library.by_sha[sha]
            args_from = 3 + int(command[2])
            return _SCRIPTS[script.name](self, script, command[3:args_from], command[args_from:])
        return self.read(name, command[1], command[2:])

    def read(self, name: bytes, key: bytes, args: Sequence[bytes]) -> Any:
        """Execute a command that reads."""
        fields = self.db.get(key, NOTHING)
        if name == b"HMGET":
            return [fields.get(field) for field in args]
        if name == b"HGETALL":
            return flat(fields)
        raise NotImplementedError(name)

    def forget_scripts(self) -> None:
        """Do what SCRIPT FLUSH and a restart do."""
        self.known = set()

    def trim(self, events_key: bytes, most: int) -> None:
        """Do what XTRIM does."""
        stream = self.db.get(events_key)
        if stream is not None and stream.trim(most, exact=True):
            self.lives[events_key.replace(b"}:events:", b"}:flow:", 1)][-1].trimmed = True


def read_own(server: Server, _: Known, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:
    """Run lua/read_own.lua."""
    owner, name, *args = argv
    if server.db.get(keys[0], NOTHING).get(b"owner_session_key") == owner:
        return server.read(name, keys[1], args)
    return [None] * len(args) if name == b"HMGET" else []


_SCRIPTS: dict[str, Callable[[Server, Known, Sequence[bytes], Sequence[bytes]], Any]] = {
    "create": create,
    "append_event": append_event,
    "observe_step": observe_step,
    "transition": transition,
    "delete": delete,
    "settle": settle,
    "read_own": read_own,
}
