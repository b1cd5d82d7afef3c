-- Tells whether a trail still has every event that was ever added to it.
local function is_whole(events_key)
  local facts = {}
  local info = redis.pcall('XINFO', 'STREAM', events_key) -- an error where there is no trail
  for i = 1, #info - 1, 2 do
    facts[info[i]] = info[i + 1]
  end
  return facts['entries-added'] ~= nil and facts['entries-added'] == facts['length']
end
