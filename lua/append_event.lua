-- Appends an audit entry; the flow itself does not change.
--
-- KEYS  1 flow  2 events
-- ARGV  1 op              id of this operation: stands in the event
--       2 span_ms         '' on the first attempt, else milliseconds since it
--       3 deep            '1' if the caller brought the op
--       4 revision, 5 etag the flow must have; '' for any
--       6 kind  7 payload
-- REPLY OK event_id revision | ABSENT | UNKNOWN | STALE revision
local flow_key, events_key = KEYS[1], KEYS[2]
local op, span_ms, deep, expected_revision, expected_etag, kind, payload = unpack(ARGV, 1, 7)

--- include: look_back.lua
--- include: audit_guard.lua

local revision, refusal, entry =
  audit_guard(flow_key, events_key, op, span_ms, deep, expected_revision, expected_etag)
if entry then
  return {'OK', entry[1], entry[2][2]}
elseif refusal then
  return refusal
end
local event_id = redis.call('XADD', events_key, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload)
return {'OK', event_id, revision}
