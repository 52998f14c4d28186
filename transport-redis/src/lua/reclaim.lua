#!lua flags=allow-oom
-- Ends a session whose lease is over, or that asks for it, and returns what it held with the attempt counted.
-- KEYS sessions, live, owner, held, returned, bell
-- ARGV session, 1 to end it whatever its lease, ttl of returned work, ttl of the fencing number
-- Gives how many requests were returned, or -1 if the session is alive or gone
local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not lease then return -1 end
if ARGV[2] ~= '1' then
  local time = redis.call('TIME')
  if tonumber(lease) > time[1] * 1000 + math.floor(time[2] / 1000) then return -1 end
end
local entries, work = redis.call('HGETALL', KEYS[4]), {}
for index = 1, #entries, 2 do
  local token, attempt = string.match(entries[index], '^(%d+)%.?(%d*)$')
  work[#work + 1] = {tonumber(token) or 0, (tonumber(attempt) or 1) + 1, entries[index + 1]}
end
table.sort(work, function(left, right) return left[1] < right[1] end)
for _, entry in ipairs(work) do redis.call('RPUSH', KEYS[5], entry[2], entry[3]) end
if #work > 0 then
  redis.call('PEXPIRE', KEYS[5], ARGV[3], 'NX')
  redis.call('PEXPIRE', KEYS[5], ARGV[3], 'GT')
  if redis.call('ZADD', KEYS[6], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[6], ARGV[3]) end
end
redis.call('DEL', KEYS[4])
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HGET', KEYS[3], 'session') == ARGV[1] then
  redis.call('HDEL', KEYS[3], 'session')
  redis.call('PEXPIRE', KEYS[3], ARGV[4])
end
return #work
