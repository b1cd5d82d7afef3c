-- Compares what is kept beside a flow, its index entries and its trail, with the flow, and mends it where told to.
--
-- A prelude binds MEND: whether to mend, or just to look.
--
-- Running it again does no harm: it decides by what it finds.
--
-- KEYS  1 flow; then any of the sets of its owner, of statuses, due and waiters, and its events, steps and seen
-- ARGV  1 flow_id
--       2 wait        the stored wait that due_at was read from, '' for none
--       3 due_at      microseconds: when an engine must look at that wait, '' for never
--                     then, for each key behind the flow's, its kind and what it is for: an owner, a status,
--                     '<topic>\0<correlation_id>\0', or ''
-- REPLY for each of those keys with something wrong: its number, what is there, what should be; '' for nothing
local flow_key = KEYS[1]
local kept_keys = {unpack(KEYS, 2)}
local flow_id, wait, due_at = unpack(ARGV, 1, 3)

--- include: is_gone.lua
local exists = not is_gone(flow_key)
local stored = redis.call(
  'HMGET', flow_key, 'status', 'updated_at', 'created_at', 'owner_session_key', 'wait', 'waiter', 'cancel_requested'
)
local status, updated_at, created_at, owner, found_wait, waiter, cancel_requested = unpack(stored, 1, 7)
if exists and not (status and updated_at and created_at) then
  return {} -- damaged: nothing tells what should be
end
local is_waiting = status == 'waiting'

-- What should be under each kind of key: a score, or whatever is there; false for nothing.
local right_for = {
  status = function(name)
    return name == status and updated_at
  end,
  owner = function(name)
    return name == owner and created_at
  end,
  waiters = function(name)
    return is_waiting and name == waiter and '0'
  end,
  due = function(_, found)
    if is_waiting and cancel_requested == '1' then
      return updated_at
    elseif (found_wait or '') ~= wait then
      return found -- the change that brought another wait has just made its entry
    end
    return is_waiting and due_at ~= '' and due_at
  end,
  events = function()
    return exists and '1'
  end,
  steps = function(_, found)
    return exists and found
  end,
  seen = function(_, found)
    return exists and found
  end,
}
local wrong, mends = {}, {}
for n, key in ipairs(kept_keys) do
  local kind, name = unpack(ARGV, 2 + 2 * n, 3 + 2 * n)
  local is_set = kind ~= 'events' and kind ~= 'steps' and kind ~= 'seen'
  local member = kind == 'waiters' and name .. flow_id or flow_id
  local found = is_set and redis.call('ZSCORE', key, member)
    or not is_set and redis.call('EXISTS', key) == 1 and '1'
  local right = right_for[kind](name, found)
  -- As numbers: beyond 2^53 a score is the nearest double.
  if found ~= right and not (found and right and tonumber(found) == tonumber(right)) then
    wrong[#wrong + 1] = {n, found or '', right or ''}
    if is_set then
      mends[#mends + 1] = right and {'ZADD', key, right, member} or {'ZREM', key, member}
    elseif found then
      mends[#mends + 1] = {'UNLINK', key}
    end
  end
end
if MEND then
  for _, mend in ipairs(mends) do
    redis.call(unpack(mend))
  end
end
return wrong
