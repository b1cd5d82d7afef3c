-- Answers a caller whose flow does not exist.
--
-- If it brought the operation's id, an attempt of an earlier call may still be on its way, and must not be applied to a
-- flow that is created later under the id: that will have another fence.
local function absent(flow_key, seen_key, etag)
  if seen_key then
    --- include: fence.lua
    fence_off(flow_key, etag, true, '0-0')
  end
  return {'ABSENT'}
end
