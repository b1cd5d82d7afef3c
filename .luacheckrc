-- What a script may use: Lua 5.1 without what Redis shuts out, and without `cjson`, `cmsgpack`, `struct` and
-- `bit`, because no script decodes a value and fakeredis has not all of them.
std = "lua51"
read_globals = { "redis", "KEYS", "ARGV" }
not_globals = {
    "collectgarbage", "debug", "dofile", "getfenv", "io", "loadfile", "module", "newproxy", "os", "package",
    "print", "require", "setfenv",
}
max_line_length = 120

-- Includes are pasted into scripts: a local of an include is unused in its own file and known in all others.
files["lua/include/*.lua"] = { ignore = { "211" }, read_globals = { "EVENT_MAXLEN" } }
for name in require("lfs").dir("lua/include") do
    if name:match("%.lua$") then
        for line in io.lines("lua/include/" .. name) do
            local defined = line:match("^local function ([%w_]+)") or line:match("^local ([%w_]+) =")
            read_globals[#read_globals + 1] = defined
        end
    end
end

-- The preludes of redisflow/scripts.py.
files["lua/create.lua"] = { read_globals = { "EVENT_MAXLEN" } }
files["lua/append_event.lua"] = { read_globals = { "EVENT_MAXLEN" } }
files["lua/observe_step.lua"] = { read_globals = { "EVENT_MAXLEN" } }
files["lua/reconcile.lua"] = { read_globals = { "MEND" } }
files["lua/transition.lua"] = {
    read_globals = {
        "EVENT_MAXLEN", "COPY_STATUS", "TARGET", "WHEN_PENDING", "WHEN_TERMINAL", "STATUSES", "TERMINAL", "SOURCES", "WITH_EVENT", "FIELDS_FROM",
        "created_key", "running_key", "waiting_key", "target_key", "due_key", "waiters_key", "seen_key", "kind", "merge", "due_at", "waiter", "wake",
        "stamp_field", "stamp_head", "stamp_tail", "n_unset", "n_increment",
    },
}
