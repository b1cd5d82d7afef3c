"""What schedules are about: some kinds of trouble are too rare to be met by chance alone."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from tests.protocol.beginnings import KINDS, Kind

_OFTEN = (
    *("increment",) * 8,
    *("append", "start_running", "set_waiting", "resume", "create", "delete") * 2,
    *("append_created", "observe", "finish", "cancel", "request_cancel", "mirror", "get_or_create"),
)
_ALIVE = (Kind.RUNNING, Kind.LONG, Kind.SETTLED)


@attrs.frozen(eq=False)
class Theme:
    """How a schedule is drawn.

    Attributes:
        verbs: those that are called, more often those that are named more often.
        beginnings: what the flows are at first.
        most_flows: there are at most so many.
        units: how many calls, batches, or groups of calls with one operation id are planned.
        within_s: all of them begin within so many seconds.
        trouble: how likely it is that a packet meets with trouble.
        gentle: how likely it is that the server can be reached again in time.
        batches, brought: how likely it is that a unit is a batch, or a group of calls with one id.
        alike: whether the calls of a batch are of one verb, on flow after flow.
        copies, cancels: how likely it is that a call is by a copy, and that it is cancelled.
        trims, bound: how likely it is that a client trims trails, and is bound to an owner.
        outage, refusing, restarting, forgetting, trimming: how likely such a disturbance is.
        settlers: how many calls settle one whose outcome is unknown; within how many seconds is in `settled_within_s`.
    """

    verbs: Sequence[str] = _OFTEN
    beginnings: Sequence[Kind] = (*KINDS, Kind.RUNNING, Kind.RUNNING, Kind.RUNNING, Kind.CREATED, Kind.LONG)
    most_flows: int = 3
    units: Sequence[int] = (1, 2, 2, 2, 3)
    within_s: float = 0.15
    trouble: Sequence[float] = (0.1, 0.2, 0.35, 0.5)
    gentle: float = 0.6
    batches: float = 0.2
    brought: float = 0.2
    alike: bool = False
    copies: float = 0.5
    cancels: float = 0.08
    trims: float = 0.2
    bound: float = 0.15
    outage: float = 0.12
    refusing: float = 0.15
    restarting: float = 0.1
    forgetting: float = 0.15
    trimming: float = 0.07
    settlers: Sequence[int] = (1, 1, 2)
    settled_within_s: Sequence[float] = (0.01, 0.3, 4.0)


ANY = Theme()
# Many events on one flow: what is searched for is far back.
HOT = Theme(
    verbs=("increment", "append"),
    beginnings=_ALIVE,
    most_flows=1,
    units=(4,),
    within_s=0.03,
    trouble=(0.2, 0.35),
    batches=0.0,
    brought=0.0,
    copies=0.2,
    bound=0.0,
)
# Trails that are trimmed, of flows that hardly change.
SHORT_TRAILS = Theme(
    verbs=("append_created", "append_created", "append", "observe", "increment"),
    beginnings=(Kind.CREATED, Kind.TRIMMED_BY_HAND),
    most_flows=1,
    units=(3, 4),
    within_s=0.03,
    batches=0.0,
    brought=0.0,
    copies=0.2,
    trims=0.5,
    bound=0.0,
    trimming=0.5,
)
# Operations under ids that callers brought, on such trails.
FORGOTTEN = attrs.evolve(
    SHORT_TRAILS,
    verbs=("append", "observe", "increment", "create"),
    beginnings=(Kind.CREATED, Kind.ABSENT, Kind.KEPT_SHORT),
    units=(2, 3),
    gentle=0.8,
    brought=0.6,
)
# Flows that are deleted and created anew while calls are under way.
REBIRTHS = Theme(
    verbs=("increment", "append", "delete", "delete", "create", "create"),
    beginnings=(Kind.RUNNING, Kind.CREATED, Kind.DELETED, Kind.REBORN),
    most_flows=1,
    units=(3, 4),
    within_s=0.04,
    trouble=(0.2, 0.35),
    batches=0.0,
    copies=0.2,
    bound=0.05,
)
DELETIONS = attrs.evolve(
    REBIRTHS,
    verbs=("increment", "append", "delete", "create"),
    beginnings=(Kind.RUNNING, Kind.CREATED),
    units=(5,),
    within_s=0.08,
    brought=0.0,
)
# Batches of one verb on several flows, on a server that forgets its scripts and refuses.
FORGETFUL = Theme(
    verbs=("increment", "append"),
    beginnings=_ALIVE,
    units=(1, 2),
    trouble=(0.0, 0.1),
    gentle=0.9,
    batches=0.9,
    alike=True,
    copies=0.0,
    trims=0.0,
    refusing=0.9,
    forgetting=0.9,
)
# Calls whose outcome stays unknown, and is settled by several at once.
SETTLERS = Theme(
    verbs=("increment", "append", "start_running", "create"),
    beginnings=(*_ALIVE, Kind.ABSENT, Kind.LONG),
    most_flows=1,
    units=(1, 2),
    trouble=(0.3, 0.5),
    gentle=0.0,
    batches=0.0,
    brought=0.1,
    bound=0.0,
    settlers=(2, 3),
    settled_within_s=(0.01, 0.03),
)
# Calls that are settled after the flow has moved on, by a copy from then.
NEWER_COPIES = attrs.evolve(HOT, gentle=0.0, copies=0.8, settlers=(1,), settled_within_s=(0.1, 0.5))
# Operations that are tried again under the id that the caller brought, and refused, while an earlier attempt is late.
SECOND_TRIES = Theme(
    verbs=("start_running", "set_waiting", "resume"),
    beginnings=(Kind.CREATED, Kind.RUNNING, Kind.WAITING, Kind.ABSENT),
    most_flows=1,
    units=(3, 4),
    trouble=(0.2, 0.35),
    gentle=0.0,
    batches=0.0,
    brought=0.6,
    copies=0.2,
    cancels=0.5,
    bound=0.0,
    settlers=(1, 2),
    settled_within_s=(0.03, 0.1),
)
# The same, of flows that took the place of deleted ones.
SECOND_LIVES = attrs.evolve(
    SECOND_TRIES,
    verbs=("increment", "append", "resume"),
    beginnings=(Kind.REBORN,),
    copies=0.5,
    brought=1.0,
    units=(2, 3),
)
_NARROW = (
    HOT,
    SHORT_TRAILS,
    FORGOTTEN,
    REBIRTHS,
    DELETIONS,
    FORGETFUL,
    SETTLERS,
    NEWER_COPIES,
    SECOND_TRIES,
    SECOND_LIVES,
)
THEMES = (*(ANY,) * len(_NARROW), *_NARROW)
