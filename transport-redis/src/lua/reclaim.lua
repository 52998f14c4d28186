#!lua flags=allow-oom
-- Ends a session whose process is gone, that asks for it, or that is fenced off, and returns what it held with the attempt counted.
-- KEYS sessions, live, holding, owner, held, returned, bell, sign of life of its process
-- ARGV session, 0 to end it if its process is gone, 1 if that asks for it, 2 to fence it off though that may live, ttl of returned work, ttl of the fencing number
-- Gives how many requests were returned, or -1 if the session is alive or gone
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 0 then return -1 end
if ARGV[2] == '0' and redis.call('EXISTS', KEYS[8]) == 1 then return -1 end
-- One that lives sees to all its sessions at its next renewal, or an idle one would believe in itself for long.
if ARGV[2] == '2' then redis.call('SET', KEYS[8], '0', 'XX', 'KEEPTTL') end
local entries, work = redis.call('HGETALL', KEYS[5]), {}
for index = 1, #entries, 2 do
  local token, attempt = string.match(entries[index], '^(%d+)%.?(%d*)$')
  work[#work + 1] = {tonumber(token) or 0, (tonumber(attempt) or 1) + 1, entries[index + 1]}
end
table.sort(work, function(left, right) return left[1] < right[1] end)
for _, entry in ipairs(work) do redis.call('RPUSH', KEYS[6], entry[2], entry[3]) end
if #work > 0 then
  redis.call('PEXPIRE', KEYS[6], ARGV[3], 'NX')
  redis.call('PEXPIRE', KEYS[6], ARGV[3], 'GT')
  if redis.call('ZADD', KEYS[7], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[7], ARGV[3]) end
end
redis.call('DEL', KEYS[5])
for index = 1, 3 do redis.call('SREM', KEYS[index], ARGV[1]) end
if redis.call('HGET', KEYS[4], 'session') == ARGV[1] then
  redis.call('HDEL', KEYS[4], 'session')
  redis.call('PEXPIRE', KEYS[4], ARGV[4])
end
return #work
