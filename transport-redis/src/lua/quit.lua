#!lua flags=allow-oom
-- A session stops taking. From here on its claims are refused, so what is held now is all it will ever hold.
-- KEYS live, held, queue, returned, bell
-- ARGV session, ttl of the bell
-- Gives the tokens that it holds
redis.call('SREM', KEYS[1], ARGV[1])
if redis.call('EXISTS', KEYS[3], KEYS[4]) > 0 and redis.call('ZADD', KEYS[5], 0, '1') == 1 then
  redis.call('PEXPIRE', KEYS[5], ARGV[2])
end
return redis.call('HKEYS', KEYS[2])
