"""Users with just the permissions that docs/backends.md names, on clusters, with replicas and behind Sentinel."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import pytest

from redisflow import AsyncWaitEngine, FlowManager, NotDurable, StorageError, WaitEngine
from redisflow.keys import DEFAULT_PARTITIONS, Keyspace
from tests.beyond_one_server.conftest import Open
from tests.support.clusters import Cluster, SlotMove
from tests.support.permissions import exercise, for_clusters, for_durability, for_sentinels, make_flow, permissions
from tests.support.sentinels import Sentinels
from tests.support.servers import ENGINES, Server
from tests.support.subjects import WHO, Blocking
from tests.support.waiting import wait_until

PATIENT: dict[str, Any] = {"deadline_s": 60.0, "confirm_within_s": 10.0}


def engine_of(flows: Any) -> Any:
    """A wait engine of the manager's shell."""
    if isinstance(flows, FlowManager):
        return WaitEngine(flows)
    return Blocking(AsyncWaitEngine(flows.target), flows._thread)


def set_user(servers: Sequence[Server], name: str, rule: Sequence[str]) -> None:
    """Make the user anew on each server, with just that rule."""
    for server in servers:
        server.raw.execute_command("ACL", "SETUSER", name, "reset", *rule)


def without(rule: Sequence[str], *parts: str) -> list[str]:
    """The rule less some of it."""
    return [part for part in rule if part not in parts]


def command_of(part: str) -> str:
    """The command that a part of a rule permits, as servers name it."""
    return f"'{part.removeprefix('+')}'"


# --- clusters ------------------------------------------------------------------------------------------

ON_A_CLUSTER = [*permissions(), *for_durability(), *for_clusters()]


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two primaries with a replica each, on every engine."""
    with Cluster(request.param, masters=2) as cluster:
        yield cluster


def as_user(cluster: Cluster, rule: Sequence[str]) -> str:
    """Empty the cluster, make the user `flows` on every node; return the URL for him."""
    for client in cluster.clients():
        client.flushall()
        client.script_flush()
    set_user([node.server for node in cluster.nodes], "flows", rule)
    return cluster.url.replace("://", "://flows:secret@")


@pytest.mark.parametrize("durability", ["local", "all"])
def test_the_documented_user_may_do_everything_on_a_cluster(open_url: Open, cluster: Cluster, durability: str) -> None:
    """With what clusters and replicas need in addition."""
    rule = without(ON_A_CLUSTER, *(for_durability() if durability == "local" else ()))
    flows = open_url(as_user(cluster, rule), durability=durability, **PATIENT)
    exercise(flows, engine_of(flows))


@pytest.mark.parametrize("part", [*for_clusters(), *for_durability(), "+zinter"])
def test_what_a_cluster_needs_is_missed_at_connect(open_url: Open, cluster: Cluster, part: str) -> None:
    """At once, by name, before anything is written but the namespace's settings."""
    url = as_user(cluster, without(ON_A_CLUSTER, part))
    with pytest.raises(StorageError, match=command_of(part).replace("|", r"\|")) as refused:
        make_flow(open_url(url, durability="all", deadline_s=600.0))
    assert refused.value.code == "NOPERM"
    assert {key for client in cluster.clients() for key in client.scan_iter()} <= {b"redisflow:meta"}


def test_the_documented_user_follows_a_slot_on_its_way(open_url: Open, cluster: Cluster) -> None:
    """To a node that takes its commands only behind ASKING."""
    flows = open_url(as_user(cluster, ON_A_CLUSTER), durability="all", **PATIENT)
    partition = Keyspace.of("redisflow", DEFAULT_PARTITIONS).partitions[0]
    flow = flows.create_mirrored(**WHO, flow_id=UUID(int=secrets.randbits(120) * DEFAULT_PARTITIONS))
    source = cluster.primary_of(partition.slot)
    target = next(node for node in cluster.primaries if node is not source)
    target.server.raw.config_resetstat()
    move = SlotMove(cluster, partition.slot, source, target)
    move.begin()
    try:
        assert move.move_keys(100) > 0
        flow = flows.update_state(flow, {"x": 1})
        flows.append_event(flow, "note")
        assert flows.get(flow.id) == flow
        assert [event.kind for event in flows.watch(flow, after="0-0", timeout=0.1)][-1] == "note"
        stats = target.server.raw.info("commandstats")
        assert stats["cmdstat_asking"]["calls"] >= 4
        assert not stats["cmdstat_asking"].get("rejected_calls")
    finally:
        move.finish()
        cluster.await_healthy()
    assert flows.delete(flow)


# --- replicas ------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own."""
    with Server(ENGINES[0]) as server:
        yield server


@pytest.mark.parametrize("part", for_durability())
@pytest.mark.parametrize("connected", [False, True])
def test_a_view_that_may_not_wait_changes_nothing(
    open_url: Open, server: Server, part: str, *, connected: bool
) -> None:
    """It is refused by name before its first change; the manager goes on."""
    set_user([server], "flows", without([*permissions(), *for_durability()], part))
    flows = open_url(server.url.replace("://", "://flows:secret@"), deadline_s=600.0)
    flow = make_flow(flows) if connected else None
    view = flows.with_durability("all")
    for _ in range(2):
        with pytest.raises(StorageError, match=command_of(part)) as refused:
            make_flow(view)
        assert refused.value.code == "NOPERM"
    if flow is None:
        flow = make_flow(flows)
    with pytest.raises(StorageError, match=command_of(part)):
        view.finish(flow)
    assert flows.list_by_status("running") == [flow]
    assert view.with_durability("local").finish(flow).status == "finished"


def test_a_user_who_may_wait_no_more_is_told_of_what_was_applied(open_url: Open, server: Server) -> None:
    """By NotDurable, as where no replica answers: the change cannot be taken back."""
    for part in for_durability():
        set_user([server], "flows", [*permissions(), *for_durability()])
        flows = open_url(server.url.replace("://", "://flows:secret@"), confirm_within_s=0.05)
        view = flows.with_durability("all")
        view.connect()
        set_user([server], "flows", without([*permissions(), *for_durability()], part))
        with pytest.raises(NotDurable) as raised:
            make_flow(view)
        assert raised.value.flow == flows.get(raised.value.flow)
        assert raised.value.reached == 0


# --- Sentinel ------------------------------------------------------------------------------------------

BEHIND_SENTINEL = [*permissions(), *for_durability()]
CHANNELS = [part for part in for_sentinels() if part.startswith("&")]
NEWS = ["+subscribe", *CHANNELS]


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def group(request: pytest.FixtureRequest) -> Iterator[Sentinels]:
    """A primary, a replica and two Sentinels, on every engine."""
    with Sentinels(request.param, replicas=1, sentinels=2) as group:
        yield group


def as_finder(group: Sentinels, rule: Sequence[str]) -> str:
    """Make the user `flows` on the servers and `finder` on the Sentinels; return the URL for both."""
    group.await_healthy()
    group.primary().client().flushall()
    set_user(group.servers, "flows", BEHIND_SENTINEL)
    set_user(group.sentinels, "finder", rule)
    url = group.url.replace("://", "://flows:secret@")
    return f"{url}?sentinel_username=finder&sentinel_password=secret"


def test_the_documented_users_may_do_everything_behind_sentinel(
    open_url: Open, group: Sentinels, caplog: pytest.LogCaptureFixture
) -> None:
    """One on the servers, one on the Sentinels; a failover included."""
    flows = open_url(as_finder(group, for_sentinels()), durability="all", **PATIENT)
    exercise(flows, engine_of(flows))
    old = group.primary()
    assert group.fail_over() is not old
    subscriptions = len(CHANNELS) * len(group.sentinels)
    wait_until(lambda: listening(group) == subscriptions, description="all channels of each are heard")
    flow = wait_until(lambda: make_flow(flows), description="the new primary is used", ignoring=(StorageError,))
    group.await_healthy()
    assert flows.with_durability("local").get(flow) == flow
    assert caplog.messages == []


def listening(group: Sentinels) -> int:
    """How many subscriptions the Sentinels have, of clients that are users of theirs."""
    clients = [client for sentinel in group.sentinels for client in sentinel.raw.client_list()]
    return sum(int(client["sub"]) for client in clients if client["user"] == "finder")


@pytest.mark.parametrize("part", ["+sentinel|masters", "+sentinel|slaves"])
def test_what_a_sentinels_user_lacks_is_named(open_url: Open, group: Sentinels, part: str) -> None:
    """At once. How many replicas there are is asked only where all must have a change."""
    url = as_finder(group, without(for_sentinels(), part))
    with pytest.raises(StorageError, match=command_of(part).replace("|", r"\|")) as refused:
        make_flow(open_url(url, durability="all", deadline_s=600.0))
    assert refused.value.code == "NOPERM"
    if part == "+sentinel|slaves":
        flows = open_url(url, **PATIENT)
        assert flows.list_by_status("running") == []
        make_flow(flows.with_durability("replicas:1"))


@pytest.mark.parametrize("part", NEWS)
def test_a_sentinels_user_who_may_not_listen_is_warned(
    open_url: Open, group: Sentinels, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each Sentinel; all else works, and connections stay."""
    flows = open_url(as_finder(group, without(for_sentinels(), part)), **PATIENT)
    exercise(flows, engine_of(flows))
    wait_until(lambda: len(caplog.messages) == len(group.sentinels), description="each has refused")
    assert all("does not tell of a new primary" in message for message in caplog.messages)
    wait_until(lambda: listening(group) == 0, description="those of the test before are gone")


def test_a_wrong_password_for_the_sentinels_is_told_of(open_url: Open, group: Sentinels) -> None:
    """At once, as what it is."""
    url = as_finder(group, without(for_sentinels(), ">secret"))
    with pytest.raises(StorageError, match="no Sentinel answers: invalid username-password"):
        open_url(url, deadline_s=600.0).connect()
