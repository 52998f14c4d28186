#!lua flags=allow-oom
-- Settles a batch that was never asked for before, and pushes its replies. A session is ended with all that it holds, and
-- what it settled it does not settle again: so it holds the whole batch or nothing, and one HDEL is the fence.
-- KEYS held, then per inbox: inbox, its bell
-- ARGV ttl of inboxes, n, n tokens, then per inbox: n, n replies
-- A key of another kind in an inbox's place costs only the replies that asked for it, hence pcall.
-- Gives 1 settled, 0 no longer held
local last = 2 + ARGV[2]
if redis.call('HDEL', KEYS[1], unpack(ARGV, 3, last)) == 0 then return 0 end
for inbox = 2, #KEYS, 2 do
  local count = tonumber(ARGV[last + 1])
  local first = last + 2
  last = last + 1 + count
  if redis.pcall('RPUSH', KEYS[inbox], unpack(ARGV, first, last)) == count then
    redis.call('PEXPIRE', KEYS[inbox], ARGV[1])
  end
  if redis.pcall('ZADD', KEYS[inbox + 1], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[inbox + 1], ARGV[1]) end
end
return 1
