-- Deletes a flow, ended or not, and all its keys and index entries.
--
-- For an hour it leaves a tombstone in its place. By it this deletion, a repeated creation, and attempts that come too
-- late are recognized.
--
-- KEYS  1 flow  2 events  3 steps  4 seen  5 owner set  6 due  7 waiters
--       8-13 status sets: created running waiting finished failed cancelled
--       14 brought   seen once more, only where the caller brought the op
-- ARGV  1 op          id of this operation: stands in the tombstone
--       2 conditions  '' or '<attempt>|<refusal>|<expected>|<owner>', see include/conditions.lua and docs/layout.md
--       3 flow_id
--       4 created_at  which tells the flow from another of the same id, whose owner may be another
--       5 terminal    '' to delete any flow, else only one in these statuses, each between bars,
--       6 before      and last changed before this, in microseconds
-- REPLY OK | ABSENT | STALE revision | KEPT | MOVED (deleted and created anew since the caller saw it)
--       OTHER_OP kind | error FENCED fence | error REFUSED note
local flow_key, events_key, steps_key, seen_key, owner_key, due_key, waiters_key = unpack(KEYS, 1, 7)
local op, conditions, flow_id, created_at, terminal, before = unpack(ARGV, 1, 6)
local status_keys = {unpack(KEYS, 8, 13)}
local brought_key = KEYS[14]
local MOST_PAST = 64 * 33 -- of creations and deletions; each is an operation's id and a blank

local stored = redis.call(
  'HMGET', flow_key, 'created_at', 'revision', 'etag', 'status', 'updated_at', 'waiter', 'gone', 'past', 'created_by'
)
local found_created_at, revision, etag, status, updated_at, waiter = unpack(stored, 1, 6)
local gone, past, created_by = unpack(stored, 7, 9)
if past and string.find(past, op, 1, true) then
  return {'OK'}
end
local attempt, refusal, expected, is_hidden = '', '', '', false
if conditions ~= '' then
  --- include: conditions.lua
  attempt, refusal, expected, is_hidden = read_conditions(flow_key, conditions)
end
if string.sub(attempt, 1, 1) == '=' then
  return {'OK'}
elseif is_hidden or gone or not found_created_at then
  return {'ABSENT'}
end
etag = etag or ''
local fence = string.sub(etag, 34)
if attempt ~= fence then
  return redis.error_reply('FENCED ' .. fence)
elseif found_created_at ~= created_at then
  return {'MOVED'}
end
local note = brought_key and redis.call('ZSCORE', brought_key, op)
if note and string.sub(note, 1, 1) ~= '-' then
  return {'OTHER_OP', 'a change'}
elseif note and note ~= refusal then
  return redis.error_reply('REFUSED ' .. note)
end
local version = string.sub(etag, 1, 32) .. ' ' .. (updated_at or '')
if expected ~= '' and expected ~= revision and expected ~= (revision or '') .. ' ' .. version then
  --- include: refuse.lua
  return brought_key and refuse(brought_key, op, {'STALE', revision or '0'}) or {'STALE', revision or '0'}
end
if terminal ~= '' then
  local ended = status and string.find(terminal, '|' .. status .. '|', 1, true)
  if not ended or (tonumber(updated_at) or math.huge) >= tonumber(before) then
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
if not created_by then
  --- include: creator.lua
  created_by = creator(events_key)
end

redis.call('UNLINK', flow_key, events_key, steps_key, seen_key)
redis.call('ZREM', owner_key, flow_id)
redis.call('ZREM', due_key, flow_id)
if waiter then
  redis.call('ZREM', waiters_key, waiter .. flow_id)
end
for _, status_key in ipairs(status_keys) do
  redis.call('ZREM', status_key, flow_id)
end
--- include: fence.lua
-- What has been unchanged for as long as a tombstone lasts has no attempt under way.
if terminal == '' or tonumber(updated_at) / 1000000 > redis.call('TIME')[1] - TOMBSTONE_S then
  local next = next_fence(fence, '0-0')
  local life = string.match(next, '^%d+')
  past = (past or '') .. (created_by or '?' .. life) .. ' ' .. op .. ' '
  if #past > MOST_PAST then
    past = '?' .. life .. ' ' .. string.sub(past, -MOST_PAST)
  end
  bury(flow_key, op .. ' ' .. next, 'past', past, 'life', life)
end
return {'OK'}
