-- Takes a lease that is free, or renews it for its owner. KEYS: the lease, its token. ARGV: owner, time to live (ms).
-- Returns: whether it is the caller's, the owner, the token, how long it lasts (ms).
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then
  return {0, owner, tonumber(redis.call('GET', KEYS[2]) or 0), math.max(0, redis.call('PTTL', KEYS[1]))}
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
-- An owner that took it without a token, as TypeScript does, gets its first now.
local token = owner and redis.call('GET', KEYS[2]) or redis.call('INCR', KEYS[2])
return {1, ARGV[1], tonumber(token), tonumber(ARGV[2])}
