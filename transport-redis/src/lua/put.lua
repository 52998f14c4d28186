#!lua flags=allow-oom
-- Stores a reply's body when memory is full: finishing work is what frees it.
-- KEYS body
-- ARGV body, ttl
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
