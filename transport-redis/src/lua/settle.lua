#!lua flags=allow-oom
-- Settles one request that has more to it than a small reply: bodies in their own keys, or a dead letter.
-- KEYS held, then as the letters of ARGV[3] say: i inbox and its bell, b reply body, q request body, d dead letters
-- ARGV ttl of inboxes, token, letters, reply, head of the dead letter, most dead letters, ttl of a dead letter's body
-- Gives 1 settled, 0 no longer held, 2 the reply's body is not there
local at, what = 1, ARGV[3]
local function next_key(letter)
  if not string.find(what, letter, 1, true) then return nil end
  at = at + 1
  return KEYS[at]
end
local inbox = next_key('i')
local bell = next_key('i')
local reply_body = next_key('b')
local request_body = next_key('q')
local dead = next_key('d')
-- The body of a dead letter goes with it.
local function forget_body(letter)
  local decoded, head = pcall(cjson.decode, string.match(letter, '^[^\n]*\n([^\n]*)') or '')
  if not decoded or type(head) ~= 'table' or type(head.at) ~= 'string' then return end
  if #head.at == 32 and not string.find(head.at, '[^0-9a-f]') then
    redis.call('UNLINK', string.sub(dead, 1, -5) .. 'b:' .. head.at)
  end
end

if reply_body and redis.call('EXISTS', reply_body) == 0 then return 2 end
if dead then
  -- First, so that it is still held if this fails.
  local frame = redis.call('HGET', KEYS[1], ARGV[2])
  if not frame then return 0 end
  local over = redis.call('RPUSH', dead, ARGV[5] .. '\n' .. frame) - ARGV[6]
  if over > 0 then
    -- A few at a time, should the bound have been lowered.
    over = math.min(over, 32)
    for _, letter in ipairs(redis.call('LRANGE', dead, 0, over - 1)) do forget_body(letter) end
    redis.call('LTRIM', dead, over, -1)
  end
end
if redis.call('HDEL', KEYS[1], ARGV[2]) == 0 then return 0 end
if inbox then
  if redis.pcall('RPUSH', inbox, ARGV[4]) == 1 then redis.call('PEXPIRE', inbox, ARGV[1]) end
  if redis.pcall('ZADD', bell, 0, '1') == 1 then redis.call('PEXPIRE', bell, ARGV[1]) end
end
if request_body and dead then
  redis.call('PEXPIRE', request_body, ARGV[7])
elseif request_body then
  redis.call('UNLINK', request_body)
end
return 1
