-- Settles what this consumer holds, and only that. KEYS: the stream. ARGV: group, consumer, the consumer that stands for nobody, and
-- five words for each entry: what to do, its id, how often it was delivered, how often it is to count as delivered, how long it is to
-- count as idle (ms). Returns for each: 1 if it was done, 0 if another holds it, 2 if it is not pending.
local group, me, nobody = ARGV[1], ARGV[2], ARGV[3]
local answers = {}
for i = 4, #ARGV, 5 do
  local what, id, count = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local found = redis.pcall('XPENDING', KEYS[1], group, id, id, 1)
  local pending = not found.err and found[1]
  local answer = 0
  if not pending then
    answer = 2
  elseif pending[2] == me and pending[4] == count then
    if what == 'done' then
      redis.call('XACK', KEYS[1], group, id)
      answer = 1
    else
      local claim
      if what == 'keep' then
        claim = redis.call('XCLAIM', KEYS[1], group, me, 0, id, 'JUSTID')
      else
        claim = redis.call('XCLAIM', KEYS[1], group, nobody, 0, id, 'IDLE', ARGV[i + 4], 'RETRYCOUNT', ARGV[i + 3], 'JUSTID')
      end
      answer = claim[1] and 1 or 2
    end
  elseif what == 'free' and pending[2] == nobody and pending[4] == tonumber(ARGV[i + 3]) then
    answer = 1 -- it was done before, and the answer got lost
  end
  answers[#answers + 1] = answer
end
return answers
