-- Appends an audit entry; the flow itself does not change.
--
-- A prelude binds EVENT_MAXLEN: about how many entries the trail keeps, nil for all.
--
-- KEYS  1 flow  2 events  3 seen   only where the caller brought the op
-- ARGV  1 op          id of this operation: stands in the event
--       2 conditions  '' or '<attempt>|<refusal>|<expected>|<owner>', see include/conditions.lua and docs/layout.md
--       3 kind  4 payload
-- REPLY OK event_id revision | ABSENT | UNKNOWN (applied, and its event trimmed) | OTHER_OP kind | STALE revision
--       error FENCED fence | error REFUSED note | error UNSETTLED
local flow_key, events_key, seen_key = KEYS[1], KEYS[2], KEYS[3]
local op, conditions, kind, payload = unpack(ARGV, 1, 4)

--- include: audit_guard.lua

local revision, refusal, entry = audit_guard(flow_key, events_key, seen_key, op, kind, conditions)
if refusal then
  return refusal
elseif entry then
  return {'OK', entry[1], entry[2][2]}
elseif entry == false then
  return {'UNKNOWN'}
end
local event_id = EVENT_MAXLEN
  and redis.call(
    'XADD', events_key, 'MAXLEN', '~', EVENT_MAXLEN, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload
  )
  or redis.call('XADD', events_key, '*', 'rev', revision, 'kind', kind, 'op', op, 'payload', payload)
if seen_key then
  --- include: remember.lua
  remember(seen_key, op, event_id)
end
return {'OK', event_id, revision}
