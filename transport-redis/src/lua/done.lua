#!lua flags=allow-oom
-- Settles a batch, and pushes the replies of what this session still held: the fence is that its entry was there.
-- KEYS held, then per inbox: inbox, its bell
-- ARGV ttl of inboxes, n, n tokens without a reply, then per inbox: n, n times (token, reply)
-- A key of another kind in an inbox's place costs only the replies that asked for it, hence pcall.
-- Gives one digit a token, in order: 1 settled, 0 no longer held
local bits, at = {}, 2
local function next_argument()
  at = at + 1
  return ARGV[at - 1]
end
for _ = 1, tonumber(next_argument()) do
  bits[#bits + 1] = redis.call('HDEL', KEYS[1], next_argument())
end
for inbox = 2, #KEYS, 2 do
  local replies = {}
  for _ = 1, tonumber(next_argument()) do
    local held = redis.call('HDEL', KEYS[1], next_argument())
    local reply = next_argument()
    bits[#bits + 1] = held
    if held == 1 then replies[#replies + 1] = reply end
  end
  if #replies > 0 then
    if redis.pcall('RPUSH', KEYS[inbox], unpack(replies)) == #replies then
      redis.call('PEXPIRE', KEYS[inbox], ARGV[1])
    end
    if redis.pcall('ZADD', KEYS[inbox + 1], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[inbox + 1], ARGV[1]) end
  end
end
return table.concat(bits)
