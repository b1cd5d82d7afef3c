"""What an audit finds, and what it is told must be there."""

from __future__ import annotations

import enum
from uuid import UUID

import attrs


class Damage(enum.StrEnum):
    """What can be wrong."""

    META = "the namespace's settings"
    UNKNOWN_KEY = "a key that the layout does not have"
    WRONG_TYPE = "a key of the wrong type"
    WRONG_PARTITION = "a key or an entry in a partition that is not its flow's"
    SCRATCH = "a scratch key that was left"
    EXPIRY = "a key that expires"
    ORPHAN = "something of a flow that does not exist"
    FLOW = "a hash that makes no sense"
    EVENT = "an event that makes no sense"
    STEP = "a step that makes no sense"
    GAP = "revisions that do not follow one another"
    REVISION = "a revision that is not the trail's"
    OP_TWICE = "an operation that was applied twice"
    ETAG = "an etag that is not the last operation's"
    FORBIDDEN = "a change that the rules forbid"
    STATE = "a flow that is not what its trail makes of it"
    STEPS = "steps that are not what the trail says"
    STATUS_SET = "a wrong entry of a status"
    OWNER_SET = "a wrong entry of an owner"
    DUE = "a wrong entry of what is due"
    WAITERS = "a wrong entry of the waiters"
    LOST = "an acknowledged change that is not there"
    MISTOLD = "an acknowledged change that is there as another revision"


class Breach(enum.StrEnum):
    """What can be wrong with what calls were answered, although all that is stored goes together."""

    REFUSED = "a change that was refused and is there"
    ORDER = "changes that are in another order than they were asked for"
    LATE = "an attempt that was applied after its call had been answered"
    ANSWER = "an answer that nothing explains"
    UNKNOWN = "an outcome that stayed unknown"


@attrs.frozen
class Finding:
    """One thing that is wrong, and the flow it is about, if it is about one."""

    damage: Damage | Breach
    flow: UUID | None
    sentence: str

    def __str__(self) -> str:
        return f"{self.damage}: {'' if self.flow is None else f'flow {self.flow}: '}{self.sentence}"


@attrs.frozen
class Acknowledged:
    """A change somebody was told of: it must stand in the trail once.

    A verb tells of one by the etag and the revision of the flow it answers with, be it its own or a later one.

    Attributes:
        revision: that its event must carry.
        kind: of its event; `None` where the caller cannot tell.
    """

    flow_id: UUID
    op_id: str
    revision: int
    kind: str | None = None

    def __str__(self) -> str:
        what = "a change" if self.kind is None else repr(self.kind)
        return f"{what} by operation {self.op_id}, acknowledged as revision {self.revision}"
