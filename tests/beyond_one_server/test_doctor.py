"""The doctor at the command line, on a cluster."""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from redisflow import FlowManager, FlowStatus, Manual, cli
from tests.support.clusters import Cluster, Node
from tests.support.subjects import WHO

PREFIX = f"d-{secrets.token_hex(4)}"


@pytest.fixture
def flows(cluster: Cluster) -> Iterator[FlowManager]:
    """A manager on the cluster."""
    with FlowManager.from_url(cluster.url, prefix=PREFIX) as flows:
        yield flows


def doctor(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[int, Any]:
    """Run the command. Returns its exit code, and what it printed, of JSON as a document."""
    with monkeypatch.context() as patched:
        patched.setattr(warnings, "showwarning", warnings.showwarning)  # which a run of the command replaces
        code = cli.run(["--url", cluster.url, "--prefix", PREFIX, "doctor", *options])
    printed = capsys.readouterr().out
    return code, json.loads(printed) if "--json" in options else printed


def on_two_nodes(cluster: Cluster, flows: FlowManager) -> list[tuple[Any, Node]]:
    """A waiting flow on each of two nodes."""
    places: dict[str, tuple[Any, Node]] = {}
    while len(places) < 2:
        flow = flows.set_waiting(flows.create_mirrored(**WHO), Manual())
        node = cluster.primary_of(flows.namespace.keyspace.partition_of(flow.id).slot)
        places.setdefault(node.id, (flow, node))
    return list(places.values())


def test_damage_on_two_nodes_is_found_and_mended(
    cluster: Cluster, flows: FlowManager, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On each an index entry is missing, another is stale, and a trail is left of a flow that is gone."""
    for flow, node in on_two_nodes(cluster, flows):
        raw, partition, member = node.server.client(), flows.namespace.keyspace.partition_of(flow.id), str(flow.id)
        gone = flows.create_managed(**WHO, flow_id=flow.id.__class__(int=flow.id.int ^ (1 << 60)))
        assert raw.zrem(partition.status(FlowStatus.WAITING), member) == 1
        assert raw.delete(partition.flow(str(gone.id).encode())) == 1  # leaves its trail and two entries
    expected = {"missing-entry": 2, "stale-entry": 4, "orphan-key": 2}
    code, found = doctor(cluster, capsys, monkeypatch, "--json")
    assert (code, found["left"], found["mended"]) == (5, expected, {})
    code, found = doctor(cluster, capsys, monkeypatch, "--repair", "--json")
    assert (code, found["left"], found["mended"]) == (0, {}, expected)
    code, text = doctor(cluster, capsys, monkeypatch)
    assert code == 0
    assert text.endswith("nothing found\n")
    assert sum(flows.count_by_status().values()) == len(flows.list_by_owner(WHO["owner_session_key"]))


def test_the_settings_of_each_node_are_judged(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with one of them is told of that one."""
    primaries = cluster.primaries
    strange = primaries[1]
    strange.server.raw.config_set("maxmemory-policy", "allkeys-lru")
    try:
        code, found = doctor(cluster, capsys, monkeypatch, "--json")
    finally:
        strange.server.raw.config_set("maxmemory-policy", "noeviction")
    assert code == 5
    (evicting,) = (finding for finding in found["findings"] if finding["severity"] == "error")
    first = min(slots.start for slots in strange.myself().ranges)
    assert evicting["kind"] == "eviction"
    assert evicting["what"].startswith(f"node with slot {first}, port {strange.server.port}: maxmemory-policy allkeys")
    told = {finding["what"].partition(":")[0] for finding in found["findings"] if finding["kind"] == "server"}
    assert len(told) == len(primaries)
