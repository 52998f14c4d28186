#!lua flags=allow-oom
-- Pushes messages to an inbox.
-- KEYS inbox, its bell
-- ARGV ttl, frame...
if redis.call('RPUSH', KEYS[1], unpack(ARGV, 2)) == #ARGV - 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
if redis.call('ZADD', KEYS[2], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[2], ARGV[1]) end
return 1
