-- Tells whether there is no flow under a key: nothing at all, or a tombstone, see include/tombstone.lua.
local function is_gone(flow_key)
  return redis.call('HEXISTS', flow_key, 'gone') == 1 or redis.call('EXISTS', flow_key) == 0
end
