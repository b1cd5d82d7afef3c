-- Finds the event an operation left behind, so that a resend does not apply it again.
--
-- Event ids are the server's times, so a resend that says how long ago its first attempt was says how far
-- back to look; a minute more covers a clock that was stepped in between. An operation id that the caller
-- brought may be of any age, so it is looked for as far back as the bound goes.
--
-- `look` is what every changing script gets of this: '' for a first attempt, milliseconds since it for a
-- resend, 'deep' before either for an operation id that the caller brought.
local LOOK_AT_LEAST, LOOK_AT_MOST, LOOK_PAGE, CLOCK_STEP_MS = 100, 10000, 100, 60000

local function entry_ms(entry)
  return tonumber(string.match(entry[1], '^%d+'))
end

-- Returns 'FOUND' and the entry, 'ABSENT', or 'UNKNOWN' where the trail does not reach back far enough.
local function look_back(events_key, op, look)
  local deep, span_ms = string.find(look, 'deep', 1, true), tonumber(string.match(look, '%d+'))
  local now = redis.call('TIME')
  local since_ms = now[1] * 1000 + math.floor(now[2] / 1000) - CLOCK_STEP_MS - (span_ms or 0)
  local read, upper, oldest, page = 0, '+'
  repeat
    page = redis.call('XREVRANGE', events_key, upper, '-', 'COUNT', LOOK_PAGE)
    for _, entry in ipairs(page) do
      if entry[2][6] == op then
        return 'FOUND', entry
      end
      oldest = entry
    end
    read = read + #page
    if not deep and oldest and read >= LOOK_AT_LEAST and entry_ms(oldest) < since_ms then
      return 'ABSENT'
    end
    upper = oldest and '(' .. oldest[1]
  until #page < LOOK_PAGE or read >= LOOK_AT_MOST
  -- A first attempt has nothing to be unsure of: the bound is all that was promised for a brought id.
  if not span_ms then
    return 'ABSENT'
  end
  -- Every trail begins with the creation: one that does not has lost entries, perhaps the one looked for.
  local whole = oldest and oldest[2][2] == '0' and oldest[2][4] == 'created'
  return (whole or oldest and entry_ms(oldest) < since_ms) and 'ABSENT' or 'UNKNOWN'
end
