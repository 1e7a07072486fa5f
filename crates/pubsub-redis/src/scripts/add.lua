-- Adds events to a stream, and looks after what it keeps: all of it or nothing. KEYS: the stream. ARGV: the publisher, the number of the
-- first event, how many entries are kept (or 0 for any number), the least time that is kept (ms, or 0), the time to live (ms, or 0),
-- then the events, one at least. Only the first entry says who added it: the others are right behind it.
-- A missing right is told before anything is added: a script is not rolled back. (Nor may anything else be written first: then the server
-- would add beyond its bound on memory.)
-- Returns all ids; or, where they differ in the last part alone and so are consecutive, the first and the last.
local key, keep, call, ids = KEYS[1], ARGV[3], redis.call, {}
if ARGV[4] ~= '0' and not redis.acl_check_cmd('XTRIM', key, 'MINID', '~', ARGV[4]) then
  return redis.error_reply('NOPERM the age of what is kept needs the right to XTRIM')
end
if ARGV[5] ~= '0' and not redis.acl_check_cmd('PEXPIRE', key, ARGV[5]) then
  return redis.error_reply('NOPERM the time to live needs the right to PEXPIRE')
end
if keep == '0' or #ARGV > 6 then
  ids[1] = call('XADD', key, '*', 'event', ARGV[6], 'p', ARGV[1], 'n', ARGV[2])
else
  ids[1] = call('XADD', key, 'MAXLEN', '~', keep, '*', 'event', ARGV[6], 'p', ARGV[1], 'n', ARGV[2])
end
for i = 7, #ARGV - 1 do ids[i - 5] = call('XADD', key, '*', 'event', ARGV[i]) end
if #ARGV > 6 then
  if keep == '0' then
    ids[#ARGV - 5] = call('XADD', key, '*', 'event', ARGV[#ARGV])
  else
    ids[#ARGV - 5] = call('XADD', key, 'MAXLEN', '~', keep, '*', 'event', ARGV[#ARGV])
  end
end
if ARGV[4] ~= '0' then call('XTRIM', key, 'MINID', '~', ARGV[4]) end
if ARGV[5] ~= '0' then call('PEXPIRE', key, ARGV[5]) end
if string.match(ids[1], '^%d+') == string.match(ids[#ids], '^%d+') then return {ids[1], ids[#ids]} end
return ids
