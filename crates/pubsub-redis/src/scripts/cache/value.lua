-- Writes a value, counter or list. KEYS: it. ARGV: what to do, with what, for how long it is to last (ms) or nothing, how long it is kept
-- after the last write that does not say (ms), and how long a list may be.
local what, with, lasts = ARGV[1], ARGV[2], ARGV[3]
local ends, answer = redis.call('PEXPIRETIME', KEYS[1]), 1
if what == 'set' then
  redis.call('SET', KEYS[1], with)
  ends = -2
else
  local kind = redis.call('TYPE', KEYS[1])['ok']
  if what == 'add' then
    if kind ~= 'string' and kind ~= 'none' then return redis.error_reply('KIND holds a list') end
    local sum = redis.pcall('INCRBY', KEYS[1], with)
    if type(sum) == 'table' then
      local is_number = pcall(redis.call, 'INCRBY', KEYS[1], 0)
      return redis.error_reply(is_number and 'KIND holds a number that would be beyond 64 bits' or 'KIND holds no number')
    end
    answer = redis.call('GET', KEYS[1]) -- numbers of Lua have 53 bits
  else
    if kind ~= 'list' and kind ~= 'none' then return redis.error_reply('KIND holds a value') end
    if redis.call('LLEN', KEYS[1]) >= tonumber(ARGV[5]) then return redis.error_reply('FULL') end
    answer = redis.call('RPUSH', KEYS[1], with)
  end
end
-- What lasts as long as it was told ends in an odd millisecond, what is kept after its last write in an even one.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if lasts ~= '' then
  ends = now + tonumber(lasts)
  if ends % 2 == 0 then ends = ends + 1 end
elseif ends < 0 or ends % 2 == 0 then
  ends = now + tonumber(ARGV[4])
  ends = ends + ends % 2
end
redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', ends))
return answer
