-- Refuses an operation whose id the caller brought.
--
-- An attempt of an earlier call may still be on its way, and must not be applied once a later call was refused. So the
-- index of those ids notes when that was, by a negative score that no refusal before had, and an attempt is applied
-- only if it names the note.
local function refuse(seen_key, op, reply)
  local now, last = redis.call('TIME'), redis.call('ZSCORE', seen_key, op)
  local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
  redis.call('ZADD', seen_key, string.format('%.0f', math.min(-now_ms, (last or 0) - 1)), op)
  return reply
end
