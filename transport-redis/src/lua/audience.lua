#!lua flags=allow-oom
-- Who hears what is said to every server of a service. Those whose time is over are forgotten, and those whose process is gone.
-- KEYS audience
-- Gives their inboxes
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
local inboxes = {}
for _, inbox in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local process = string.match(inbox, '^{(%x+)%.%d+}:i$')
  -- Of a plain peer nothing else is known.
  if not process or #process ~= 32 or redis.call('EXISTS', '{' .. process .. '}:alive') == 1 then
    inboxes[#inboxes + 1] = inbox
  else
    redis.call('ZREM', KEYS[1], inbox)
  end
end
return inboxes
