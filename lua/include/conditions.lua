-- What a call asks of the flow before anything else is looked at.

-- Splits '<look>|<expected>|<owner>'. Returns look and expected, and whether the flow is hidden from the caller: one
-- who is bound to an owner must not learn of another's that it exists. An owner may hold bars, so it comes last.
local function read_conditions(flow_key, conditions)
  local look, expected, owner = string.match(conditions, '^(.-)|(.-)|(.*)$')
  return look, expected, owner ~= '' and redis.call('HGET', flow_key, 'owner_session_key') ~= owner
end
