#!lua flags=allow-oom
-- Who hears what is said to every server of a service. Those whose time is over are forgotten.
-- KEYS audience
-- Gives their inboxes
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
return redis.call('ZRANGE', KEYS[1], 0, -1)
