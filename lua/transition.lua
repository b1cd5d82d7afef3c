-- Moves a flow along its lifecycle, or changes it in place, and appends the event that says so.
--
-- KEYS  1 flow  2 events  3 due  4 waiters
--       5-10 status sets: created running waiting finished failed cancelled
-- ARGV  1 op              id of this operation: becomes the flow's etag, stands in the event
--       2 span_ms         '' on the first attempt, else milliseconds since it
--       3 deep            '1' if the caller brought the op
--       4 flow_id
--       5 revision, 6 etag the flow must have; '' for any
--       7 held_etag       etag of the caller's copy, '' for none
--       8 kind            of the event
--       9 sources         statuses it may start from, each between spaces
--      10 target          status it leads to, '' for the same
--      11 terminal        the terminal statuses, each between spaces
--      12 when_pending    refuse | allow | ignore, where a cancel is pending
--      13 when_terminal   refuse | ignore
--      14 payload         of the event
--      15 merge           what becomes of the state: '' nothing | patch | replace
--      16 due_at          microseconds: when an engine must look at the new wait, '' for never
--      17 waiter          '<topic>\0<correlation_id>\0' of the new wait, '' for none
--      18 wake            '1' if an engine must look at a flow that stays waiting at once
--      19 stamp_field, 20 stamp_head, 21 stamp_tail   a field whose value is head .. time .. tail, '' for none
--      22 n_unset, 23 n_increment; then the fields to delete, field and delta pairs, field and value pairs
-- REPLY OK revision updated_at event_id          applied, and the caller's copy was current
--       FLOW fields event_id event_revision      applied, now or before: the whole hash
--       SAME | FLOW fields                       nothing to do
--       ABSENT | UNKNOWN | STALE revision | TERMINAL status | PENDING | ILLEGAL status
--       NOT_INTEGER field | NOT_MAPPING | CORRUPT field
local flow_key, events_key, due_key, waiters_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local status_keys = {
  created = KEYS[5], running = KEYS[6], waiting = KEYS[7],
  finished = KEYS[8], failed = KEYS[9], cancelled = KEYS[10],
}
local op, span_ms, deep, flow_id, expected_revision, expected_etag, held_etag = unpack(ARGV, 1, 7)
local kind, sources, target, terminal, when_pending, when_terminal, payload = unpack(ARGV, 8, 14)
local merge, due_at, waiter, wake, stamp_field, stamp_head, stamp_tail = unpack(ARGV, 15, 21)
local n_unset, n_increment = tonumber(ARGV[22]), tonumber(ARGV[23])
local increments_from = 24 + n_unset
local fields_from = increments_from + 2 * n_increment

--- include: look_back.lua
--- include: int64.lua
--- include: rfc3339.lua

local function listed(statuses, status)
  return string.find(statuses, ' ' .. status .. ' ', 1, true)
end

local stored = redis.call('HMGET', flow_key, 'status', 'revision', 'etag', 'cancel_requested', 'waiter')
local status, revision, etag, cancel_requested, old_waiter = unpack(stored, 1, 5)

local function unchanged()
  if etag == held_etag then
    return {'SAME'}
  end
  return {'FLOW', redis.call('HGETALL', flow_key)}
end

-- Guards, in the order docs/concepts.md gives; nothing is written before the last of them.
if not status and not revision then
  return {'ABSENT'}
end
local status_key = status and status_keys[status]
if not status_key then
  return {'CORRUPT', 'status'}
end
if not revision or not string.match(revision, '^%d+$') then
  return {'CORRUPT', 'revision'}
end
if etag == op or span_ms ~= '' or deep ~= '' then
  local verdict, entry = look_back(events_key, op, span_ms, deep ~= '' or etag == op)
  if verdict == 'FOUND' then
    return {'FLOW', redis.call('HGETALL', flow_key), entry[1], entry[2][2]}
  elseif etag == op then
    return {'FLOW', redis.call('HGETALL', flow_key), '', revision}
  elseif verdict == 'UNKNOWN' then
    return {'UNKNOWN'}
  end
end
if expected_revision ~= '' and revision ~= expected_revision or expected_etag ~= '' and etag ~= expected_etag then
  return {'STALE', revision}
end
if listed(terminal, status) then
  return when_terminal == 'ignore' and unchanged() or {'TERMINAL', status}
end
if cancel_requested == '1' and when_pending ~= 'allow' then
  return when_pending == 'ignore' and unchanged() or {'PENDING'}
end
if not listed(sources, status) then
  return {'ILLEGAL', status}
end
local whole_state = merge ~= '' and redis.call('HEXISTS', flow_key, 's') == 1
if n_increment > 0 then
  if whole_state then
    return {'NOT_MAPPING'}
  end
  for i = increments_from, fields_from - 1, 2 do
    local field, delta = unpack(ARGV, i, i + 1)
    if not sum_fits(redis.call('HGET', flow_key, field) or '0', delta) then
      return {'NOT_INTEGER', field}
    end
  end
end
-- A key of the wrong type must fail here: a script that fails midway keeps what it wrote before.
local target_key = target == '' and status_key or status_keys[target]
redis.call('XLEN', events_key)
redis.call('ZCARD', status_key)
if target_key ~= status_key then
  redis.call('ZCARD', target_key)
end
if status == 'waiting' or target == 'waiting' then
  redis.call('ZCARD', due_key)
  redis.call('ZCARD', waiters_key)
end

local now = redis.call('TIME')
local updated_at = now[1] .. string.format('%06d', now[2])
local new_revision = string.format('%.0f', revision + 1)
local new_status = target == '' and status or target

if status == 'waiting' and target ~= '' then
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
elseif whole_state then
  redis.call('HDEL', flow_key, 's')
end
for i = 24, increments_from - 1 do
  redis.call('HDEL', flow_key, (unpack(ARGV, i, i)))
end
for i = increments_from, fields_from - 1, 2 do
  redis.call('HINCRBY', flow_key, unpack(ARGV, i, i + 1))
end
-- unpack() of some 8,000 values overflows Lua's stack.
while #ARGV - fields_from > 4000 do
  redis.call('HSET', flow_key, unpack(ARGV, fields_from, fields_from + 3999))
  fields_from = fields_from + 4000
end
redis.call(
  'HSET', flow_key, 'status', new_status, 'revision', new_revision, 'etag', op, 'updated_at', updated_at,
  unpack(ARGV, fields_from)
)
if stamp_field ~= '' then
  redis.call('HSET', flow_key, stamp_field, stamp_head .. rfc3339(now[1], now[2]) .. stamp_tail)
end
if target_key ~= status_key then
  redis.call('ZREM', status_key, flow_id)
end
redis.call('ZADD', target_key, updated_at, flow_id)
if wake ~= '' and new_status == 'waiting' then
  redis.call('ZADD', due_key, updated_at, flow_id)
elseif due_at ~= '' then
  redis.call('ZADD', due_key, due_at, flow_id)
end
if waiter ~= '' then
  redis.call('ZADD', waiters_key, 0, waiter .. flow_id)
end
local event_id = redis.call('XADD', events_key, '*', 'rev', new_revision, 'kind', kind, 'op', op, 'payload', payload)

if etag == held_etag then
  return {'OK', new_revision, updated_at, event_id}
end
return {'FLOW', redis.call('HGETALL', flow_key), event_id, new_revision}
