#!lua flags=allow-oom
-- Forgets replies that were read. The epoch fences it: sent late by a connection that was given up, it does nothing.
-- KEYS epoch, inbox
-- ARGV epoch, how many, ttl of the epoch, ttl of the inbox
-- Gives 1, or 0 if another epoch holds or the inbox is gone
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('LTRIM', KEYS[2], ARGV[2], -1)
redis.call('PEXPIRE', KEYS[2], ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
