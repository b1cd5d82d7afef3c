-- Guards of the operations that add to a flow's record and leave its revision alone.

-- Returns the flow's revision; or nil and a refusal; or nil, nil and the entry this very operation left before.
local function audit_guard(flow_key, events_key, op, kind, conditions)
  local look, expected = '', ''
  if conditions ~= '' then
    --- include: conditions.lua
    local hidden
    look, expected, hidden = read_conditions(flow_key, conditions)
    if hidden then
      return nil, {'ABSENT'}
    end
  end
  local stored = redis.call('HMGET', flow_key, 'revision', 'etag', 'updated_at')
  local revision, etag, changed_at = unpack(stored, 1, 3)
  if not revision then
    return nil, {redis.call('EXISTS', flow_key) == 0 and 'ABSENT' or 'CORRUPT', 'revision'}
  end
  if look ~= '' then
    --- include: look_back.lua
    local verdict, entry = look_back(events_key, op, look)
    if verdict == 'FOUND' and entry[2][4] ~= kind then
      return nil, {'OTHER_OP', entry[2][4]}
    elseif verdict == 'FOUND' then
      return nil, nil, entry
    elseif verdict == 'UNKNOWN' then
      return nil, {'UNKNOWN'}
    end
  end
  local version = (etag or '') .. ' ' .. (changed_at or '')
  if expected ~= '' and expected ~= revision and expected ~= revision .. ' ' .. version then
    return nil, {'STALE', revision}
  end
  return revision
end
