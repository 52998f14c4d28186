#!lua flags=allow-oom
-- Registers a session. An owner is refused while others are registered, and others while an owner is. Sessions whose
-- lease is over are not passed by: their work must be returned first, or their late completions would not be fenced.
-- KEYS sessions, live, owner
-- ARGV session, shared | exclusive, lease ms, session that this one follows or '', ttl of the registries
-- Asked again by the same session, it changes nothing but the lease.
-- Gives the fencing number (0 if shared), -1 if owned, or the sessions to reclaim before asking again
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local owner = redis.call('HGET', KEYS[3], 'session')
if owner and not redis.call('ZSCORE', KEYS[1], owner) then owner = false end
local again = owner and owner == ARGV[1]
local follows = again or (owner and owner == ARGV[4])
local others = {}
if not follows then
  if owner then
    others = {owner, redis.call('ZSCORE', KEYS[1], owner)}
  elseif ARGV[2] == 'exclusive' then
    others = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
  end
end
local over = {}
for index = 1, #others, 2 do
  if others[index] ~= ARGV[1] then
    if tonumber(others[index + 1]) > now then return -1 end
    over[#over + 1] = others[index]
  end
end
if #over > 0 then return over end
local number = 0
if again then
  number = tonumber(redis.call('HGET', KEYS[3], 'number')) or 0
elseif ARGV[2] == 'exclusive' then
  number = redis.call('HINCRBY', KEYS[3], 'number', 1)
  redis.call('HSET', KEYS[3], 'session', ARGV[1])
  redis.call('PEXPIRE', KEYS[3], ARGV[5])
end
for index = 1, 2 do
  redis.call('ZADD', KEYS[index], now + tonumber(ARGV[3]), ARGV[1])
  redis.call('PEXPIRE', KEYS[index], ARGV[5])
end
return number
