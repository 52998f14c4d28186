#!lua flags=allow-oom
-- Rings a bell. Allowed when memory is full, so that what is queued is taken.
-- KEYS bell
-- ARGV ttl
-- Gives 1
if redis.call('ZADD', KEYS[1], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return 1
