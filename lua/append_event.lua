-- Appends an audit entry; the flow itself does not change.
--
-- KEYS  1 flow  2 events
-- ARGV  1 op          id of this operation: stands in the event
--       2 look        whether to look for the op first, see look_back
--       3 expected    '<revision>' or '<revision> <etag>' the flow must have, '' for any
--       4 kind  5 payload
-- REPLY OK event_id revision | ABSENT | UNKNOWN | STALE revision
local flow_key, events_key = KEYS[1], KEYS[2]
local op, look, expected, kind, payload = unpack(ARGV, 1, 5)

--- include: audit_guard.lua

local revision, refusal, entry = audit_guard(flow_key, events_key, op, look, expected)
if entry then
  return {'OK', entry[1], entry[2][2]}
elseif refusal then
  return refusal
end
local event_id = redis.call('XADD', events_key, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload)
return {'OK', event_id, revision}
