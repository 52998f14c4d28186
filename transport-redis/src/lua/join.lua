#!lua flags=allow-oom
-- Registers a session. An owner is refused while others are registered, and others while an owner is. Sessions whose
-- process is gone are not passed by: their work must be returned first, or their late completions would not be fenced.
-- KEYS sessions, live, owner, sign of life of its process
-- ARGV session, shared | exclusive | take-over, session that this one follows or '', ttl of the registries, lease ms
-- Asked again by the same session, it changes nothing. One that takes over is an owner, and so that the present one is fenced
-- off it has that one reclaimed, whether its process lives or not.
-- Gives the fencing number (0 if shared), -1 if owned, or the sessions to reclaim before asking again
local exclusive = ARGV[2] ~= 'shared'
local owner = redis.call('HGET', KEYS[3], 'session')
if owner and redis.call('SISMEMBER', KEYS[1], owner) == 0 then owner = false end
local again = owner and owner == ARGV[1]
local follows = again or (owner and owner == ARGV[3])
local others = {}
if not follows then
  if owner then
    others = {owner}
  elseif exclusive then
    others = redis.call('SMEMBERS', KEYS[1])
  end
end
local over = {}
for _, other in ipairs(others) do
  if other ~= ARGV[1] then
    local fenced_off = ARGV[2] == 'take-over' and other == owner
    if not fenced_off and redis.call('EXISTS', '{' .. string.match(other, '^[^.]*') .. '}:alive') == 1 then return -1 end
    over[#over + 1] = other
  end
end
if #over > 0 then return over end
-- A sign that was not there says so, until its process has renewed it.
if redis.call('PEXPIRE', KEYS[4], ARGV[5]) == 0 then redis.call('SET', KEYS[4], '0', 'PX', ARGV[5]) end
local number = 0
if again then
  number = tonumber(redis.call('HGET', KEYS[3], 'number')) or 0
elseif exclusive then
  number = redis.call('HINCRBY', KEYS[3], 'number', 1)
  redis.call('HSET', KEYS[3], 'session', ARGV[1])
  redis.call('PEXPIRE', KEYS[3], ARGV[4])
end
for index = 1, 2 do
  redis.call('SADD', KEYS[index], ARGV[1])
  redis.call('PEXPIRE', KEYS[index], ARGV[4])
end
return number
