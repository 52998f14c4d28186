#!lua flags=allow-oom
-- Pushes messages to an inbox.
-- KEYS inbox, its bell, and its epoch if it has one for as long as it lives
-- ARGV ttl, frame...
-- Gives 1, or 0 if the inbox is gone
if KEYS[3] and redis.call('EXISTS', KEYS[3]) == 0 then return 0 end
if redis.call('RPUSH', KEYS[1], unpack(ARGV, 2)) == #ARGV - 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
if redis.call('ZADD', KEYS[2], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[2], ARGV[1]) end
return 1
