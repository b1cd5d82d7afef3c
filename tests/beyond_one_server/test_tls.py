"""TLS on a cluster and behind Sentinel: nodes, replicas and Sentinels listen on no other port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from redisflow import StorageError
from redisflow.keys import DEFAULT_PARTITIONS, Keyspace
from tests.beyond_one_server.conftest import Open
from tests.support.certificates import certified
from tests.support.clusters import Cluster
from tests.support.patients import problems
from tests.support.permissions import for_sentinels
from tests.support.sentinels import Sentinels
from tests.support.servers import Engine
from tests.support.subjects import WHO, works
from tests.support.waiting import wait_until

PATIENT: dict[str, Any] = {"deadline_s": 60.0, "confirm_within_s": 10.0}
CHANNELS = [part for part in for_sentinels() if part.startswith("&")]


@pytest.fixture(scope="module")
def cluster(tls_engine: Engine, tls_folder: Path) -> Iterator[Cluster]:
    """Two primaries with a replica each."""
    with Cluster(tls_engine, masters=2, tls=certified(tls_folder, "ours")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def group(tls_engine: Engine, tls_folder: Path) -> Iterator[Sentinels]:
    """A primary, a replica and two Sentinels."""
    with Sentinels(tls_engine, replicas=1, sentinels=2, tls=certified(tls_folder, "ours")) as group:
        yield group


@pytest.fixture(params=["cluster", "group"])
def place(request: pytest.FixtureRequest) -> Any:
    """Either of the two."""
    return request.getfixturevalue(request.param)


def trusting(url: str, authority: Path) -> str:
    """The URL with that CA, and no other, to be trusted."""
    return f"{url}?ssl_ca_certs={authority}"


def test_a_verified_certificate_is_accepted(open_url: Open, place: Any, tls_folder: Path) -> None:
    """Replicas and blocking reads included."""
    flows = open_url(trusting(place.url, tls_folder / "ours-ca.crt"), durability="all", **PATIENT)
    assert place.url.startswith("rediss+")
    works(flows)
    assert len({flows.create_managed(**WHO).id.int % DEFAULT_PARTITIONS for _ in range(100)}) > DEFAULT_PARTITIONS / 2


@pytest.mark.parametrize(
    ("trusted", "host", "said"),
    [
        ("stranger-ca.crt", "127.0.0.1", "CERTIFICATE_VERIFY_FAILED"),
        (None, "127.0.0.1", "CERTIFICATE_VERIFY_FAILED"),
        ("ours-ca.crt", "localhost", "Hostname mismatch"),
    ],
)
def test_an_unverified_certificate_is_refused(  # noqa: PLR0917 - fixtures and a table
    open_url: Open, place: Any, tls_folder: Path, trusted: str | None, host: str, said: str
) -> None:
    """Another CA, none we know, another host's name: StorageError at once, saying which, and nothing was sent."""
    url = place.url.replace("127.0.0.1", host)
    with pytest.raises(StorageError, match=said):
        open_url(trusting(url, tls_folder / trusted) if trusted else url, prefix="refused", deadline_s=600.0).connect()


def test_slots_and_redirections_lead_to_tls_ports(open_url: Open, cluster: Cluster, tls_folder: Path) -> None:
    """Of a slot on its way, of one that has moved, and of a replica that was promoted."""
    flows = open_url(trusting(cluster.url, tls_folder / "ours-ca.crt"), prefix="moving", **PATIENT)
    slot = Keyspace.of("moving", DEFAULT_PARTITIONS).partitions[0].slot
    made = [flows.create_mirrored(**WHO) for _ in range(2 * DEFAULT_PARTITIONS)]
    source = cluster.primary_of(slot)
    target = next(node for node in cluster.primaries if node is not source)
    told = {port for _, _, *nodes in source.cluster("SLOTS") for _, port, *_ in nodes}
    assert told == {node.server.port for node in cluster.nodes}
    assert {node.server.raw.config_get("port")["port"] for node in cluster.nodes} == {"0"}
    cluster.move_slots([slot], source, target, keys_per_migrate=1)
    made = [flows.update_state(flow, {"x": 1}) for flow in made]
    cluster.fail_over(cluster.replicas_of(target)[0])
    assert {flows.finish(flow).revision for flow in made} == {3}
    assert problems(flows.doctor()) == []


def test_a_failover_is_heard_of_and_followed(open_url: Open, group: Sentinels, tls_folder: Path) -> None:
    """From Sentinels that listen on nothing but TLS."""
    group.await_healthy()
    flows = open_url(trusting(group.url, tls_folder / "ours-ca.crt"), **PATIENT)
    flow = flows.with_durability("replicas:1").create_mirrored(**WHO)
    expected = len(CHANNELS) * len(group.sentinels)
    wait_until(lambda: subscriptions(group) == expected, description="all channels of each are heard")
    group.fail_over()
    group.await_healthy()
    assert flows.finish(flow).revision == 2
    key = flows.namespace.keyspace.partition_of(flow.id).flow(str(flow.id).encode())
    assert group.primary().client().hget(key, "status") == b"finished"


def subscriptions(group: Sentinels) -> int:
    """How many the Sentinels have of our clients: their own are for `__sentinel__:hello` on the servers."""
    return sum(int(client["sub"]) for sentinel in group.sentinels for client in sentinel.raw.client_list())
