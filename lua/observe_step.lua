-- Records what was seen of a step, and appends the event; the flow itself does not change.
--
-- A step is a msgpack array that begins with fields of fixed length, so that the script can keep the parts
-- of an old one without decoding it: array header (1 byte), id (bin of 16: 18 bytes), created_at (text of 16
-- digits: 17 bytes), updated_at (17 bytes), child_session_key (nil or text), then the rest as it came.
--
-- A prelude binds EVENT_MAXLEN: about how many entries the trail keeps, nil for all.
--
-- KEYS  1 flow  2 events  3 steps  4 seen   only where the caller brought the op
-- ARGV  1 op          id of this operation: stands in the event
--       2 conditions  '' or '<attempt>|<refusal>|<expected>|<owner>', see include/conditions.lua and docs/layout.md
--       3 run_id
--       4 head        array header and id, for a step that is new
--       5 child       child_session_key, packed
--       6 tail        the other fields, packed
--       7 kind  8 payload
-- REPLY OK step | ABSENT | OTHER_OP kind | STALE revision | CORRUPT field
--       error FENCED fence | error REFUSED note | error UNSETTLED
local flow_key, events_key, steps_key, seen_key = unpack(KEYS, 1, 4)
local op, conditions, run_id, head, child, tail, kind, payload = unpack(ARGV, 1, 8)

--- include: audit_guard.lua

local NIL = '\192'
local HEAD_END, TIME_LENGTH = 19, 17
local CHILD_FROM = HEAD_END + 2 * TIME_LENGTH + 1

-- The packed nil or text that begins at `from`: fixstr, str 8 or str 16, as the msgpack specification has them;
-- nil if there is none.
local function packed_text(bytes, from)
  local first, second, third = string.byte(bytes, from, from + 2)
  local length
  if first == 192 then
    length = 1
  elseif first == 217 and second then
    length = 2 + second
  elseif first == 218 and third then
    length = 3 + second * 256 + third
  elseif first and first >= 160 and first <= 191 then
    length = 1 + first - 160
  end
  return length and #bytes > from + length - 1 and string.sub(bytes, from, from + length - 1) or nil
end

local revision, refusal, entry = audit_guard(flow_key, events_key, seen_key, op, kind, conditions)
if refusal then
  return refusal
end
local old = redis.call('HGET', steps_key, run_id)
if entry ~= nil then
  return old and {'OK', old} or {'ABSENT'}
end
local old_child = old and packed_text(old, CHILD_FROM)
if old and not (old_child and string.sub(old, 1, 3) == string.sub(head, 1, 3)
    and string.find(string.sub(old, HEAD_END + 1, CHILD_FROM - 1), '^\176%d+\176%d+$')) then
  return {'CORRUPT', 'step ' .. run_id}
end

local now = redis.call('TIME')
local observed_at = string.char(160 + TIME_LENGTH - 1) .. now[1] .. string.format('%06d', now[2])
local created_at = observed_at
if old then
  head = string.sub(old, 1, HEAD_END)
  created_at = string.sub(old, HEAD_END + 1, HEAD_END + TIME_LENGTH)
  if child == NIL then
    child = old_child
  end
end
local step = head .. created_at .. observed_at .. child .. tail
-- The event first: a script that fails midway keeps what it wrote before, and nothing behind this can fail.
local event_id = EVENT_MAXLEN
  and redis.call(
    'XADD', events_key, 'MAXLEN', '~', EVENT_MAXLEN, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload
  )
  or redis.call('XADD', events_key, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload)
redis.call('HSET', steps_key, run_id, step)
if seen_key then
  --- include: remember.lua
  remember(seen_key, op, event_id)
end
return {'OK', step}
