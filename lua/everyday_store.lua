-- Stores a new state, with its expiry, and replies.
--
-- Uses    after, suffix, full (nanoseconds), same_when_new, missing, taken, counting, before; key, expiration, request
-- Offers  nothing: it returns the reply of the script
-- To      everyday_one, everyday_two, at the end

local ttl = -1
if expiration == FIXED then
  ttl = unpack('>i8', request, 35)
elseif expiration == AFTER_REFILL then
  -- This is rounded up: the bucket never expires before it is full.
  ttl = unpack('>i8', request, 35) + (full + -full % NANOS_PER_MILLISECOND) / NANOS_PER_MILLISECOND
  ttl = ttl < 1 and 1 or ttl
elseif expiration ~= NO_EXPIRY then
  ttl = (full - full % NANOS_PER_MILLISECOND) / NANOS_PER_MILLISECOND + (same_when_new and MARGIN_MILLIS or IDLE_MILLIS)
end
if ttl < 2^53 then
  after = after .. suffix
  if missing then
    local made
    if ttl > 0 then
      made = redis.call('SET', key, after, 'PX', format('%d', ttl), 'NX')
    else
      made = redis.call('SET', key, after, 'NX')
    end
    if not made then
      -- The value is empty.
      return {before}
    end
  elseif ttl > 0 then
    redis.call('SET', key, after, 'PX', format('%d', ttl))
  else
    redis.call('SET', key, after)
  end
  if counting then
    return taken
  end
  return not missing and before
end
