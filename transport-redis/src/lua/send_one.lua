#!lua
-- Queues one request that has a condition: that its body is there, or that somebody serves. Refused when memory is full.
-- KEYS queue, bell, live, and the body's if it has its own key
-- ARGV frame, 1 if somebody must serve
-- Gives 1 queued, 0 nobody serves, -1 the body is not there
if KEYS[4] and redis.call('EXISTS', KEYS[4]) == 0 then return -1 end
if ARGV[2] == '1' then
  local served = false
  for _, session in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    served = redis.call('EXISTS', '{' .. string.match(session, '^[^.]*') .. '}:alive') == 1
    if served then break end
  end
  if not served then
    if KEYS[4] then redis.call('UNLINK', KEYS[4]) end
    return 0
  end
end
redis.call('RPUSH', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], 0, '1')
return 1
