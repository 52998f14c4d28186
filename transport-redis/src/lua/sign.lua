#!lua flags=allow-oom
-- A process shows that it lives. Allowed when memory is full, or what it holds would be taken from it.
-- KEYS its sign of life
-- ARGV what it says from now on, lease ms
-- Gives what it said before, if it was there
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return before
