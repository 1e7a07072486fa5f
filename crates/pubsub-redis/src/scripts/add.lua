-- Adds events to a stream, and looks after what it keeps: all of it or nothing. KEYS: the stream. ARGV: who adds the first event, as
-- PUBLISHER:NUMBER, how many entries are kept (or 0 for any number), the least time that is kept (ms, or 0), the time to live (ms, or 0),
-- then the events, one at least. Only the first entry says who added it: the others are right behind it.
-- A missing right is told before anything is added: a script is not rolled back. (Nor may anything else be written first: then the server
-- would add beyond its bound on memory.)
-- Returns all ids; or, where they differ in the last part alone and so are consecutive, the first and the last.
local key, by, keep, least, idle, call, ids = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], redis.call, {}
if least ~= '0' and not redis.acl_check_cmd('XTRIM', key, 'MINID', '~', least) then
  return redis.error_reply('NOPERM the age of what is kept needs the right to XTRIM')
end
if idle ~= '0' and not redis.acl_check_cmd('PEXPIRE', key, idle) then
  return redis.error_reply('NOPERM the time to live needs the right to PEXPIRE')
end
local last = #ARGV
if keep == '0' or last > 5 then
  ids[1] = call('XADD', key, '*', 'event', ARGV[5], 'p', by)
else
  ids[1] = call('XADD', key, 'MAXLEN', '~', keep, '*', 'event', ARGV[5], 'p', by)
end
for i = 6, last - 1 do ids[i - 4] = call('XADD', key, '*', 'event', ARGV[i]) end
if last > 5 then
  if keep == '0' then
    ids[last - 4] = call('XADD', key, '*', 'event', ARGV[last])
  else
    ids[last - 4] = call('XADD', key, 'MAXLEN', '~', keep, '*', 'event', ARGV[last])
  end
end
if least ~= '0' then call('XTRIM', key, 'MINID', '~', least) end
if idle ~= '0' then call('PEXPIRE', key, idle) end
if string.match(ids[1], '^%d+') == string.match(ids[#ids], '^%d+') then return {ids[1], ids[#ids]} end
return ids
