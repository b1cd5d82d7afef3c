"""A client and a server with a router between them, as the kernel has them: network namespaces and veth pairs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from tests.support.servers import Engine

IP = "/usr/sbin/ip"
ROOT = Path(__file__).parents[2]
CLIENT, CLIENTS_OTHER, SERVER = "10.77.1.2", "10.77.1.3", "10.77.2.2"
_TO_CLIENT, _TO_SERVER = "10.77.1.1", "10.77.2.1"
_ENDED_WITHIN_S = 10.0


def missing() -> str:
    """Return what this machine lacks for a `Network`; empty if it has everything."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path(IP).exists():
        return f"there is no {IP}: install iproute2"
    for program in ("unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"there is no {program} on the PATH: install util-linux"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return f"network namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else ""


@attrs.frozen
class Namespace:
    """A network namespace. It lasts as long as the process that holds it, or processes that were started in it."""

    holder: subprocess.Popen[bytes]

    def inside(self, *command: str | Path) -> list[str]:
        """Return a command that runs another one in the namespace, as the same process."""
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "--", *map(str, command)]

    def run(self, *command: str) -> None:
        """Run a command in the namespace, to its end."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


class Network:
    """Three namespaces: a client's, a server's, and that of a router between them.

    The router can be told to drop what comes from the client's first address: neither side is told. The client has a
    second address, so that it can be reachable again while what it sent from the first one is still held up.

    Nothing has a name outside of the namespaces. The kernel removes them with the processes in them, and those end with
    the process that made them, however sudden.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._set_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def _set_up(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rf-net-"))
        self.client, self._router, self.server = (self._hold() for _ in range(3))
        for one, name in ((self.client, "client"), (self.server, "server")):
            command = [IP, "link", "add", "link0", "netns", str(one.holder.pid), "type", "veth", "peer", "name", name]
            subprocess.run([*command, "netns", str(self._router.holder.pid)], check=True)
        for namespace, name, *addresses in (
            (self.client, "link0", CLIENT, CLIENTS_OTHER),
            (self.server, "link0", SERVER),
            (self._router, "client", _TO_CLIENT),
            (self._router, "server", _TO_SERVER),
        ):
            for address in addresses:
                namespace.run(IP, "address", "add", f"{address}/24", "dev", name)
            namespace.run(IP, "link", "set", name, "up")
            namespace.run(IP, "link", "set", "lo", "up")
        self._router.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        self.server.run(IP, "route", "add", "default", "via", _TO_SERVER)
        self.send_from(CLIENT)

    def _hold(self) -> Namespace:
        # It waits on a pipe that only this process holds open.
        held = ["sh", "-c", 'echo && read -r _; rm -rf "$1"', "holder", str(self._folder)]
        holder = subprocess.Popen(
            ["unshare", "--net", *held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._stack.callback(holder.communicate)
        assert holder.stdout is not None
        assert holder.stdout.readline(), "the namespace was not made"
        return Namespace(holder)

    def send_from(self, address: str) -> None:
        """Have the client's new connections come from an address; those that are open keep theirs."""
        self.client.run(IP, "route", "replace", "default", "via", _TO_CLIENT, "src", address)

    def drop(self) -> None:
        """Have the router drop what comes from the client's first address."""
        self._router.run(IP, "rule", "add", "from", CLIENT, "blackhole")

    def forward(self) -> None:
        """Have the router forward everything again."""
        self._router.run(IP, "rule", "del", "from", CLIENT, "blackhole")

    def engine(self, engine: Engine) -> Engine:
        """Return an engine whose servers run in the server's namespace; Unix sockets are reached from anywhere."""
        binary = self._folder / engine.name
        binary.write_text(f'#!/bin/sh\nexec {" ".join(self.server.inside(engine.binary))} "$@"\n')
        binary.chmod(0o755)
        return Engine(engine.name, binary)


class Caller:
    """A process in a namespace that makes calls, as tests/support/caller.py describes."""

    def __init__(self, namespace: Namespace, shell: str, *, prefix: str, **settings: float) -> None:
        options = json.dumps(settings | {"prefix": prefix})
        self._process = subprocess.Popen(
            namespace.inside(sys.executable, "-m", "tests.support.caller", shell, options),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=_ENDED_WITHIN_S)  # it ends with its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        if kind is None:
            assert self._process.returncode == 0

    def ask(self, calls: Sequence[Mapping[str, Any]]) -> None:
        """Have it make calls, all at the same time."""
        assert self._process.stdin is not None
        print(json.dumps(calls), file=self._process.stdin, flush=True)

    def answers(self) -> list[dict[str, Any]]:
        """Wait for the outcomes of the calls it was asked for."""
        assert self._process.stdout is not None
        outcomes: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        return outcomes
