-- Creates a flow and appends the events that say so.
--
-- KEYS  1 flow  2 events  3 owner set  4 status set  5 scratch  there is none before and after
-- ARGV  1 op          id of this operation: becomes the flow's etag, stands in the events
--       2 conditions  '' or '<look>|<expected>|<owner>', see include/conditions.lua and docs/layout.md
--       3 flow_id
--       4 owner       the owner whose flow of this id is answered if it exists, '' to refuse
--       5 status
--       6 n_events; then kind and payload pairs, field and value pairs
-- REPLY created_at | FLOW fields (created before) | EXISTS | UNKNOWN
local flow_key, events_key, owner_key, status_key, scratch_key = unpack(KEYS, 1, 5)
local op, conditions, flow_id, owner, status, n_events = unpack(ARGV, 1, 6)
local fields_from = 7 + 2 * n_events

if redis.call('HLEN', flow_key) > 0 then
  local look = ''
  if conditions ~= '' then
    --- include: conditions.lua
    local _, hidden
    look, _, hidden = read_conditions(flow_key, conditions)
    if hidden then
      return {'EXISTS'}
    end
  end
  local etag, found_owner = unpack(redis.call('HMGET', flow_key, 'etag', 'owner_session_key'), 1, 2)
  local verdict = etag == op and 'FOUND'
  if not verdict and look ~= '' then
    --- include: look_back.lua
    verdict = look_back(events_key, op, look)
  end
  if verdict == 'FOUND' or (owner ~= '' and owner == found_owner) then
    return {'FLOW', redis.call('HGETALL', flow_key)}
  end
  return {verdict == 'UNKNOWN' and 'UNKNOWN' or 'EXISTS'}
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
-- What every change reads and writes comes first: a small hash is searched from its start.
redis.call(
  'HSET', flow_key, 'status', status, 'etag', op, 'revision', revision, 'updated_at', created_at,
  'created_at', created_at
)
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
return created_at
