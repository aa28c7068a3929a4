-- Replaces the states of several buckets if each of them is byte for byte the expected one; all of them or none.
--
-- KEYS[1]  key of a bucket, and further ones; all in one slot, each once
-- ARGV[1]  for each key three: the expected state, empty where nothing is to be stored; the new state, empty where the
--          expected one is only compared; the time to live in milliseconds, 0 for none
--
-- Reply: 1 when all new states were stored; else for each key 1 where the expected state is there, or the state that is
--        there instead (its first 16385 bytes: no state is that long); nil where there is none. An empty value is found
--        where a bucket is to be made.

local found, same = {}, true
for i, key in ipairs(KEYS) do
  local current = redis.call('GETRANGE', key, '0', '16384')
  if current == ARGV[3 * i - 2] then
    found[i] = 1
  else
    same = false
    found[i] = current ~= '' and current
  end
end
if not same then
  return found
end

local function store(i, condition)
  local after, ttl = ARGV[3 * i - 1], ARGV[3 * i]
  if ttl == '0' then
    return redis.call('SET', KEYS[i], after, condition)
  end
  return redis.call('SET', KEYS[i], after, 'PX', ttl, condition)
end

-- Buckets that are missing come first. Only these may be refused, where the value is empty; those that were made before
-- that are deleted, so that nothing has changed.
local made = {}
for i, key in ipairs(KEYS) do
  if ARGV[3 * i - 2] == '' and ARGV[3 * i - 1] ~= '' then
    if not store(i, 'NX') then
      for _, other in ipairs(made) do
        redis.call('DEL', other)
      end
      found[i] = ''
      return found
    end
    made[#made + 1] = key
  end
end
for i = 1, #KEYS do
  if ARGV[3 * i - 2] ~= '' and ARGV[3 * i - 1] ~= '' then
    store(i, 'XX')
  end
end
return 1
