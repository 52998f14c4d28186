#!lua flags=allow-oom
-- Gives back one request: to the head of the queue if it was never started, else to the returned work.
-- KEYS held, queue, returned, bell
-- ARGV token, attempt that it had been given back for (1 = fresh), ttl
-- Gives 1, or 0 if it is no longer held
local frame = redis.call('HGET', KEYS[1], ARGV[1])
if not frame then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
local list = KEYS[2]
if ARGV[2] == '1' then
  redis.call('LPUSH', list, frame)
else
  list = KEYS[3]
  redis.call('RPUSH', list, ARGV[2], frame)
end
redis.call('PEXPIRE', list, ARGV[3], 'NX')
redis.call('PEXPIRE', list, ARGV[3], 'GT')
if redis.call('ZADD', KEYS[4], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[4], ARGV[3]) end
return 1
