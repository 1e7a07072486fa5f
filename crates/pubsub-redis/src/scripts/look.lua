-- What is known of a stream, and whether it has a group. KEYS: the stream. ARGV: the group, or nothing.
-- Returns: whether it exists, its last and its first id, its length, how many were ever added, whether any was deleted singly, and
-- whether the group exists.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {0, '0-0', false, 0, 0, 0, 0}
end
local raw, info = redis.call('XINFO', 'STREAM', KEYS[1]), {}
for i = 1, #raw, 2 do info[raw[i]] = raw[i + 1] end
local first = info['first-entry']
local grouped = 0
if ARGV[1] ~= '' then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    if group[2] == ARGV[1] then grouped = 1 end
  end
end
return {
  1, info['last-generated-id'], first and first[1] or false, info['length'], info['entries-added'],
  info['max-deleted-entry-id'] ~= '0-0' and 1 or 0, grouped
}
