-- Takes events out of a log. ARGV: the store and the number of the generation they are of, an index and an id each. Returns how many.
if not next_index or was[1] ~= ARGV[1] or was[2] ~= ARGV[2] then return 0 end
local removed = 0
for i = 3, #ARGV, 2 do
  if redis.call('XDEL', log, '1-' .. ARGV[i]) == 1 then
    redis.call('HDEL', ids, ARGV[i + 1])
    removed = removed + 1
  end
end
return removed
