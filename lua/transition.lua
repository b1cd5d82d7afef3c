-- Moves a flow along its lifecycle, or changes it in place, and appends the event that says so.
--
-- Each verb has a script of its own: these lines behind a prelude that redisflow/scripts.py writes from the
-- verb's row of the transition table. The prelude binds
--   TARGET            status it leads to; nil for the same
--   WHEN_PENDING      refuse | allow | ignore, where a cancel is pending
--   WHEN_TERMINAL     refuse | ignore
--   STATUSES          all statuses, and TERMINAL the terminal ones, each between spaces
--   WITH_EVENT        whether the caller wants the event's id
--   source_keys       the sets of the statuses it may start from, by status
--   target_key        the set of the status it leads to; nil for the same
--   due_key, waiters_key   nil where the verb neither enters nor leaves a wait
-- and those of these arguments that the verb takes, nil for the others:
--   merge             what becomes of the state: '' nothing | patch | replace
--   due_at            microseconds: when an engine must look at the new wait, '' for never
--   waiter            '<topic>\0<correlation_id>\0' of the new wait, '' for none
--   wake              '1' if an engine must look at once at a flow that stays waiting
--   stamp_field, stamp_head, stamp_tail   a field whose value is head .. time .. tail
--   n_unset, n_increment   how many fields to delete, and field and delta pairs, come first in the rest
--
-- KEYS  1 flow  2 events, then the prelude's
-- ARGV  1 op          id of this operation: becomes the flow's etag, stands in the event
--       2 look        whether to look for the op first, see look_back
--       3 flow_id
--       4 expected    '<revision>' or '<revision> <etag>' the flow must have, '' for any
--       5 held_etag   etag of the caller's copy, '' for none
--       6 kind  7 payload of the event
--       then the prelude's, then field and value pairs from FIELDS_FROM on
-- REPLY updated_at, or OK updated_at event_id   applied, and the caller's copy was current
--       FLOW fields event_id event_revision    applied, now or before: the whole hash
--       SAME | FLOW fields                     nothing to do
--       ABSENT | UNKNOWN | STALE revision | TERMINAL status | PENDING | ILLEGAL status
--       NOT_INTEGER field | NOT_MAPPING | CORRUPT field
local flow_key, events_key = KEYS[1], KEYS[2]
local op, look, flow_id, expected, held_etag, kind, payload = unpack(ARGV, 1, 7)

local stored = redis.call('HMGET', flow_key, 'status', 'revision', 'etag', 'cancel_requested', 'waiter', 's')
local status, revision, etag, cancel_requested, old_waiter, whole_state = unpack(stored, 1, 6)

-- Guards, in the order docs/concepts.md gives; nothing is written before the last of them.
if not status and not revision then
  return {'ABSENT'}
end
if not status or not string.find(STATUSES, ' ' .. status .. ' ', 1, true) then
  return {'CORRUPT', 'status'}
end
if not revision or not string.match(revision, '^%d+$') then
  return {'CORRUPT', 'revision'}
end
if etag == op or look ~= '' then
  --- include: look_back.lua
  local verdict, entry = look_back(events_key, op, etag == op and 'deep' or look)
  if verdict == 'FOUND' then
    return {'FLOW', redis.call('HGETALL', flow_key), entry[1], entry[2][2]}
  elseif etag == op then
    return {'FLOW', redis.call('HGETALL', flow_key), '', revision}
  elseif verdict == 'UNKNOWN' then
    return {'UNKNOWN'}
  end
end
if expected ~= '' and expected ~= revision and expected ~= revision .. ' ' .. (etag or '') then
  return {'STALE', revision}
end
local source_key = source_keys[status]
local refused = cancel_requested == '1' and WHEN_PENDING ~= 'allow'
if not source_key or refused then
  local ended = string.find(TERMINAL, ' ' .. status .. ' ', 1, true)
  if ended and WHEN_TERMINAL == 'ignore' or refused and not ended and WHEN_PENDING == 'ignore' then
    return etag == held_etag and {'SAME'} or {'FLOW', redis.call('HGETALL', flow_key)}
  elseif ended then
    return {'TERMINAL', status}
  end
  return refused and {'PENDING'} or {'ILLEGAL', status}
end
if n_increment and n_increment ~= '0' then
  --- include: int64.lua
  if whole_state then
    return {'NOT_MAPPING'}
  end
  for i = FIELDS_FROM + n_unset, FIELDS_FROM + n_unset + 2 * n_increment - 1, 2 do
    local field, delta = unpack(ARGV, i, i + 1)
    if not sum_fits(redis.call('HGET', flow_key, field) or '0', delta) then
      return {'NOT_INTEGER', field}
    end
  end
end
-- A script that fails midway keeps what it wrote before, so a key of the wrong type must fail here. The set that
-- is written first needs no check: its own failure is the first.
redis.call('XLEN', events_key)
if target_key and target_key ~= source_key then
  redis.call('ZCARD', source_key)
end
if due_key and (status == 'waiting' or TARGET == 'waiting') then
  redis.call('ZCARD', due_key)
  redis.call('ZCARD', waiters_key)
end

local now = redis.call('TIME')
local updated_at = now[1] .. string.format('%06d', now[2])
local new_revision = string.format('%d', revision + 1)
local new_status = TARGET or status

redis.call('ZADD', target_key or source_key, updated_at, flow_id)
if target_key and target_key ~= source_key then
  redis.call('ZREM', source_key, flow_id)
end
if status == 'waiting' and TARGET then
  redis.call('HDEL', flow_key, 'wait', 'waiter')
  redis.call('ZREM', due_key, flow_id)
  if old_waiter then
    redis.call('ZREM', waiters_key, old_waiter .. flow_id)
  end
end
if merge == 'replace' then
  for _, field in ipairs(redis.call('HKEYS', flow_key)) do
    if field == 's' or string.sub(field, 1, 2) == 's:' then
      redis.call('HDEL', flow_key, field)
    end
  end
elseif merge == 'patch' and whole_state then
  redis.call('HDEL', flow_key, 's')
end
local first = FIELDS_FROM
if n_unset then
  for i = first, first + n_unset - 1 do
    redis.call('HDEL', flow_key, (unpack(ARGV, i, i)))
  end
  first = first + n_unset
  for i = first, first + 2 * n_increment - 1, 2 do
    redis.call('HINCRBY', flow_key, unpack(ARGV, i, i + 1))
  end
  first = first + 2 * n_increment
end
-- unpack() of some 8,000 values overflows Lua's stack.
while #ARGV - first > 4000 do
  redis.call('HSET', flow_key, unpack(ARGV, first, first + 3999))
  first = first + 4000
end
redis.call(
  'HSET', flow_key, 'status', new_status, 'revision', new_revision, 'etag', op, 'updated_at', updated_at,
  unpack(ARGV, first)
)
if stamp_field then
  --- include: rfc3339.lua
  redis.call('HSET', flow_key, stamp_field, stamp_head .. rfc3339(now[1], now[2]) .. stamp_tail)
end
if wake == '1' and new_status == 'waiting' then
  redis.call('ZADD', due_key, updated_at, flow_id)
elseif due_at and due_at ~= '' then
  redis.call('ZADD', due_key, due_at, flow_id)
end
if waiter and waiter ~= '' then
  redis.call('ZADD', waiters_key, 0, waiter .. flow_id)
end
local event_id = redis.call('XADD', events_key, '*', 'rev', new_revision, 'kind', kind, 'op', op, 'payload', payload)

if etag ~= held_etag then
  return {'FLOW', redis.call('HGETALL', flow_key), event_id, new_revision}
end
return WITH_EVENT and {'OK', updated_at, event_id} or updated_at
