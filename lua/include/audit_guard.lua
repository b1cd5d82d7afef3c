-- Guards of the operations that add to a flow's record and leave its revision alone.

-- Returns the flow's revision, or nil and either a refusal or the entry this very operation left before.
local function audit_guard(flow_key, events_key, op, span_ms, deep, expected_revision, expected_etag)
  local revision, etag = unpack(redis.call('HMGET', flow_key, 'revision', 'etag'), 1, 2)
  if not revision then
    return nil, {'ABSENT'}
  end
  if span_ms ~= '' or deep ~= '' then
    local verdict, entry = look_back(events_key, op, span_ms, deep ~= '')
    if verdict == 'FOUND' then
      return nil, nil, entry
    elseif verdict == 'UNKNOWN' then
      return nil, {'UNKNOWN'}
    end
  end
  if expected_revision ~= '' and revision ~= expected_revision or expected_etag ~= '' and etag ~= expected_etag then
    return nil, {'STALE', revision}
  end
  return revision
end
