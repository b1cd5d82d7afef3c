"""The Lua scripts, one constant per file of `lua/`, their includes expanded.

Scripts are addressed by the SHA of their text, which versions them with the client: two releases of this
library can share a server.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import attrs

_INCLUDE = re.compile(r"^--- include: (\S+)\n", re.MULTILINE)


def _directory() -> Path:
    """Where the scripts are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return next(path for path in (here / "lua", here.parent / "lua") if path.is_dir())


def expanded(path: Path) -> str:
    """Read a script with its `--- include:` lines replaced by the files they name."""

    def include(match: re.Match[str]) -> str:
        return (path.parent / "include" / match[1]).read_text(encoding="utf-8")

    return _INCLUDE.sub(include, path.read_text(encoding="utf-8"))


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
    def load(cls, name: str, *, flags: str = "") -> Script:
        """Load `lua/<name>.lua`."""
        body = expanded(_directory() / f"{name}.lua")
        shebang = f"#!lua flags={flags}" if flags else "#!lua"
        return cls(name, Source.of(f"{shebang}\n{body}"), Source.of(body))


CREATE = Script.load("create")
TRANSITION = Script.load("transition")
# What ends or frees work goes on when the server is out of memory.
TRANSITION_ALLOW_OOM = Script.load("transition", flags="allow-oom")
APPEND_EVENT = Script.load("append_event")
OBSERVE_STEP = Script.load("observe_step")
DELETE = Script.load("delete", flags="allow-oom")
