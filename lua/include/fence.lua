-- Gives flows and tombstones their fences.
--
-- A fence is `<number>-<event id>`, after the operation's id in the etag. From the moment that a flow has another one,
-- no attempt that was sent before is applied, however late it arrives.
--
-- A flow that does not exist has a tombstone for it, for a while: a hash with the field `gone`.
local TOMBSTONE_S = 3600

-- Returns the fence that follows one: a number, one higher, and the id of the trail's last event, so that a later
-- search knows where to end.
local function next_fence(fence, last_event_id)
  return string.format('%d-%s', (tonumber(string.match(fence, '^%d+')) or 0) + 1, last_event_id)
end

-- Makes a key a tombstone, with an etag, and more fields and values.
local function bury(flow_key, etag, ...)
  redis.call('HSET', flow_key, 'gone', '1', 'etag', etag, ...)
  redis.call('PEXPIRE', flow_key, 1000 * TOMBSTONE_S)
end

-- Gives a flow, or its tombstone, the next fence. Returns it.
local function fence_off(flow_key, etag, is_gone, last_event_id)
  local fence = next_fence(string.sub(etag, 34), last_event_id)
  local changed_by = string.sub(etag, 1, 32)
  etag = changed_by .. string.rep(' ', 33 - #changed_by) .. fence
  if is_gone then
    bury(flow_key, etag)
  else
    redis.call('HSET', flow_key, 'etag', etag)
  end
  return fence
end
