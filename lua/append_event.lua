-- Appends an audit entry; the flow itself does not change.
--
-- A prelude binds EVENT_MAXLEN: about how many entries the trail keeps, nil for all.
--
-- KEYS  1 flow  2 events
-- ARGV  1 op          id of this operation: stands in the event
--       2 conditions  '' or '<look>|<expected>|<owner>', see include/conditions.lua and docs/layout.md
--       3 kind  4 payload
-- REPLY OK event_id revision | ABSENT | UNKNOWN | OTHER_OP kind | STALE revision
local flow_key, events_key = KEYS[1], KEYS[2]
local op, conditions, kind, payload = unpack(ARGV, 1, 4)

--- include: audit_guard.lua

local revision, refusal, entry = audit_guard(flow_key, events_key, op, kind, conditions)
if entry then
  return {'OK', entry[1], entry[2][2]}
elseif refusal then
  return refusal
end
local event_id = EVENT_MAXLEN
  and redis.call(
    'XADD', events_key, 'MAXLEN', '~', EVENT_MAXLEN, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload
  )
  or redis.call('XADD', events_key, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload)
return {'OK', event_id, revision}
