#!lua
-- Queues one request that has a condition: that its body is there, or that somebody serves. Refused when memory is full.
-- KEYS queue, bell, live, and the body's if it has its own key
-- ARGV frame, 1 if somebody must serve
-- Gives 1 queued, 0 nobody serves, -1 the body is not there
if KEYS[4] and redis.call('EXISTS', KEYS[4]) == 0 then return -1 end
if ARGV[2] == '1' then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  if redis.call('ZCOUNT', KEYS[3], '(' .. now, '+inf') == 0 then
    if KEYS[4] then redis.call('UNLINK', KEYS[4]) end
    return 0
  end
end
redis.call('RPUSH', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], 0, '1')
return 1
