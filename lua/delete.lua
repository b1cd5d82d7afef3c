-- Deletes a flow with every key and index entry of its.
--
-- KEYS  1 flow  2 events  3 steps  4 owner set  5 due  6 waiters
--       7-12 status sets: created running waiting finished failed cancelled
-- ARGV  1 op          id of this operation; it leaves no trace once the flow is gone
--       2 conditions  '' or '<look>|<expected>|<owner>', see include/conditions.lua and docs/layout.md
--       3 flow_id
--       4 created_at  which tells the flow from another of the same id, whose owner may be another
--       5 terminal    '' to delete any flow, else only one in these statuses, each between bars,
--       6 before      and last changed before this, in microseconds
-- REPLY OK | ABSENT | STALE revision | KEPT | MOVED (deleted and created anew since the caller saw it)
local flow_key, events_key, steps_key, owner_key, due_key, waiters_key = unpack(KEYS, 1, 6)
local conditions, flow_id, created_at, terminal, before = unpack(ARGV, 2, 6)
local status_keys = {unpack(KEYS, 7, 12)}

local stored = redis.call('HMGET', flow_key, 'created_at', 'revision', 'etag', 'status', 'updated_at', 'waiter')
local found_created_at, revision, etag, status, updated_at, waiter = unpack(stored, 1, 6)
local look, expected, hidden = '', '', false
if conditions ~= '' then
  --- include: conditions.lua
  look, expected, hidden = read_conditions(flow_key, conditions)
end
if hidden then
  found_created_at = nil
end
if found_created_at ~= created_at then
  -- The caller saw it before its first attempt: gone by a resend, that attempt deleted it.
  return {string.find(look, '%d') and 'OK' or found_created_at and 'MOVED' or 'ABSENT'}
end
local version = (etag or '') .. ' ' .. (updated_at or '')
if expected ~= '' and expected ~= revision and expected ~= (revision or '') .. ' ' .. version then
  return {'STALE', revision or '0'}
end
if terminal ~= '' then
  local ended = status and string.find(terminal, '|' .. status .. '|', 1, true)
  if not ended or (tonumber(updated_at) or before) >= tonumber(before) then
    return {'KEPT'}
  end
end
-- A key of the wrong type must fail here: a script that fails midway keeps what it wrote before.
redis.call('ZCARD', owner_key)
redis.call('ZCARD', due_key)
redis.call('ZCARD', waiters_key)
for _, status_key in ipairs(status_keys) do
  redis.call('ZCARD', status_key)
end

redis.call('UNLINK', flow_key, events_key, steps_key)
redis.call('ZREM', owner_key, flow_id)
redis.call('ZREM', due_key, flow_id)
if waiter then
  redis.call('ZREM', waiters_key, waiter .. flow_id)
end
for _, status_key in ipairs(status_keys) do
  redis.call('ZREM', status_key, flow_id)
end
return {'OK'}
