-- Settles what became of attempts that were never answered.
--
-- It fences off those that may still arrive, and looks for those that were applied, a page of the trail at a time.
-- Doing it again does no harm.
--
-- KEYS  1 flow  2 events  3 seen   only where a caller brought one of the operations
-- ARGV  1 owner     whose flow it must be; '' for anybody's
--       2 carried   the fences that those attempts knew, each between bars; '*' if that is not known. If the flow's
--                   fence is one of them, they may still be applied: the flow gets the next fence
--       3 upper     where the page begins: '+' or '(<event id>'
--       4 count     how many entries to look at, at most
--       5 n_apart; then so many operation ids that the trail need not be searched for, then those that it is
-- REPLY fence, life, forgotten, extent, oldest, then an operation id and its event's id for each that was found
--       life    the number of the fence with which this life of the flow began, 0 for the first one and for one that
--               began longer ago than tombstones last; of a deleted flow that with which its life ended, negative
--       forgotten  of an attempt that knew a fence below this number nothing may tell whether it created an earlier
--               flow under this id
--       extent  'more' where older entries are left; else 'whole', or 'trimmed' where older entries were removed
--       oldest  the id of the last entry that was looked at; '' for none
local flow_key, events_key, seen_key = unpack(KEYS, 1, 3)
local owner, carried, upper, count, n_apart = unpack(ARGV, 1, 5)
local PIECE, MOST_BYTES = 100, 262144

local stored = redis.call(
  'HMGET', flow_key, 'status', 'etag', 'life', 'created_by', 'past', 'owner_session_key', 'created_at'
)
local status, etag, life, created_by, past, found_owner, created_at = unpack(stored, 1, 7)
if owner ~= '' and status and found_owner ~= owner then
  return {'', 0, 0, 'whole', ''} -- to this caller there is no such flow, and none of its attempts can be applied
end
etag = etag or ''
local fence = string.sub(etag, 34)
--- include: fence.lua
if carried == '*' or string.find(carried, '|' .. fence .. '|', 1, true) then
  --- include: is_gone.lua
  local newest = redis.call('XREVRANGE', events_key, '+', '-', 'COUNT', 1)[1]
  fence = fence_off(flow_key, etag, not status and is_gone(flow_key), newest and newest[1] or '0-0')
end

if status and (tonumber(created_at) or 0) / 1000000 < redis.call('TIME')[1] - TOMBSTONE_S then
  life = nil
end
local forgotten = 0
for number in string.gmatch(past or '', '%?(%d+)') do
  forgotten = math.max(forgotten, number)
end
local reply = {fence, (status and 1 or -1) * (life or 0), forgotten, 'whole', ''}
local function find(op, event_id)
  reply[#reply + 1], reply[#reply + 2] = op, event_id
end

local is_wanted, searches = {}, #ARGV > 5 + n_apart
for n = 6, #ARGV do
  local op = unpack(ARGV, n, n)
  local added_ms = seen_key and redis.call('ZSCORE', seen_key, op)
  if added_ms and string.sub(added_ms, 1, 1) ~= '-' then -- else it was refused
    find(op, added_ms)
  elseif created_by == op or past and string.find(past, op, 1, true) then
    find(op, '0-0')
  end
  is_wanted[op] = true
end
local looked_at, bytes, is_last = 0, 0, not searches
while not is_last and looked_at < tonumber(count) and bytes < MOST_BYTES do
  local page = redis.call('XREVRANGE', events_key, upper, '-', 'COUNT', PIECE)
  for _, entry in ipairs(page) do
    local op = entry[2][6]
    if is_wanted[op] then
      find(op, entry[1])
    end
    bytes = bytes + #(entry[2][8] or '')
    reply[5] = entry[1]
  end
  looked_at, upper, is_last = looked_at + #page, '(' .. reply[5], #page < PIECE
end
if not is_last then
  reply[4] = 'more'
elseif searches then
  --- include: is_whole.lua
  if status and not is_whole(events_key) then
    reply[4] = 'trimmed'
    if is_wanted[string.sub(etag, 1, 32)] then -- the flow's last change is known without its event
      find(string.sub(etag, 1, 32), '0-0')
    end
  end
end
return reply
