#!lua flags=allow-oom
-- Registers a session. An owner is refused while others are registered, and others while an owner is. Sessions whose
-- process is gone are not passed by: their work must be returned first, or their late completions would not be fenced.
-- KEYS sessions, live, owner, sign of life of its process
-- ARGV session, shared | exclusive, session that this one follows or '', owner that is fenced off or '', ttl of the registries,
--   lease ms, until when it may be registered, ms
-- Asked again by the same session, it changes nothing. An owner that is to be fenced off is to be reclaimed first, whether its
-- process lives or not; any other one is respected. What was too long on its way is refused: the session may be over.
-- Gives the fencing number (0 if shared), -1 if owned, -2 if late, or the sessions to reclaim before asking again
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(ARGV[7]) then return -2 end
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
    local fenced_off = other == owner and other == ARGV[4]
    if not fenced_off and redis.call('EXISTS', '{' .. string.match(other, '^[^.]*') .. '}:alive') == 1 then return -1 end
    over[#over + 1] = other
  end
end
if #over > 0 then return over end
-- A sign that was not there says so, until its process has renewed it.
if redis.call('PEXPIRE', KEYS[4], ARGV[6]) == 0 then redis.call('SET', KEYS[4], '0', 'PX', ARGV[6]) end
local number = 0
if again then
  number = tonumber(redis.call('HGET', KEYS[3], 'number')) or 0
elseif exclusive then
  number = redis.call('HINCRBY', KEYS[3], 'number', 1)
  redis.call('HSET', KEYS[3], 'session', ARGV[1])
  redis.call('PEXPIRE', KEYS[3], ARGV[5])
end
for index = 1, 2 do
  redis.call('SADD', KEYS[index], ARGV[1])
  redis.call('PEXPIRE', KEYS[index], ARGV[5])
end
return number
