#!lua flags=allow-oom
-- Takes a request that nobody holds back out of the queue, or out of the returned work. It is looked for from the tail,
-- where it was pushed, among so many: a long queue must not hold up everybody for the sake of one request.
-- KEYS queue, returned
-- ARGV most requests, most bytes, beginning of its frame...
-- Gives 0 if it was not found, 1 if it is removed, or the id of its body's key, for the caller to remove
local requests, bytes = tonumber(ARGV[1]), tonumber(ARGV[2])

local function is_it(frame)
  for index = 3, #ARGV do
    if string.sub(frame, 1, #ARGV[index]) == ARGV[index] then return true end
  end
  return false
end

-- The frame, and how far from the tail it is; of elements in groups, the last of each is the frame.
local function find(key, group)
  local seen = 0
  while requests > 0 and bytes > 0 do
    local page = redis.call('LRANGE', key, -seen - 32 * group, -seen - 1)
    for index = #page, 1, -group do
      seen = seen + group
      requests = requests - 1
      bytes = bytes - #page[index]
      if is_it(page[index]) then return page[index], seen end
    end
    if #page < 32 * group then return nil end
  end
end

local frame, at = find(KEYS[1], 1)
if frame then
  redis.call('LREM', KEYS[1], -1, frame)
else
  frame, at = find(KEYS[2], 2)
  if not frame then return 0 end
  -- A pair of attempt and frame: both become what is no frame and no attempt, and go by that.
  redis.call('LSET', KEYS[2], -at, 'withdrawn')
  redis.call('LSET', KEYS[2], -at + 1, 'withdrawn')
  redis.call('LREM', KEYS[2], -2, 'withdrawn')
end
return string.match(frame, '^[^\n]*,"at":"(%x+)"}\n') or 1
