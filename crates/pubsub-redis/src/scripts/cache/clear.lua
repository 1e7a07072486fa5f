-- Forgets a log but for which generation it was. ARGV: how long that is kept (ms).
redis.call('UNLINK', log, ids)
if next_index then
  redis.call('HDEL', place, 'next', 'floor', 'known')
  redis.call('PEXPIRE', place, ARGV[1])
end
return 1
