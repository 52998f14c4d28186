#!lua flags=allow-oom
-- Renews a session's lease.
-- KEYS sessions, live, held, owner
-- ARGV session, lease ms, ttl
-- Gives 1, or 0 if the session is no longer registered
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
local time = redis.call('TIME')
local lease = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2])
for index = 1, 2 do
  redis.call('ZADD', KEYS[index], 'XX', lease, ARGV[1])
  redis.call('PEXPIRE', KEYS[index], ARGV[3])
end
redis.call('PEXPIRE', KEYS[3], ARGV[3])
-- Where nobody owns the service it is the fencing number of the last one, which must not grow old while others serve.
redis.call('PEXPIRE', KEYS[4], ARGV[3])
return 1
