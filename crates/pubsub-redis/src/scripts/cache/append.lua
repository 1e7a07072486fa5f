-- Numbers events and keeps them, each once. ARGV: the store, or nothing if the caller does not know it; for how many events and how long
-- (ms) it is kept; among how many of the newest a repeat is recognised; how long the place is kept (ms); an id and an event each.
-- Returns the store, the number of the generation, and for each event its index, or index and kept copy of a repeat. Nothing if a log
-- begins and the store is not known.
local max_events, max_age, window, lasts = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local store, number = was[1], was[2]
if not next_index then
  store = store or (ARGV[1] ~= '' and ARGV[1])
  if not store then return false end
  -- By the clock, so that no number comes again although all that was known of the log is forgotten.
  number = text(math.max(tonumber(number or -1) + 1, tonumber(time[1])))
  redis.call('XLEN', log) -- which refuses what is no log of ours
  redis.call('UNLINK', log, ids)
  next_index, floor, known = 0, 0, 0
else
  forget_old(max_age)
end

local answers = {}
for first = 6, #ARGV, 1000 do
  local last = math.min(first + 999, #ARGV)
  local asked, new, added = {}, {}, {}
  for i = first, last, 2 do asked[#asked + 1] = ARGV[i] end
  local found = redis.call('HMGET', ids, unpack(asked))
  for n, id in ipairs(asked) do
    local index, kept = tonumber(found[n] or added[id]), nil
    if index and index >= floor then kept = redis.call('XRANGE', log, entry_of(index), entry_of(index))[1] end
    if kept then
      answers[#answers + 1] = {index, kept[2][6]}
    else
      redis.call('XADD', log, entry_of(next_index), 'id', id, 'time', text(now), 'event', ARGV[first + 2 * n - 1])
      answers[#answers + 1] = next_index
      added[id] = next_index
      new[#new + 1] = id
      new[#new + 1] = text(next_index)
      next_index = next_index + 1
    end
  end
  if new[1] then redis.call('HSET', ids, unpack(new)) end
end

-- Some at a time: taking single entries off the front costs the server more than taking whole blocks.
if next_index - floor > max_events + math.min(100, math.floor(max_events / 10)) then forget(next_index - max_events) end
if next_index - known > window + 100 then forget_ids(next_index - window) end
redis.call('HSET', place, 'store', store, 'number', number, 'next', text(next_index), 'floor', text(floor), 'known', text(known))
redis.call('PEXPIRE', place, lasts)
redis.call('PEXPIRE', log, max_age)
redis.call('PEXPIRE', ids, max_age)
return {tonumber(store), tonumber(number), answers}
