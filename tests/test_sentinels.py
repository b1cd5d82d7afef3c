"""The Sentinel groups that tests run on do what they say, on every engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.support.leftovers import nothing_left
from tests.support.sentinels import NAME, Sentinels
from tests.support.servers import ENGINES, Server

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for what is left in /proc")


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def shared_group(request: pytest.FixtureRequest) -> Iterator[Sentinels]:
    """One group per engine, which leaves no process and no folder behind."""
    with nothing_left(), Sentinels(request.param) as running:
        yield running


@pytest.fixture
def group(shared_group: Sentinels) -> Sentinels:
    """A healthy group; who is primary depends on the tests before."""
    shared_group.await_healthy()
    return shared_group


def role(server: Server) -> str:
    """Return what a server takes itself for."""
    return str(server.raw.execute_command("ROLE")[0])


def test_every_sentinel_leads_to_the_primary(group: Sentinels) -> None:
    """The URL has all of them, and each knows the primary and both replicas."""
    primary, replicas = group.primary(), group.replicas()
    assert role(primary) == "master"
    assert [role(replica) for replica in replicas] == ["slave", "slave"]
    addresses, name, db = group.url.removeprefix("redis+sentinel://").split("/")
    assert (len(group.sentinels), name, db) == (3, NAME, "0")
    for address in addresses.split(","):
        host, port = address.split(":")
        with redis.Redis(host=host, port=int(port), decode_responses=True) as watcher:
            assert watcher.sentinel_get_master_addr_by_name(NAME) == ("127.0.0.1", primary.port)
            known = {follower["port"] for follower in watcher.sentinel_slaves(NAME)}
            assert known == {replica.port for replica in replicas}
    client = primary.client()
    client.set("a", 1)
    assert client.wait(2, 5000) == 2


def test_sentinels_come_and_go(group: Sentinels) -> None:
    """One that is frozen or dead is not asked; back again, it knows the others."""
    primary = group.primary()
    frozen, dead, _ = group.sentinels
    group.pause(frozen)
    assert group.primary() is primary
    group.resume(frozen)
    dead.kill()
    assert group.primary() is primary
    group.restart(dead)
    group.await_healthy()
    assert group.primary() is primary
    paces = [sentinel.raw.execute_command("SENTINEL", "DEBUG")["PUBLISH-PERIOD"] for sentinel in group.sentinels]
    assert paces == ["500"] * 3


def test_a_dead_primary_is_replaced_and_so_is_a_living_one_by_plan(group: Sentinels) -> None:
    """Both old primaries follow the last in the end, and what was replicated is still there."""
    client = group.primary().client()
    client.set("b", 2)
    assert client.wait(2, 5000) == 2
    dead = group.kill_primary()
    assert not dead.running
    group.await_healthy()
    second = group.primary()
    assert second is not dead
    assert role(second) == "master"

    group.restart(dead)
    assert role(dead) == "master"
    assert dead in group.replicas()
    third = group.fail_over()
    assert third is not second
    assert role(third) == "master"
    named = [sentinel.raw.sentinel_get_master_addr_by_name(NAME) for sentinel in group.sentinels]
    assert named == [("127.0.0.1", third.port)] * 3
    group.await_healthy()
    assert group.primary() is third
    assert {role(server) for server in group.replicas()} == {"slave"}
    assert [server.raw.get("b") for server in group.servers] == ["2"] * 3


def test_sentinels_may_be_left_at_their_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """They then publish every two seconds, as in production."""
    monkeypatch.setattr(Sentinels, "await_healthy", lambda _: None)  # which takes as long
    with Sentinels(ENGINES[0], replicas=0, hurried=False) as group:
        paces = [sentinel.raw.execute_command("SENTINEL", "DEBUG")["PUBLISH-PERIOD"] for sentinel in group.sentinels]
    assert paces == ["2000"] * 3


# --- what is left behind


def test_a_group_whose_first_sentinel_does_not_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server before it ends with it."""
    start = Server.start
    before: list[int] = []

    def start_one(server: Server) -> None:
        if len(before) == 1:
            server.config_args += ("--no-such-setting", "1")
        start(server)
        before.append(server.pid)

    monkeypatch.setattr(Server, "start", start_one)
    with nothing_left(), pytest.raises(RuntimeError, match="no-such-setting"), Sentinels(ENGINES[0], replicas=0):
        pass
    assert len(before) == 1
