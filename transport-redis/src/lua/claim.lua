#!lua flags=allow-oom
-- Takes work into the session's hands. Refused once the session no longer takes, so a claim that was delayed on a dead
-- connection moves nothing.
-- KEYS live, queue, returned, held, bell, holding
-- ARGV session, most, first token, returned work (0 none, 1 first, 2 after fresh work), ttl of held and of the bell,
--   1 if the session may not be known to hold work
-- Gives -1 if refused, else {more is left, attempt of the returned work that is next or 0, attempt or 0, {frame...}}
local function ring()
  if redis.call('ZADD', KEYS[5], 0, '1') == 1 then redis.call('PEXPIRE', KEYS[5], ARGV[5]) end
end

-- Returned work, once seen to be gone, is not asked for again.
local returned_gone = false

local function finish(attempt, frames, fresh_gone)
  local fresh = fresh_gone and 0 or redis.call('EXISTS', KEYS[2])
  local returned = not returned_gone and tonumber(redis.call('LINDEX', KEYS[3], 0) or 0) or 0
  if fresh + returned > 0 then ring() end
  return {fresh, returned, attempt, frames}
end

local function hold(fields)
  redis.call('HSET', KEYS[4], unpack(fields))
  redis.call('PEXPIRE', KEYS[4], ARGV[5], 'NX')
  if ARGV[6] == '1' then
    redis.call('SADD', KEYS[6], ARGV[1])
    redis.call('PEXPIRE', KEYS[6], ARGV[5])
  end
end

local function take_returned()
  local pair = redis.call('LPOP', KEYS[3], 2)
  if not pair then
    returned_gone = true
    return nil
  end
  hold({ARGV[3] .. '.' .. pair[1], pair[2]})
  return finish(tonumber(pair[1]), {pair[2]}, false)
end

if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 0 then
  if redis.call('EXISTS', KEYS[2], KEYS[3]) > 0 then ring() end
  return -1
end
if ARGV[4] == '1' then
  local answer = take_returned()
  if answer then return answer end
end
local frames = redis.call('LPOP', KEYS[2], ARGV[2])
if frames then
  local token, fields = tonumber(ARGV[3]), {}
  for index = 1, #frames do
    fields[2 * index - 1] = token
    fields[2 * index] = frames[index]
    token = token + 1
  end
  hold(fields)
  return finish(0, frames, #frames < tonumber(ARGV[2]))
end
if ARGV[4] == '2' then
  local answer = take_returned()
  if answer then return answer end
end
return finish(0, {}, true)
