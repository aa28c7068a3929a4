-- Creates a bucket, with an expiry, where none is stored.
--
-- KEYS[1]  key of the bucket
-- ARGV[1]  new state
-- ARGV[2]  time to live in milliseconds, above 0
--
-- Reply: {1, seconds, microseconds} when the new state was stored,
--        {state, seconds, microseconds} with the state that is there instead;
--        seconds and microseconds are the server's time.

-- The time first: a user without permission for it must fail before anything is written.
local time = redis.call('TIME')
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  return {1, time[1], time[2]}
end
return {redis.call('GET', KEYS[1]), time[1], time[2]}
