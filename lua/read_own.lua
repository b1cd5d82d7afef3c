-- Reads a key of a flow for a caller who is bound to an owner: another's flow is answered as one that does not exist.
--
-- KEYS  1 flow  2 wanted   the key that is read; it may be the flow
-- ARGV  1 owner
--       2 name    of the command: HMGET, or one that is answered a list; then its arguments behind the key
-- REPLY the command's
local flow_key, wanted_key = KEYS[1], KEYS[2]
local owner, name = unpack(ARGV, 1, 2)

if redis.call('HGET', flow_key, 'owner_session_key') == owner then
  return redis.call(name, wanted_key, unpack(ARGV, 3))
end
local nothing = {}
if name == 'HMGET' then
  for i = 1, #ARGV - 2 do
    nothing[i] = false
  end
end
return nothing
