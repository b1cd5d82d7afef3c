-- The index of the operation ids that callers brought, by the time of their events.
--
-- Where the trail is trimmed, so is the index, but for the ids of the last hour: their calls may still be sent again.
local REMEMBERED_MS = 3600000

-- Enters the id of an operation that has just been applied.
local function remember(seen_key, op, event_id)
  local added_ms = string.match(event_id, '^%d+')
  redis.call('ZADD', seen_key, added_ms, op)
  if EVENT_MAXLEN and redis.call('ZCARD', seen_key) > tonumber(EVENT_MAXLEN) then
    -- Two at a time, so that an index that has grown shrinks again. Refusals have negative times.
    local until_ms = added_ms - REMEMBERED_MS
    for _, old in ipairs(redis.call('ZRANGE', seen_key, -until_ms, until_ms, 'BYSCORE', 'LIMIT', 0, 2)) do
      redis.call('ZREM', seen_key, old)
    end
  end
end
