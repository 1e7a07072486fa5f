-- Takes over what nobody holds any more. KEYS: the stream. ARGV: group, consumer, the consumer that stands for nobody, how long an
-- entry must have been idle (ms), how many of nobody's to take, how many of those whose holder has fallen silent, and whether one
-- that may have killed its holders twice may be taken: that one comes alone.
-- Returns: what was taken (id, how often it was delivered now, whether it is to run alone, fields); how many were trimmed away;
-- what this consumer is said to hold and has not renewed (id, how often it was delivered); and whether one that has to run alone
-- was left; how many of what was taken somebody had held.
local group, me, nobody, idle = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local free, silent, alone = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7] == '1'
local taken, lost, mine, left, from, held = {}, 0, {}, 0, '-', 0
repeat
  local page = redis.call('XPENDING', KEYS[1], group, 'IDLE', idle, from, '+', 100)
  for _, pending in ipairs(page) do
    local id, owner, count = pending[1], pending[2], pending[4]
    from = '(' .. id
    local take, runs_alone = false, 0
    if owner == me then
      mine[#mine + 1] = {id, count}
    elseif owner == nobody then
      take = free > 0
    elseif count >= 2 then
      take, runs_alone = alone and #taken == 0, 1
      if not take then left = 1 end
    else
      take = silent > 0
    end
    if take then
      local claimed = redis.call('XCLAIM', KEYS[1], group, me, idle, id)
      if claimed[1] then
        taken[#taken + 1] = {id, count + 1, runs_alone, claimed[1][2]}
        if owner == nobody then free = free - 1 else silent, held = silent - 1, held + 1 end
        if runs_alone == 1 then return {taken, lost, mine, 0, held} end
      else
        lost = lost + 1 -- it is no longer in the stream, and now not pending either
      end
    end
  end
until #page < 100 or (free <= 0 and silent <= 0)
return {taken, lost, mine, left, held}
