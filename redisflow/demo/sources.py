"""The demo's input: which source files there are, and what is counted in one."""

from __future__ import annotations

import ast
import os
import stat
import sysconfig
import warnings
from pathlib import Path

import attrs

# The counters of a flow's state, in the order the tables show them.
COUNTERS = ("lines", "statements", "functions", "classes", "branches", "imports")
_COUNTED_AS: dict[type[ast.AST], str] = {
    ast.FunctionDef: "functions",
    ast.AsyncFunctionDef: "functions",
    ast.ClassDef: "classes",
    ast.Import: "imports",
    ast.ImportFrom: "imports",
    ast.If: "branches",
    ast.For: "branches",
    ast.AsyncFor: "branches",
    ast.While: "branches",
    ast.ExceptHandler: "branches",
    ast.match_case: "branches",
}
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
_NOT_THE_PROJECT = {"site-packages", "dist-packages", "node_modules", "__pycache__"}


class Unreadable(Exception):
    """A file that cannot be read or parsed: its flow fails for this reason."""


@attrs.frozen
class SourceFile:
    """A file to analyse: `path` is relative to the tree's root."""

    path: str
    size: int


def standard_library() -> Path:
    """The source tree of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def find_sources(root: Path) -> list[SourceFile]:
    """List the regular `*.py` files under `root`, sorted; installed packages and hidden folders are left out.

    A file whose name is not UTF-8 is left out as well: no flow can carry it.
    """
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_THE_PROJECT and name[0] != "."]
        for name in names:
            if not name.endswith(".py"):
                continue
            path = Path(folder, name)
            try:
                facts = path.stat()
                path.name.encode()
                relative = str(path.relative_to(root))
                relative.encode()
            except (OSError, UnicodeEncodeError):
                continue
            if stat.S_ISREG(facts.st_mode):  # reading a FIFO would block for ever
                found.append(SourceFile(relative, facts.st_size))
    return sorted(found, key=lambda source: source.path)


def read_source(root: Path, path: str) -> bytes:
    """Read one file.

    Raises:
        Unreadable: it is gone, or may not be read.
    """
    try:
        return Path(root, path).read_bytes()
    except OSError as error:
        raise Unreadable(f"{type(error).__name__}: {error.strerror}") from None


def parse_source(source: bytes) -> ast.Module:
    """Parse one file.

    Raises:
        Unreadable: it is not Python this interpreter can parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the file's business
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def count_lines(source: bytes) -> int:
    """Count the lines of a file, the last one with or without its newline."""
    return source.count(b"\n") + (not source.endswith(b"\n") and bool(source))


def count_statements(tree: ast.Module) -> dict[str, int]:
    """Count every counter but `lines`, without recursion: a tree may be deep.

    Expressions are not looked into: they are nine nodes of ten, and hold nothing that is counted.
    """
    counts = dict.fromkeys(COUNTERS[1:], 0)
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        counts["statements"] += isinstance(node, ast.stmt)
        counter = _COUNTED_AS.get(type(node))
        if counter is not None:
            counts[counter] += 1
        for block in _BLOCKS:
            todo += getattr(node, block, ())
    return counts


def count_file(root: Path, path: str) -> dict[str, int]:
    """Count one file as a whole, as the recount does.

    Raises:
        Unreadable: it cannot be read or parsed.
    """
    source = read_source(root, path)
    return {"lines": count_lines(source), **count_statements(parse_source(source))}
