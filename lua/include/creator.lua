-- Returns the operation that created a flow, by its trail's first event; nil if the trail is not whole.
local function creator(events_key)
  --- include: is_whole.lua
  local first = is_whole(events_key) and redis.call('XRANGE', events_key, '-', '+', 'COUNT', 1)[1]
  return first and first[2][6] or nil
end
