-- Guards of the operations that add to a flow's record and leave its revision alone.

-- Returns the flow's revision; or nil and a refusal; or nil, nil and the event that this very operation left before,
-- false where that event has been trimmed.
local function audit_guard(flow_key, events_key, seen_key, op, kind, conditions)
  local attempt, refusal, expected = '', '', ''
  if conditions ~= '' then
    --- include: conditions.lua
    local is_hidden
    attempt, refusal, expected, is_hidden = read_conditions(flow_key, conditions)
    if is_hidden then
      return nil, {'ABSENT'}
    end
  end
  local stored = redis.call('HMGET', flow_key, 'revision', 'etag', 'updated_at')
  local revision, etag, changed_at = unpack(stored, 1, 3)
  etag = etag or ''
  if not revision then
    --- include: is_gone.lua
    --- include: absent.lua
    return nil, is_gone(flow_key) and absent(flow_key, seen_key, etag) or {'CORRUPT', 'revision'}
  end
  local is_found = attempt ~= '' and string.sub(attempt, 1, 1) == '='
  if (attempt ~= '' or #etag > 32) and attempt ~= string.sub(etag, 34) and not is_found then
    return nil, redis.error_reply('FENCED ' .. string.sub(etag, 34))
  end
  if is_found or seen_key then
    --- include: replay.lua
    local entry, again = replay(events_key, seen_key, op, attempt, refusal, etag)
    if again then
      return nil, again
    elseif entry and entry[2][4] ~= kind then
      return nil, {'OTHER_OP', entry[2][4]}
    elseif entry ~= nil then
      return nil, nil, entry
    end
  end
  if expected ~= '' and expected ~= revision then
    if expected ~= revision .. ' ' .. string.sub(etag, 1, 32) .. ' ' .. (changed_at or '') then
      --- include: refuse.lua
      return nil, seen_key and refuse(seen_key, op, {'STALE', revision}) or {'STALE', revision}
    end
  end
  return revision
end
