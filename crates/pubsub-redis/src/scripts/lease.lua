-- Does something to a lease that has this owner. KEYS: the lease, its token. ARGV: owner, what to do, time to live (ms), next owner.
-- Returns nothing if it is not this owner's; else the owner, the token, how long it lasts (ms).
local owner = redis.call('GET', KEYS[1])
if ARGV[2] == 'holder' then
  if not owner then return false end
elseif owner ~= ARGV[1] then
  return false
elseif ARGV[2] == 'renew' then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
elseif ARGV[2] == 'release' then
  redis.call('DEL', KEYS[1])
  return {owner, 0, 0}
elseif ARGV[2] == 'transfer' then
  owner = ARGV[4]
  redis.call('SET', KEYS[1], owner, 'PX', ARGV[3])
  redis.call('INCR', KEYS[2])
end
return {owner, tonumber(redis.call('GET', KEYS[2]) or 0), math.max(0, redis.call('PTTL', KEYS[1]))}
