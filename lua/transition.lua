-- Moves a flow along its lifecycle, or changes it in place, and appends the event that says so.
--
-- Each verb has scripts of its own: these lines behind a prelude that redisflow/scripts.py writes from the verb's
-- row of the transition table. Where the caller's copy says that the flow is in a status the verb may start from,
-- and no cancel is pending, the script is one for just that status and is given just its keys. The prelude binds
--   COPY_STATUS       that status, nil for any
--   TARGET            status it leads to; nil for the same
--   WHEN_PENDING      refuse | allow | ignore, where a cancel is pending
--   WHEN_TERMINAL     refuse | ignore
--   STATUSES, TERMINAL, SOURCES   all statuses, the terminal ones, those it may start from: each between bars
--   WITH_EVENT        whether the caller wants the event's id
--   EVENT_MAXLEN      about how many events the trail keeps; nil for all
--   created_key, running_key, waiting_key   the sets of the statuses it may start from, or of
--                     COPY_STATUS; nil for the others
--   target_key        the set of the status it leads to; nil for the same
--   due_key, waiters_key   nil where it neither enters nor leaves a wait
--   seen_key          the index of the operation ids that callers brought; nil where this one was not brought
--   FIELDS_FROM       where in ARGV the field and value pairs begin
-- and, nil where the verb does not take them:
--   kind              of the event
--   merge             what becomes of the state: '' nothing | patch | over (a patch, and the caller's copy is no
--                     mapping) | replace
--   due_at            microseconds: when an engine must look at the new wait, '' for never
--   waiter            '<topic>\0<correlation_id>\0' of the new wait, '' for none
--   wake              '1' if an engine must look at once at a flow that stays waiting
--   stamp_field, stamp_head, stamp_tail   a field whose value is head .. time .. tail
--   n_unset, n_increment   fields to delete, and field and delta pairs, at the head of the rest
--
-- KEYS  1 flow  2 events, then the prelude's
-- ARGV  1 op              id of this operation: becomes the flow's etag, stands in the event
--       2 conditions      '' or '<attempt>|<refusal>|<expected>|<owner>', see include/conditions.lua and docs/layout.md
--       3 flow_id
--       4 held            etag, as it is stored, and updated_at of the caller's copy; '' for none
--       5 next_revision   one more than the revision of the caller's copy
--       6 payload         of the event; then the prelude's, then fields
-- REPLY updated_at, or OK updated_at event_id   applied, and the caller's copy was current
--       FLOW fields event_id event_revision    applied, now or before: the whole hash
--       SAME | FLOW fields                     nothing to do
--       OTHER_KEYS                             it is in another status than COPY_STATUS: call again with all keys
--       ABSENT | STALE revision | TERMINAL status | PENDING | ILLEGAL status
--       NOT_INTEGER field | NOT_MAPPING | OTHER_OP kind | CORRUPT field
--       error FENCED fence                     the attempt was sent before somebody settled the flow: not applied
--       error REFUSED note                     the operation was refused since the attempt was sent: not applied
--       error UNSETTLED                        the event that a search has found is gone: settle the flow again
local call = redis.call
local flow_key, events_key = KEYS[1], KEYS[2]
local op, conditions, flow_id, held, next_revision, payload = unpack(ARGV, 1, 6)

local attempt, refusal, expected = '', '', ''
if conditions ~= '' then
  --- include: conditions.lua
  local is_hidden
  attempt, refusal, expected, is_hidden = read_conditions(flow_key, conditions)
  if is_hidden then
    return {'ABSENT'}
  end
end
-- An etag names one version of a flow, and its fence: where the stored one is the caller's, what the copy says is so.
-- With the time, because an operation may have been applied twice, to what a failover lost and to what it kept.
local named = call('HMGET', flow_key, 'etag', 'updated_at')
local etag, changed_at = named[1] or '', named[2] or ''
local current = held == etag .. ' ' .. changed_at
local status, cancel_requested, revision = COPY_STATUS, '0', nil
if not current or not COPY_STATUS or conditions ~= '' or seen_key then
  local stored = call('HMGET', flow_key, 'status', 'cancel_requested', 'revision')
  status, cancel_requested, revision = unpack(stored, 1, 3)
end

-- Guards, in the order docs/concepts.md gives; nothing is written before the last of them.
if not status then
  --- include: is_gone.lua
  if is_gone(flow_key) then
    --- include: absent.lua
    return absent(flow_key, seen_key, etag)
  end
end
local is_found = false
if not current or conditions ~= '' then
  local fence = string.sub(etag, 34)
  is_found = string.sub(attempt, 1, 1) == '='
  if attempt ~= fence and not is_found then
    return redis.error_reply('FENCED ' .. fence)
  end
  if not revision or not string.match(revision, '^%d+$') then
    return {'CORRUPT', 'revision'}
  end
  next_revision = string.format('%.0f', revision + 1)
end
if is_found or seen_key then
  --- include: replay.lua
  local entry, again = replay(events_key, seen_key, op, attempt, refusal, etag)
  if again then
    return again
  elseif entry and kind ~= entry[2][4] then
    return {'OTHER_OP', entry[2][4]}
  elseif entry then
    return {'FLOW', call('HGETALL', flow_key), entry[1], entry[2][2]}
  elseif entry == false then
    return {'FLOW', call('HGETALL', flow_key), '', revision}
  end
end
if expected ~= '' and expected ~= revision then
  if expected ~= revision .. ' ' .. string.sub(etag, 1, 32) .. ' ' .. changed_at then
    --- include: refuse.lua
    return seen_key and refuse(seen_key, op, {'STALE', revision}) or {'STALE', revision}
  end
end
local source_key = status == 'running' and running_key or status == 'waiting' and waiting_key
  or status == 'created' and created_key or nil
local pending = cancel_requested == '1' and WHEN_PENDING ~= 'allow'
if not source_key or pending then
  local barred = '|' .. (status or '') .. '|'
  local ended = string.find(TERMINAL, barred, 1, true)
  if not string.find(STATUSES, barred, 1, true) then
    return {'CORRUPT', 'status'}
  elseif ended and WHEN_TERMINAL == 'ignore' or pending and not ended and WHEN_PENDING == 'ignore' then
    return current and {'SAME'} or {'FLOW', call('HGETALL', flow_key)}
  elseif ended then
    return {'TERMINAL', status}
  elseif pending then
    return {'PENDING'}
  end
  if string.find(SOURCES, barred, 1, true) then
    return {'OTHER_KEYS'}
  end
  --- include: refuse.lua
  return seen_key and refuse(seen_key, op, {'ILLEGAL', status}) or {'ILLEGAL', status}
end
local rest = FIELDS_FROM
if n_unset then
  --- include: int64.lua
  if n_unset + n_increment > 0 and call('HEXISTS', flow_key, 's') == 1 then
    --- include: refuse.lua
    return seen_key and refuse(seen_key, op, {'NOT_MAPPING'}) or {'NOT_MAPPING'}
  end
  for i = rest + n_unset, rest + n_unset + 2 * n_increment - 1, 2 do
    local field, delta = unpack(ARGV, i, i + 1)
    if not sum_fits(call('HGET', flow_key, field) or '0', delta) then
      --- include: refuse.lua
      return seen_key and refuse(seen_key, op, {'NOT_INTEGER', field}) or {'NOT_INTEGER', field}
    end
  end
end
-- A script that fails midway keeps what it wrote before, so a key of the wrong type must fail here.
if due_key and (status == 'waiting' or TARGET == 'waiting') then
  call('ZCARD', due_key)
  call('ZCARD', waiters_key)
end

local now = call('TIME')
local updated_at = now[1] .. string.sub('00000' .. now[2], -6)

-- The first writes are their own checks: a key of the wrong type, or a stream at the greatest id there is, makes one
-- fail before it has written anything, and what was written before it is taken back.
local index_key = target_key or source_key
local moves = index_key ~= source_key
call('ZADD', index_key, updated_at, flow_id)
local removed = moves and redis.pcall('ZREM', source_key, flow_id)
local event_id = type(removed) == 'table' and removed
  or EVENT_MAXLEN and redis.pcall(
    'XADD', events_key, 'MAXLEN', '~', EVENT_MAXLEN, '*', 'rev', next_revision, 'kind', kind, 'op', op,
    'payload', payload
  )
  or redis.pcall('XADD', events_key, '*', 'rev', next_revision, 'kind', kind, 'op', op, 'payload', payload)
if type(event_id) == 'table' then
  if moves then
    call('ZREM', index_key, flow_id)
  end
  if removed == 1 or not moves then
    call('ZADD', source_key, changed_at, flow_id)
  end
  return event_id
end
if status == 'waiting' and TARGET then
  local waited_for = call('HGET', flow_key, 'waiter')
  call('HDEL', flow_key, 'wait', 'waiter')
  call('ZREM', due_key, flow_id)
  if waited_for then
    call('ZREM', waiters_key, waited_for .. flow_id)
  end
end
if merge == 'replace' then
  for _, field in ipairs(call('HKEYS', flow_key)) do
    if field == 's' or string.sub(field, 1, 2) == 's:' then
      call('HDEL', flow_key, field)
    end
  end
elseif merge == 'over' or merge == 'patch' and not current then
  call('HDEL', flow_key, 's')
end
if n_unset then
  for i = rest, rest + n_unset - 1 do
    call('HDEL', flow_key, (unpack(ARGV, i, i)))
  end
  rest = rest + n_unset
  for i = rest, rest + 2 * n_increment - 1, 2 do
    call('HINCRBY', flow_key, unpack(ARGV, i, i + 1))
  end
  rest = rest + 2 * n_increment
end
-- unpack() of some 8,000 values overflows Lua's stack.
while #ARGV - rest > 4000 do
  call('HSET', flow_key, unpack(ARGV, rest, rest + 3999))
  rest = rest + 4000
end
call(
  'HSET', flow_key, 'status', TARGET or status, 'revision', next_revision,
  'etag', #etag > 32 and op .. string.sub(etag, 33) or op, 'updated_at', updated_at,
  unpack(ARGV, rest)
)
if stamp_field then
  --- include: rfc3339.lua
  call('HSET', flow_key, stamp_field, stamp_head .. rfc3339(now[1], now[2]) .. stamp_tail)
end
local look_at = due_at
if wake == '1' and due_key and (TARGET or status) == 'waiting' then
  look_at = updated_at
end
if look_at and look_at ~= '' then
  call('ZADD', due_key, look_at, flow_id)
  if call('ZRANGE', due_key, 0, 0)[1] == flow_id then
    -- Engines sleep until what was first. Without permission for the channel they sleep their interval out.
    redis.pcall('PUBLISH', due_key, look_at)
  end
end
if waiter and waiter ~= '' then
  call('ZADD', waiters_key, 0, waiter .. flow_id)
end
if seen_key then
  --- include: remember.lua
  remember(seen_key, op, event_id)
end
if not current then
  return {'FLOW', call('HGETALL', flow_key), event_id, next_revision}
end
return WITH_EVENT and {'OK', updated_at, event_id} or updated_at
