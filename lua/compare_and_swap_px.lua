-- Replaces the state of a bucket, with an expiry, if it is byte for byte the expected one.
--
-- KEYS[1]  key of the bucket
-- ARGV[1]  expected state
-- ARGV[2]  new state
-- ARGV[3]  time to live in milliseconds, above 0
--
-- Reply: 1 when the new state was stored, else the state that is there instead (its first 16385 bytes: no
--        state is that long); nil where there is none, or an empty value.

local current = redis.call('GETRANGE', KEYS[1], '0', '16384')
if current == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  return 1
end
return current ~= '' and current
