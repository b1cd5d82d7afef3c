"""The Lua scripts, as files and as the library sends them."""

from __future__ import annotations

from pathlib import Path

from redisflow import scripts

LUA = Path(__file__).parents[2] / "lua"
EVERY_SCRIPT = (
    scripts.CREATE,
    scripts.APPEND_EVENT,
    scripts.OBSERVE_STEP,
    scripts.DELETE,
    *(transition.script for transition in scripts.TRANSITIONS.values()),
)
