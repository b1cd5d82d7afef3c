-- Creates a flow and appends the events that say so.
--
-- A prelude binds EVENT_MAXLEN: about how many entries trails keep, nil for all.
--
-- KEYS  1 flow  2 events  3 owner set  4 status set  5 scratch  there is none before and after
--       6 seen   only where the caller brought the op; it is not touched
-- ARGV  1 op          id of this operation: becomes the flow's etag, stands in the events
--       2 conditions  '' or '<attempt>|<refusal>|<expected>|<owner>', see include/conditions.lua and docs/layout.md
--       3 flow_id
--       4 owner       the owner whose flow of this id is answered if it exists, '' to refuse
--       5 status
--       6 n_events; then kind and payload pairs, field and value pairs
-- REPLY created_at | FLOW fields (it exists: created by this operation, or the caller takes what is there)
--       EXISTS whole (0 if its trail was trimmed, so that nothing tells who created it)
--       DELETED (created by this operation, and deleted since) | UNKNOWN (deleted, and nothing tells who created it)
--       OTHER_OP kind | error FENCED fence | error UNSETTLED
local flow_key, events_key, owner_key, status_key, scratch_key, seen_key = unpack(KEYS, 1, 6)
local op, conditions, flow_id, owner, status, n_events = unpack(ARGV, 1, 6)
local fields_from = 7 + 2 * n_events

local fence, life -- of a flow that takes the place of a tombstone, and of a deleted flow
if redis.call('HLEN', flow_key) > 0 then
  local attempt, is_hidden, _ = '', false, nil
  if conditions ~= '' then
    --- include: conditions.lua
    attempt, _, _, is_hidden = read_conditions(flow_key, conditions)
  end
  local stored = redis.call('HMGET', flow_key, 'owner_session_key', 'etag', 'gone', 'created_by', 'past')
  local found_owner, found_etag, gone, created_by, past = unpack(stored, 1, 5)
  local was_deleted = past and string.find(past, op, 1, true)
  if is_hidden and not gone then
    return {'EXISTS', 1}
  end
  local found_fence = string.sub(found_etag or '', 34)
  local is_found = string.sub(attempt, 1, 1) == '='
  if attempt ~= found_fence and not is_found then
    return redis.error_reply('FENCED ' .. found_fence)
  end
  if not gone then
    --- include: creator.lua
    created_by = created_by or creator(events_key) or is_found and string.sub(found_etag or '', 1, 32) == op and op
    if created_by == op or (owner ~= '' and owner == found_owner) then
      return {'FLOW', redis.call('HGETALL', flow_key)}
    end
  end
  if was_deleted then
    return gone and {'DELETED'} or {'EXISTS', 1}
  elseif is_found then
    local entry = redis.call('XRANGE', events_key, string.sub(attempt, 2), '+', 'COUNT', 1)[1]
    if entry and entry[2][6] == op then
      return {'OTHER_OP', entry[2][4]}
    end
    return redis.error_reply('UNSETTLED the event is gone')
  elseif not gone then
    return {'EXISTS', created_by and 1 or 0}
  elseif seen_key and past and string.find(past, '?', 1, true) then
    return {'UNKNOWN'}
  end
  -- An attempt that was meant for the deleted flow must not be applied to this one: its fence is another.
  --- include: fence.lua
  fence = next_fence(found_fence, '0-0')
  life = past and string.match(fence, '^%d+')
end
-- A key of the wrong type must fail here: a script that fails midway keeps what it wrote before.
local is_new = redis.call('XLEN', events_key) == 0
redis.call('ZCARD', owner_key)
redis.call('ZCARD', status_key)

local now = redis.call('TIME')
local created_at = now[1] .. string.format('%06d', now[2])
local revision = n_events - 1
-- The events first: no check could tell that a stream is at the greatest id there is.
for event = 0, revision do
  local kind, payload = unpack(ARGV, 7 + 2 * event, 8 + 2 * event)
  redis.call('XADD', events_key, '*', 'rev', event, 'kind', kind, 'op', op, 'payload', payload)
end
if fence then
  redis.call('HDEL', flow_key, 'gone')
  redis.call('PERSIST', flow_key)
  if life then
    redis.call('HSET', flow_key, 'life', life)
  end
end
-- What every change reads and writes comes first: a small hash is searched from its start.
redis.call(
  'HSET', flow_key, 'status', status, 'etag', fence and op .. ' ' .. fence or op, 'revision', revision,
  'updated_at', created_at, 'created_at', created_at
)
if EVENT_MAXLEN then
  redis.call('HSET', flow_key, 'created_by', op) -- its event will be trimmed
end
-- unpack() of some 8,000 values overflows Lua's stack.
for from = fields_from, #ARGV, 4000 do
  redis.call('HSET', flow_key, unpack(ARGV, from, math.min(from + 3999, #ARGV)))
end
redis.call('ZADD', owner_key, created_at, flow_id)
redis.call('ZADD', status_key, created_at, flow_id)
if is_new then
  -- Some 4 KB are allocated for what comes into a new stream. A copy has just what is in it, and grows as it must.
  redis.call('COPY', events_key, scratch_key, 'REPLACE')
  redis.call('RENAME', scratch_key, events_key)
end
if fence then
  return {'FLOW', redis.call('HGETALL', flow_key)}
end
return created_at
