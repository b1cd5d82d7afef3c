"""The pages of documentation, and what is in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import attrs

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_NOT_RUN = re.compile(r"<!-- not run: \w.* -->\n\Z")


@attrs.frozen
class Block:
    """A fenced block of a page, and the number of lines above its text."""

    lines_above: int
    text: str
    is_run: bool


def blocks_of(page: Path, language: str) -> list[Block]:
    """The page's blocks in a language, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start()) + 1, found[1], not _NOT_RUN.search(text[: found.start()]))
        for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def without_blocks(page: Path) -> str:
    """The page's prose."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def lines_of(page: Path) -> list[str]:
    """The commands of the page's console blocks, each on one line."""
    shown = [block.text.replace("\\\n", " ") for block in blocks_of(page, "console")]
    lines = [line for text in shown for line in text.splitlines()]
    assert all(line.startswith("$ ") for line in lines), "a console block shows commands, each behind a `$`"
    return [line.removeprefix("$ ") for line in lines]


def commands_of(page: Path, program: str) -> list[list[str]]:
    """The commands that run `program`, without its name."""
    return [words[1:] for line in lines_of(page) if (words := shlex.split(line))[0] == program]
