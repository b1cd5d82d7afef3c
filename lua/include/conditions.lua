-- What an attempt says of itself and asks of the flow, before anything else is looked at.
--
-- `conditions` is '' in the ordinary call, else '<attempt>|<refusal>|<expected>|<owner>':
--   attempt    the flow's fence as the caller knows it: '' where it knows of none. Or '=<event id>': a search has found
--              that an earlier attempt was applied, and left that event
--   refusal    where the caller brought the operation's id: what the index of those ids notes of its last refusal
--   expected   what the flow must be: '<revision>' or '<revision> <etag> <updated_at>'; '' for anything
--   owner      whose flow it must be; '' for anybody's. An owner may hold bars, so it comes last

-- Returns the first three, and whether the flow is hidden from the caller: one that is bound to an owner must not learn
-- that another owner's flow exists.
local function read_conditions(flow_key, conditions)
  local attempt, refusal, expected, owner = string.match(conditions, '^(.-)|(.-)|(.-)|(.*)$')
  local is_hidden = owner ~= '' and redis.call('HGET', flow_key, 'owner_session_key') ~= owner
  return attempt, refusal, expected, is_hidden
end
