#!lua flags=allow-oom
-- Sees to it that what a session is registered in does not grow old.
-- KEYS sessions, live, holding, held, owner
-- ARGV session, ttl
-- Gives 1, or 0 if the session is no longer registered
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 0 then return 0 end
-- Those that look after the dead look there: a failover may have lost that it holds work, of all that it took.
if redis.call('EXISTS', KEYS[4]) == 1 then redis.call('SADD', KEYS[3], ARGV[1]) end
-- Where nobody owns the service the last one is the fencing number, which must not grow old while others serve.
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[2]) end
return 1
