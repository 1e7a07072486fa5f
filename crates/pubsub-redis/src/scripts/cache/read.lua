-- Reads a log. ARGV: from which index on, how many events and bytes at most, for how long it is kept (ms).
-- Returns the store, the number of the generation, the floor, the next index, how many there are, and for each event its index and
-- itself. Nothing if there is no log.
if not next_index then return false end
forget_old(tonumber(ARGV[4]))
if text(floor) ~= was[4] then redis.call('HSET', place, 'floor', text(floor), 'known', text(known)) end
local from, limit, bytes, found = math.max(tonumber(ARGV[1]), floor), tonumber(ARGV[2]), tonumber(ARGV[3]), {}
if from < next_index then
  local start = entry_of(from)
  while limit > 0 and bytes > 0 do
    local count = math.min(limit, 100)
    local page = redis.call('XRANGE', log, start, '+', 'COUNT', count)
    for _, entry in ipairs(page) do
      found[#found + 1] = index_of(entry)
      found[#found + 1] = entry[2][6]
      bytes = bytes - #entry[2][6]
    end
    if #page < count then break end
    limit, start = limit - count, '(' .. page[#page][1]
  end
end
return {tonumber(was[1]), tonumber(was[2]), floor, next_index, redis.call('XLEN', log), found}
