"""The Lua scripts, as files and as the library sends them."""

from __future__ import annotations

from pathlib import Path

from redisflow import scripts

LUA = Path(__file__).parents[2] / "lua"
EVERY_SCRIPT = (
    scripts.SETTLE,
    scripts.DELETE,
    scripts.LOOK,
    scripts.MEND,
    scripts.READ_OWN,
    *(
        script
        for appending in (scripts.UNTRIMMED, scripts.Appending.keeping(1000))
        for script in (
            appending.create,
            appending.append_event,
            appending.observe_step,
            *(transition.script for transition in appending.transitions.values()),
        )
    ),
)
