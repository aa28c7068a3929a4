-- Changes several buckets where they are stored, for one caller after the other: all buckets that a caller asks for, or
-- none. A caller consumes tokens, or settles what it has consumed before.
--
-- KEYS[1]  key of a bucket, and further ones; all in one slot, each once
-- ARGV[1]  for each key a request as that of decide, with one operation, whose tokens do not matter; of the flags only 4
--          counts; all have the same time
-- ARGV[n]  the last one: for each caller how many buckets it asks for (u8), and for each of these the number of an
--          operation (u8: that of decide for try_consume, give_back or consume_ignoring_rate_limits), the place of its
--          key, 1 for the first (u8), and the tokens, 1 or more (i64)
--
-- Reply: a number, and then for each key the state that was there before, nil for a new bucket. The number is 1 when the
--        callers were decided. A bucket that was missing is stored then, whether it was charged or not.
--        The number is 0 when nothing was changed, since one of the buckets is not an everyday one: of one or two greedy
--        bandwidths without ids, with numbers that a double holds exactly, and with the wanted version or a higher one;
--        or it is missing and is not to be made, or its value is empty.
--
-- What is stored at the end is, to the byte, what decide would store for each of the buckets.

-- include: operation_numbers
local unpack, pack, format = struct.unpack, struct.pack, string.format
local LONGEST_STATE = '16384'
local MUST_EXIST = 4
-- 0: no expiry, 1: fixed, 2: after refill, 3: automatic.
local NO_EXPIRY, FIXED, AFTER_REFILL = 0, 1, 2
-- An automatic expiration keeps a full bucket for the margin where a new one would be equal, and else for longer.
local MARGIN_MILLIS, IDLE_MILLIS = 10000, 30 * 86400000
local NANOS_PER_MILLISECOND = 1000000

local reply, decidable = {1}, true
for i, key in ipairs(KEYS) do
  local current = redis.call('GETRANGE', key, '0', LONGEST_STATE)
  reply[i + 1] = current ~= '' and current
end

-- Reads and refills all buckets.
local buckets = {}
for i = 1, #KEYS do
  local request, before = ARGV[i], reply[i + 1]
  local now_high, now_low, flags, expiration, wanted = unpack('>i4I4BBB', request)
  local missing = not before
  local stored = before or flags < MUST_EXIST and request:sub(51) or ''
  local length = #stored
  if length ~= 107 and length ~= 116 and length ~= 178 and length ~= 187 then
    decidable = false
    break
  end
  local count = length < 178 and 1 or 2
  local numbers = 13 + 47 * count
  local formats, bandwidths = unpack('>i8i4', stored)
  local numbers_format, numbers_count = unpack('>i8i4', stored, numbers)
  local statistics, consumed = unpack('>i4i8', stored, numbers + 12 + 24 * count)
  -- Two i4 are read as one i8; a 32-bit server cuts it off, so that no bucket passes the checks there.
  local exact = bandwidths == count and numbers_format == 3 * 2^32 + 1 and numbers_count == 3 * count
    and statistics == 1 and consumed > -2^53
  -- include: everyday_version
  local bucket = {
    request = request, expiration = expiration, missing = missing, stored = stored, suffix = suffix,
    numbers = numbers, consumed = consumed, taken = 0, same_when_new = true,
  }
  for j = 1, count do
    local limit_format, capacity, initial, period, rate, fixed = unpack('>i4i8i8i8i8c11', stored, 47 * j - 34)
    local at = numbers + 24 * j - 12
    local last_high, last_low, size, part = unpack('>i4I4i8i8', stored, at)
    if missing then
      -- A new bucket begins now.
      last_high, last_low = now_high, now_low
    end
    local elapsed = (now_high - last_high) * 2^32 + (now_low - last_low)
    -- `fixed` says: not by intervals, not aligned, not adaptive, no id.
    exact = exact and limit_format == 1 and fixed == '\0\128\0\0\0\0\0\0\0\0\0'
      and capacity >= 1 and capacity < 2^53 and period < 2^53 and rate >= 1 and rate < 2^53
      and size <= capacity and size > -2^53 and part >= 0 and part < period and elapsed < 2^53
    -- include: everyday_refill
    local last = (elapsed > 0 or missing) and request:sub(1, 8) or stored:sub(at, at + 7)
    bucket[j] = {capacity, period, rate, size, part, last}
    bucket.same_when_new = bucket.same_when_new and initial == capacity
    if j == 1 or size < bucket.available then
      bucket.available = size
    end
  end
  decidable = decidable and exact
  buckets[i] = bucket
end

-- Decides one caller after the other.
local calls, position = ARGV[#KEYS + 1], 1
while decidable and position <= #calls do
  local asked, admitted = calls:byte(position), true
  local last = position + 10 * asked
  for at = position + 1, last, 10 do
    local operation, place, tokens = unpack('>BBi8', calls, at)
    local bucket = buckets[place]
    decidable = decidable and tokens >= 1 and tokens < 2^53
    if operation == TRY_CONSUME then
      admitted = admitted and bucket.available >= tokens
    elseif operation == CONSUME_IGNORING_RATE_LIMITS then
      for _, limit in ipairs(bucket) do
        -- A debt that might never be paid, or that a double might not hold, is not for this script.
        local missing = tokens - (limit[4] - bucket.taken)
        decidable = decidable and missing < 2^53 and missing * limit[2] < 2^63 - 2^12
      end
    end
  end
  for at = position + 1, admitted and last or 0, 10 do
    local operation, place, tokens = unpack('>BBi8', calls, at)
    local bucket = buckets[place]
    if operation == GIVE_BACK then
      -- What was taken is subtracted here, since some of the bandwidths may be full and others not.
      local consumed = bucket.consumed + bucket.taken
      decidable = decidable and consumed < 2^53 and consumed - tokens > -2^53
      bucket.consumed, bucket.changed = consumed - tokens, true
      for j, limit in ipairs(bucket) do
        local capacity, size = limit[1], limit[4] - bucket.taken
        if size < capacity then
          size = size + tokens
          if size >= capacity then
            size, limit[5] = capacity, 0
          end
        end
        limit[4] = size
        if j == 1 or size < bucket.available then
          bucket.available = size
        end
      end
      bucket.taken = 0
    else
      bucket.available, bucket.taken = bucket.available - tokens, bucket.taken + tokens
    end
  end
  position = last + 1
end

-- Computes what is to be stored, before anything is.
for _, bucket in ipairs(decidable and buckets or {}) do
  local taken, expiration, request = bucket.taken, bucket.expiration, bucket.request
  if bucket.missing or bucket.changed or taken > 0 then
    local after, exact, full = {bucket.stored:sub(1, bucket.numbers + 11)}, bucket.consumed + taken < 2^53, 0
    for j, limit in ipairs(bucket) do
      local capacity, period, rate, size, part, last = limit[1], limit[2], limit[3], limit[4] - taken, limit[5], limit[6]
      if expiration > FIXED then
        -- include: everyday_wait
      end
      after[j + 1] = pack('>c8i8i8', last, size, part)
    end
    after[#after + 1] = pack('>i4i8', 1, bucket.consumed + taken) .. bucket.suffix
    bucket.after = table.concat(after)
    local ttl = -1
    if expiration == FIXED then
      ttl = unpack('>i8', request, 35)
    elseif expiration == AFTER_REFILL then
      -- This is rounded up: the bucket never expires before it is full.
      ttl = unpack('>i8', request, 35) + (full + -full % NANOS_PER_MILLISECOND) / NANOS_PER_MILLISECOND
      ttl = ttl < 1 and 1 or ttl
    elseif expiration ~= NO_EXPIRY then
      ttl = (full - full % NANOS_PER_MILLISECOND) / NANOS_PER_MILLISECOND
        + (bucket.same_when_new and MARGIN_MILLIS or IDLE_MILLIS)
    end
    bucket.ttl = ttl
    decidable = decidable and exact and ttl < 2^53
  end
end
if not decidable then
  reply[1] = 0
  return reply
end

local function store(i, condition)
  local bucket = buckets[i]
  if bucket.ttl > 0 then
    return redis.call('SET', KEYS[i], bucket.after, 'PX', format('%d', bucket.ttl), condition)
  end
  return redis.call('SET', KEYS[i], bucket.after, condition)
end

-- Buckets that are missing come first. Only these may be refused, where the value is empty; those that were made before
-- that are deleted, so that nothing has changed.
local made = {}
for i, bucket in ipairs(buckets) do
  if bucket.missing then
    if not store(i, 'NX') then
      for _, other in ipairs(made) do
        redis.call('DEL', other)
      end
      reply[1], reply[i + 1] = 0, ''
      return reply
    end
    made[#made + 1] = KEYS[i]
  end
end
for i, bucket in ipairs(buckets) do
  if not bucket.missing and bucket.after then
    store(i, 'XX')
  end
end
return reply
