-- Creates a bucket, with an expiry, where none is stored.
--
-- KEYS[1]  key of the bucket
-- ARGV[1]  new state
-- ARGV[2]  time to live in milliseconds, above 0
--
-- Reply: 1 when the new state was stored, else the state that is there instead (its first 16385 bytes: no
--        state is that long).

if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  return 1
end
return redis.call('GETRANGE', KEYS[1], '0', '16384')
