-- Finds what an earlier attempt of this operation did, so that it is not done again.

-- Returns the event that the operation left; false if it was applied and its event has been trimmed; nil if it was not
-- applied. Returns nil and an error if the attempt is to be sent again in another form: the event that a search has
-- found is gone, because a failover has lost it or it has been trimmed since; or the operation was refused since the
-- attempt was sent. Of an id that the caller brought, the index of those tells.
local function replay(events_key, seen_key, op, attempt, refusal, etag)
  local found = string.match(attempt, '^=(.*)$')
  local seen = seen_key and redis.call('ZSCORE', seen_key, op)
  local was_refused = seen and string.sub(seen, 1, 1) == '-'
  local is_sure = seen and not was_refused or string.sub(etag, 1, 32) == op
  if not found then
    if not seen then
      return nil
    elseif was_refused then
      return nil, seen ~= refusal and redis.error_reply('REFUSED ' .. seen) or nil
    end
    found = seen
  end
  -- Without a sequence, as in the index, both ends together mean the whole millisecond.
  for _, entry in ipairs(redis.call('XRANGE', events_key, found, found)) do
    if entry[2][6] == op then
      return entry
    end
  end
  if is_sure then
    return false
  end
  return nil, redis.error_reply('UNSETTLED the event is gone')
end
