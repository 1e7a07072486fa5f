-- Finds events of a publisher that does not know whether they were added. Goes before the script that adds, with the same arguments and
-- one more: how long ago at most they may have been added (ms). If the first is there, so are the others, as they came together: their
-- ids are returned. If it is not, they are added now.
do
  local ago = tonumber(table.remove(ARGV))
  local by, count = ARGV[1], #ARGV - 4
  local publisher, number = string.match(by, '^(.*):(%d+)$')
  local function field(entry, name)
    for i = 1, #entry[2], 2 do
      if entry[2][i] == name then return entry[2][i + 1] end
    end
  end
  -- Newest first, until something of ours is older than what is looked for, or everything is.
  local time = redis.call('TIME')
  local floor = tonumber(time[1]) * 1000 - ago
  local found, from, done = nil, '+', false
  repeat
    local page = redis.call('XREVRANGE', KEYS[1], from, '-', 'COUNT', 500)
    for _, entry in ipairs(page) do
      local p = field(entry, 'p')
      if p == by then found, done = entry[1], true end
      local whose, which = string.match(p or '', '^(.*):(%d+)$')
      done = done or (whose == publisher and tonumber(which) < tonumber(number))
      done = done or tonumber(string.match(entry[1], '^%d+')) < floor
      if done then break end
      from = '(' .. entry[1]
    end
  until done or #page < 500
  if found then
    local ids, entries, at = {}, redis.call('XRANGE', KEYS[1], found, '+', 'COUNT', count), 1
    for i = 1, count do
      if entries[at] and field(entries[at], 'event') == ARGV[i + 4] then
        ids[i], at = entries[at][1], at + 1
      else
        ids[i] = ids[i - 1] -- it was deleted since: its place is right behind the one before it
      end
    end
    return ids
  end
end
