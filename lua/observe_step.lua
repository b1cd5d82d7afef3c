-- Records what was seen of a step, and appends the event; the flow itself does not change.
--
-- A step is a msgpack array that begins with fields of fixed length, so that the script can keep the parts
-- of an old one without decoding it: array header (1 byte), id (bin of 16: 18 bytes), created_at (text of 16
-- digits: 17 bytes), updated_at (17 bytes), child_session_key (nil or text), then the rest as it came.
--
-- KEYS  1 flow  2 events  3 steps
-- ARGV  1 op          id of this operation: stands in the event
--       2 look        whether to look for the op first, see look_back
--       3 expected    '<revision>' or '<revision> <etag>' the flow must have, '' for any
--       4 run_id
--       5 head        array header and id, for a step that is new
--       6 child       child_session_key, packed
--       7 tail        the other fields, packed
--       8 kind  9 payload
-- REPLY OK step | ABSENT | UNKNOWN | STALE revision | CORRUPT field
local flow_key, events_key, steps_key = KEYS[1], KEYS[2], KEYS[3]
local op, look, expected, run_id, head, child, tail, kind, payload = unpack(ARGV, 1, 9)

--- include: audit_guard.lua

local NIL = '\192'
local HEAD_END, TIME_LENGTH = 19, 17
local CHILD_FROM = HEAD_END + 2 * TIME_LENGTH + 1

-- The packed nil or text that begins at `from`: fixstr, str 8 or str 16, as the msgpack specification has them.
local function packed_text(bytes, from)
  local first, second, third = string.byte(bytes, from, from + 2)
  local length = 1
  if first == 217 then
    length = 2 + second
  elseif first == 218 then
    length = 3 + second * 256 + third
  elseif first ~= 192 then
    length = 1 + first - 160
  end
  return string.sub(bytes, from, from + length - 1)
end

local revision, refusal, entry = audit_guard(flow_key, events_key, op, look, expected)
if refusal then
  return refusal
end
local old = redis.call('HGET', steps_key, run_id)
if entry then
  return old and {'OK', old} or {'ABSENT'}
end
if old and #old < CHILD_FROM then
  return {'CORRUPT', 'step ' .. run_id}
end
-- A key of the wrong type must fail here: a script that fails midway keeps what it wrote before.
redis.call('XLEN', events_key)

local now = redis.call('TIME')
local observed_at = string.char(160 + TIME_LENGTH - 1) .. now[1] .. string.format('%06d', now[2])
local created_at = observed_at
if old then
  head = string.sub(old, 1, HEAD_END)
  created_at = string.sub(old, HEAD_END + 1, HEAD_END + TIME_LENGTH)
  if child == NIL then
    child = packed_text(old, CHILD_FROM)
  end
end
local step = head .. created_at .. observed_at .. child .. tail
redis.call('HSET', steps_key, run_id, step)
redis.call('XADD', events_key, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload)
return {'OK', step}
