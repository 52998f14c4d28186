#!lua flags=allow-oom
-- Becomes the reader of an inbox. Allowed when memory is full, or a client whose connection broke would never get what is
-- there.
-- KEYS epoch, inbox
-- ARGV epoch, ttl of the epoch, ttl of the inbox
-- Gives 1 if there was a reader before, so that nothing is missing, else 0
local before = redis.call('EXISTS', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return before
