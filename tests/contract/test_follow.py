"""`watch` and `wait_for`: changes as they happen, none missed, none twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from redisflow import AlreadyTerminal, FlowEvent, FlowNotFound, FlowStatus, Timer
from redisflow.calls import Block, Read
from redisflow.ops import follow
from tests.support.proxy import HANG, PASS, Fault, FaultProxy
from tests.support.subjects import create, flow_in
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from redisflow import Flow, FlowManager
    from tests.support.subjects import Subject


class Background:
    """A call in a thread: its items so far, its value, its error."""

    def __init__(self, call: Any) -> None:
        self.items: list[Any] = []
        self.value: Any = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            outcome = self._call()
            if isinstance(outcome, Iterator):
                for item in outcome:
                    self.items.append(item)
            self.value = outcome
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def has(self, count: int) -> bool:
        """Whether it gave so many items."""
        return len(self.items) >= count

    def join(self) -> Background:
        """Wait for its end."""
        self._thread.join(15)
        assert not self._thread.is_alive(), "it does not come to an end"
        return self


def kinds(events: list[FlowEvent]) -> list[str]:
    """The kinds of events."""
    return [event.kind for event in events]


# --- watch ---------------------------------------------------------------------------------------------


def test_events_are_seen_as_they_happen(flows: Any) -> None:
    """Each one while the watch goes on, to the one that ends the flow, as `iter_events` has them."""
    flow = create(flows)
    (created,) = flows.list_events(flow)
    watch = Background(lambda: flows.watch(flow.id, after=created.id))
    for n, change in enumerate((flows.start_running, lambda f: flows.append_event(f, "note", 1), flows.finish), 1):
        change(flow)
        wait_until(partial(watch.has, n), description=f"event {n} is seen")
    watch.join()
    assert watch.error is None
    assert watch.items == list(flows.iter_events(flow, after=created.id))
    assert kinds(watch.items) == ["started", "note", "finished"]


def test_watching_from_now_on_shows_no_past(flows: Any) -> None:
    """Without `after`, what happened before is not shown."""
    flow = flow_in(flows, "running")
    watch = Background(lambda: flows.watch(flow))
    seen = iter(range(10_000))

    def shown() -> list[Any]:
        if not watch.items:
            flows.append_event(flow, "note", next(seen))
        return watch.items

    wait_until(shown, description="an event is seen")
    flows.cancel(flow)
    assert watch.join().error is None
    assert set(kinds(watch.items)) == {"note", "cancelled"}
    payloads = [event.payload for event in watch.items[:-1]]
    assert payloads == list(range(payloads[0], payloads[0] + len(payloads)))


def test_watching_from_the_start_shows_everything(flows: Any) -> None:
    """`after="0"`: the whole trail of an ended flow, then the end, at once."""
    flow = flows.finish(flows.resume(flow_in(flows, "waiting")))
    flows.append_event(flow, "epilogue")
    events = list(flows.watch(flow, after="0"))
    assert kinds(events) == ["created", "started", "waiting", "resumed", "finished"]


@pytest.mark.parametrize("status", ["finished", "failed", "cancelled"])
def test_watching_an_ended_flow_ends_at_once(flows: Any, status: str) -> None:
    """There is nothing to come."""
    assert list(flows.watch(flow_in(flows, status))) == []


def test_watching_ends_with_its_timeout(flows: Any) -> None:
    """What is there is shown, also with no time at all; then it ends."""
    flow = flow_in(flows, "running")
    assert list(flows.watch(flow, timeout=0)) == []
    assert kinds(list(flows.watch(flow, after="0-0", timeout=0))) == ["created", "started"]
    assert kinds(list(flows.watch(flow, after="0-0", timeout=0.05))) == ["created", "started"]


def test_watching_an_unknown_flow_is_refused(flows: Any) -> None:
    """FlowNotFound, also when the flow is deleted meanwhile."""
    with pytest.raises(FlowNotFound):
        list(flows.watch(uuid4(), timeout=5))
    flow = flow_in(flows, "running")
    watch = Background(lambda: flows.watch(flow, after="0"))
    wait_until(lambda: len(watch.items) == 2, description="the past is seen")
    flows.delete(flow)
    assert isinstance(watch.join().error, FlowNotFound)


def test_a_watch_does_not_hinder_other_calls(subject: Subject) -> None:
    """Blocking reads have connections of their own: with one connection, everything else goes on."""
    flows = subject.manager(max_connections=1)
    flow = flow_in(flows, "running")
    watches = [Background(lambda: flows.watch(flow, after="0")) for _ in range(3)]
    waiting = Background(lambda: flows.wait_for(flow.id))
    for watch in watches:
        wait_until(partial(watch.has, 2), description="the past is seen")
    flow = flows.finish(flow)
    assert waiting.join().value == flow
    for watch in watches:
        assert kinds(watch.join().items) == ["created", "started", "finished"]


def test_a_watch_may_be_left_early(flows: Any) -> None:
    """Whoever stops reading gets on with the next call."""
    flow = flow_in(flows, "running")
    watch = flows.watch(flow, after="0")
    assert next(watch).kind == "created"
    watch.close()
    assert flows.finish(flow).status is FlowStatus.FINISHED


def carry_out(manager: FlowManager, wanted: Any) -> Any:
    """Carry out one step of an operation that a test drives by hand."""

    def op() -> Any:
        return (yield wanted)

    return manager.perform(op())


def test_watch_has_no_window_between_reading_and_blocking(subject: Subject) -> None:
    """A change after the read and before the block is what the block answers with."""
    manager = subject.rival()
    manager.connect()
    flow = flow_in(manager, "running")
    op = follow.Watch(manager.namespace, flow.id, None, None).next_page()
    wanted: Any = next(op)
    while not isinstance(wanted, Block):
        assert isinstance(wanted, Read)
        wanted = op.send(carry_out(manager, wanted))
    manager.append_event(flow, "in between")
    entries = carry_out(manager, wanted)
    assert entries
    wanted = op.send(entries)
    with pytest.raises(StopIteration) as page:
        op.send(carry_out(manager, wanted))
    assert kinds(page.value.value) == ["in between"]


def test_watch_has_no_window_around_its_beginning(subject: Subject) -> None:
    """Once it has begun, "from now on" stays where it was."""
    manager = subject.rival()
    manager.connect()
    flow = flow_in(manager, "running")
    op = follow.Watch(manager.namespace, flow.id, None, None).next_page()
    read = op.send(carry_out(manager, next(op)))
    manager.finish(flow)
    with pytest.raises(StopIteration) as page:
        op.send(carry_out(manager, read))
    assert kinds(page.value.value) == ["finished"]


# --- wait_for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["finished", "failed", "cancelled"])
def test_waiting_ends_when_the_flow_does(flows: Any, status: str) -> None:
    """By default any end; the flow is returned as `get` has it."""
    flow = flow_in(flows, "running")
    waiting = Background(lambda: flows.wait_for(flow.id, timeout=30))
    flow = {"finished": flows.finish, "cancelled": flows.cancel, "failed": lambda f: flows.fail(f, "x")}[status](flow)
    assert waiting.join().error is None
    assert waiting.value == flow


def test_waiting_for_what_is_there_answers_at_once(flows: Any) -> None:
    """No time needed, by enum or text, any of several."""
    flow = flow_in(flows, "waiting")
    assert flows.wait_for(flow, FlowStatus.WAITING, timeout=0) == flow
    assert flows.wait_for(str(flow.id), "finished", "waiting", timeout=0) == flow


def test_waiting_for_a_status_passes_over_others(flows: Any) -> None:
    """Changes that do not lead there do not end it."""
    flow = create(flows)
    waiting = Background(lambda: flows.wait_for(flow.id, "waiting"))
    flows.start_running(flow)
    flows.update_state(flow, {"x": 1})
    flow = flows.set_waiting(flow, {"kind": "manual"})
    assert waiting.join().value == flow


def test_waiting_in_vain_is_a_timeout(flows: Any) -> None:
    """TimeoutError says what the flow is, and what was wanted."""
    flow = flow_in(flows, "running")
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError, match=r"running.*finished") as late:
            flows.wait_for(flow, "finished", timeout=timeout)
        assert str(flow.id) in str(late.value)


def test_waiting_for_what_never_comes_is_refused(flows: Any) -> None:
    """A flow that ended otherwise: AlreadyTerminal, at once or when it does. No flow: FlowNotFound."""
    flow = flow_in(flows, "running")
    waiting = Background(lambda: flows.wait_for(flow.id, "waiting", "finished"))
    flows.cancel(flow)
    assert isinstance(waiting.join().error, AlreadyTerminal)
    with pytest.raises(AlreadyTerminal) as ended:
        flows.wait_for(flow, "running", timeout=30)
    assert (ended.value.flow_id, ended.value.status) == (flow.id, FlowStatus.CANCELLED)
    with pytest.raises(FlowNotFound):
        flows.wait_for(uuid4(), timeout=30)


def test_wait_for_has_no_window_between_reading_and_blocking(subject: Subject) -> None:
    """A change after the read and before the subscription ends the block at once."""
    manager = subject.rival()
    flow: Flow = flow_in(manager, "running")
    op = follow.wait_for(manager.namespace, flow.id, (), None)
    block = op.send(carry_out(manager, next(op)))
    assert isinstance(block, Block)
    finished = manager.finish(flow)
    entries = carry_out(manager, block)
    assert entries
    read = op.send(entries)
    with pytest.raises(StopIteration) as result:
        op.send(carry_out(manager, read))
    assert result.value.value == finished


# --- lost connections ----------------------------------------------------------------------------------


@contextmanager
def proxied(subject: Subject, options: str = "") -> Iterator[tuple[FaultProxy, Any]]:
    """A manager that goes through a proxy; `options` are the URL's."""
    assert subject.backend.server is not None
    with FaultProxy(subject.backend.server.port) as proxy:
        manager = subject.manager(proxy.url + options)
        yield proxy, manager
        manager.close()


def test_a_watch_resumes_after_a_lost_connection(real_subject: Subject) -> None:
    """Cut again and again while events come: none missed, none twice."""
    direct = real_subject.rival()
    flow = flow_in(direct, "running")
    with proxied(real_subject) as (proxy, flows):
        watch = Background(lambda: flows.watch(flow.id, after="0"))
        for n in range(20):
            direct.append_event(flow, "note", n)
            if n % 4 == 0:
                proxy.sever()
            if n % 5 == 0:
                wait_until(partial(watch.has, n), description=f"{n} events are seen")
        direct.finish(flow)
        assert watch.join().error is None
        assert watch.items == list(direct.iter_events(flow))


@pytest.mark.parametrize("follow_by", ["watch", "wait_for"])
def test_silence_is_not_taken_for_a_loss(real_subject: Subject, follow_by: str) -> None:
    """Blocks are shorter than the socket timeout, so nothing is connected anew; and each names an id, never `$`."""
    direct = real_subject.rival()
    flow = flow_in(direct, "running")
    blocks: list[list[bytes]] = []

    def plan(command: list[bytes]) -> Fault:
        if b"BLOCK" in command:
            blocks.append(command)
        return PASS

    with proxied(real_subject, "?socket_timeout=2") as (proxy, flows):
        proxy.plan = plan
        following: dict[str, Any] = {
            "watch": lambda: [event.kind for event in flows.watch(flow)],
            "wait_for": lambda: flows.wait_for(flow).status,
        }
        follower = Background(following[follow_by])
        wait_until(lambda: blocks, description="it blocks")
        before = proxy.connections
        wait_until(lambda: len(blocks) >= 4, description="it has been silent for longer than the socket timeout")
        direct.finish(flow)
        assert follower.join().error is None
        assert follower.value == (["finished"] if follow_by == "watch" else "finished")
        assert proxy.connections == before
    for command in blocks:
        arguments = dict(zip(command[1:5:2], command[2:6:2], strict=True))
        assert 0 < int(arguments[b"BLOCK"]) < 2000
        assert command[-1].partition(b"-")[0].isdigit()


def test_a_watch_from_now_on_misses_nothing_of_a_lost_connection(real_subject: Subject) -> None:
    """Cut before its first event came: "now" stays when it was."""
    direct = real_subject.rival()
    flow = flow_in(direct, "running")
    with proxied(real_subject) as (proxy, flows):
        lost = threading.Event()

        def plan(command: list[bytes]) -> Fault:
            if b"BLOCK" in command and not lost.is_set():
                lost.set()
                return HANG
            return PASS

        proxy.plan = plan
        watch = Background(lambda: flows.watch(flow))
        assert lost.wait(15)
        direct.append_event(flow, "note")
        proxy.sever()
        wait_until(partial(watch.has, 1), description="the event is seen")
        direct.finish(flow)
        assert watch.join().error is None
        assert kinds(watch.items) == ["note", "finished"]


def test_waiting_resumes_after_a_lost_connection(real_subject: Subject) -> None:
    """The change is found after the cut."""
    direct = real_subject.rival()
    flow = flow_in(direct, "running")
    with proxied(real_subject) as (proxy, flows):
        waiting = Background(lambda: flows.wait_for(flow.id))
        wait_until(lambda: proxy.connections >= 2, description="the waiter blocks")
        proxy.sever()
        finished = direct.finish(flow)
        assert waiting.join().value == finished


def test_a_running_engine_survives_a_restart_of_its_server(own_subject: Subject) -> None:
    """Away and back, its scripts forgotten: what is due is resumed."""
    subject = own_subject
    server = subject.backend.server
    assert server is not None
    flows = subject.manager(deadline_s=0.3)
    engine = subject.engine(flows)
    first = flow_in(flows, "waiting", wait=Timer.from_wire({"at": "2020-01-01T00:00:00Z"}))
    with subject.running(engine, 0.05) as halt:
        wait_until(lambda: flows.get(first.id).status == "running", description="the engine works")
        server.stop()
        server.start()
        patient = subject.manager()
        second = flow_in(patient, "waiting", wait=Timer.from_wire({"at": "2020-01-01T00:00:00Z"}))
        wait_until(lambda: patient.get(second.id).status == "running", description="the engine works again")
        halt()
    assert patient.get(first.id).revision == 3
