-- Decides the everyday case: tokens that are consumed if they are there, from one greedy bandwidth without id.
--
-- It computes in plain doubles: every integer in it, also between two steps, is below 2^53, or else it changes nothing
-- and leaves the bucket to what follows. Times are read in halves, as only differences of times fit into a double.
--
-- Uses    key, request, before; TRY_CONSUME, the constants of expiration; unpack, pack, floor, ceil
-- Offers  nothing: either it stores the new state and returns the reply of the script, or what follows decides
-- To      scripts that decide on token buckets, before they make their functions

if (#before == 107 or #before == 116) and #request == 47 then
  local expiration, duration, wanted, wanted_version, now_high, now_low, number, times, tokens =
    unpack('>Bi8Bi8i4I4BI4i8', request)
  local state_format, configuration_format, bandwidths, bandwidth_format,
    capacity, initial, period, rate, intervally, first, adaptive, has_id,
    arithmetic, numbers_format, count, last_high, last_low, size, unfinished, statistics_format, consumed =
    unpack('>i4i4i4i4i8i8i8i8Bi8BBi4i4i4i4I4i8i8i4i8', before)
  local format, version = 1, -2^63
  if #before == 116 then
    local has_version
    has_version, version = unpack('>Bi8', before, 108)
    format = has_version == 1 and 2
  end
  local elapsed = (now_high - last_high) * 2^32 + (now_low - last_low)

  if number == TRY_CONSUME and tokens >= 1 and tokens < 2^53 and elapsed < 2^53
    and state_format == format and configuration_format == 1 and bandwidths == 1 and bandwidth_format == 1
    and arithmetic == 3 and numbers_format == 1 and count == 3 and statistics_format == 1
    and (wanted == 0 or format == 2 and version >= wanted_version and version < 2^53 and wanted_version > -2^53)
    and intervally == 0 and adaptive == 0 and has_id == 0
    -- It is not aligned. A 32-bit server, which cuts off `i8`, never gets past this line.
    and first == -2^63
    and capacity >= 1 and capacity < 2^53 and period >= 1 and period < 2^53 and rate >= 1 and rate < 2^53
    and size > -2^53 and size < 2^53 and unfinished >= 0 and unfinished < period
    and consumed > -2^53 and consumed + tokens * times < 2^53 and duration < 2^52 then

    local exact = true
    if elapsed > 0 then
      last_high, last_low = now_high, now_low
      if size < capacity then
        if elapsed > period then
          local gained = floor(elapsed / period) * rate
          exact = gained < 2^53
          size = size + gained
          elapsed = elapsed % period
        end
        local gained = rate * elapsed + unfinished
        exact = exact and gained < 2^53
        size = size + floor(gained / period)
        unfinished = gained % period
        if size >= capacity then
          size, unfinished = capacity, 0
        end
      end
    end

    -- A bucket with too few tokens stays as it is: not even the refill is stored.
    if exact and size < tokens then
      return {1, before}
    end
    if times > 1 and size < tokens * times then
      times = floor(size / tokens)
    end
    size = size - tokens * times

    local ttl = -1
    if expiration == FIXED then
      ttl = duration
    elseif expiration ~= NO_EXPIRY then
      -- This is the wait until the bucket is full, in milliseconds.
      local full = 0
      if size < capacity then
        local missing = capacity - size
        local needed = period * missing
        if needed < 2^53 then
          full = floor((needed - unfinished) / rate) / NANOS_PER_MILLISECOND
        elseif needed < 2^62 then
          -- The wait is below 2^43, hence wrong by less than 2^-8: certain if no whole number is that near.
          full = (needed - unfinished) / rate / NANOS_PER_MILLISECOND
          exact = exact and full % 1 > 2^-8 and full % 1 < 1 - 2^-8
        else
          -- The product overflows, and then the format computes the wait in doubles.
          full = floor(missing / rate * period) / NANOS_PER_MILLISECOND
          exact = exact and needed > 2^64 and full < 2^33
        end
      end
      if expiration == AFTER_REFILL then
        ttl = ceil(full) + duration
        if ttl < 1 then
          ttl = 1
        end
      elseif initial == capacity and size <= capacity then
        ttl = floor(full) + MARGIN_MILLIS
      else
        ttl = floor(full) + IDLE_MILLIS
      end
    end

    if exact then
      consumed = consumed + tokens * times
      local after = pack('>c71i4I4i8i8i4i8', before, last_high, last_low, size, unfinished, 1, consumed)
      if format == 2 then
        after = after .. before:sub(108)
      end
      if ttl > 0 then
        redis.call('SET', key, after, 'PX', string.format('%.0f', ttl))
      else
        redis.call('SET', key, after)
      end
      return {1, before}
    end
  end
end
