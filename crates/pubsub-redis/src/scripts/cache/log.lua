-- What the scripts of a log begin with. KEYS: the log's place in its numbering, its events, the indices of their ids. The place is a hash
-- of the store, the number of the generation, the next index, the floor, and from which index on ids are known; after a clear of the
-- first two alone. An event is the entry 1-INDEX with the fields id, time and event.
local place, log, ids = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local was = redis.call('HMGET', place, 'store', 'number', 'next', 'floor', 'known')
local next_index, floor, known = tonumber(was[3]), tonumber(was[4]), tonumber(was[5])

local function text(number) return string.format('%.0f', number) end
local function entry_of(index) return '1-' .. text(index) end
local function index_of(entry) return tonumber(string.sub(entry[1], 3)) end

-- Forgets which index the ids of what lies below one have.
local function forget_ids(below)
  local from = entry_of(known)
  while known < below do
    local page, gone = redis.call('XRANGE', log, from, '(' .. entry_of(below), 'COUNT', 200), {}
    for n, entry in ipairs(page) do gone[n] = entry[2][2] end
    if gone[1] then
      redis.call('HDEL', ids, unpack(gone))
      from = '(' .. page[#page][1]
    end
    if #page < 200 then known = below end
  end
end

local function forget(below)
  forget_ids(below)
  redis.call('XTRIM', log, 'MINID', entry_of(below))
  floor = below
end

-- Forgets what is older than this, and what went without this script: the events run out by themselves, and a server that is short of
-- memory may forget any key.
local function forget_old(age)
  if next_index > floor and redis.call('EXISTS', log) == 0 then
    redis.call('UNLINK', ids)
    floor, known = next_index, next_index
    return
  end
  local below, from, count = floor, '-', 1
  repeat
    local page, old = redis.call('XRANGE', log, from, '+', 'COUNT', count), true
    for _, entry in ipairs(page) do
      old = tonumber(entry[2][4]) < now - age
      if not old then break end
      below, from = index_of(entry) + 1, '(' .. entry[1]
    end
    local ended = not old or #page < count
    count = 200
  until ended
  if below > floor then forget(below) end
end

