#!lua flags=allow-oom
-- An inbox is, or stays, among those that hear what is said to every server of a service.
-- KEYS audience, sign of life of its process
-- ARGV inbox, for how long, ms, lease ms
-- A sign that was not there says so, until its process has renewed it.
-- Gives 1
local time = redis.call('TIME')
redis.call('ZADD', KEYS[1], time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2]), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2], 'NX')
redis.call('PEXPIRE', KEYS[1], ARGV[2], 'GT')
if redis.call('PEXPIRE', KEYS[2], ARGV[3]) == 0 then redis.call('SET', KEYS[2], '0', 'PX', ARGV[3]) end
return 1
