-- Runs operations on a bucket where it is stored: refills it, changes it, and stores what comes of it with its expiry.
--
-- KEYS[1]  key of the bucket
-- ARGV[1]  state from which a missing bucket is made, with its initial sizes; its bandwidths begin at the present time
--          unless they are aligned. Its configuration and version replace those of a bucket whose version is lower than
--          the wanted one, or that has none
-- ARGV[2]  kind of expiration (u8) and its milliseconds (i64); whether a configuration version is wanted (u8: 0, or 1
--          plus the number of the inheritance) and which one (i64); the present time in nanoseconds since the epoch
--          (i64); then for each operation its verb (u8), how many times it is run (u32), the tokens, 0 or more (i64),
--          and a further number (i64): of reserve the longest wait in nanoseconds, of cancel the tokens that were
--          counted as consumed right after the reservation, of raise an unfinished token, of replace the place of its
--          state, 0 for ARGV[4]. In the place of the tokens, hold_back has nanoseconds and replace the number of the
--          inheritance. What a reservation took beside its tokens follows its cancel, a raise for each bandwidth
-- ARGV[3]  1 where a missing bucket is not to be made; may be absent, as what follows
-- ARGV[4]  and further ones: states like ARGV[1], whose configurations the operation replace puts in place
--
-- Reply: {1, before} when the operations were run on the state `before`; nil: on a new bucket;
--        {0, before} when they were not, and nothing was changed: the bucket is missing and is not to be made, or its
--        bytes (the first 16385 of them, if there are more) are not those of a state as they would be written again:
--        another format or length, more than 16384 bytes or 64 bandwidths, a flag other than 0 and 1, a count of
--        numbers that is not three per bandwidth, a character of an id that is written in a longer form than needed;
--        or they are, but have two equal ids, or a capacity, period or number of refill tokens below 1. No bucket that
--        was made from valid limits is among them.
--
-- As in ARGV, numbers are big-endian. What is stored after `before` follows from it and from the arguments: the state
-- with all operations applied, if one of them has changed it or if the bucket is new, and else still `before`.
--
-- Numbers. Lua has doubles only, which hold every integer up to 2^53, whereas the state is made of signed 64-bit
-- integers that wrap. First comes the everyday case, in plain doubles: every integer in it, also between two steps, is
-- below 2^53, or else the case is left to the second part. There a number is a double if it is below 2^53 and else a
-- pair {high, low} for high * 2^32 + low, with high signed and low not; the functions that compute with numbers take
-- and give both kinds. Times are read in halves, as only differences of times fit into a double.
-- A quotient of integers below 2^53, rounded as doubles are, does not reach the next integer: floor() of it is exact.

local TRY_CONSUME, CONSUME_AS_MUCH_AS_POSSIBLE, RESERVE, GIVE_BACK, ADD, FORCE_ADD, RESET, BOOK = 1, 2, 3, 4, 5, 6, 7, 8
local HOLD_BACK, REPLACE, CANCEL, RAISE, CONSUME_IGNORING_RATE_LIMITS = 9, 10, 11, 12, 13
local INHERIT_PROPORTIONALLY, INHERIT_NOTHING, INHERIT_ADDITIVELY = 0, 2, 3  -- and 1, as they are
local NO_EXPIRY, FIXED, AFTER_REFILL = 0, 1, 2  -- and 3, automatic
local MARGIN_MILLIS, IDLE_MILLIS = 10000, 30 * 86400000  -- kept by an automatic expiration: as new when full, or not
local LONGEST_TTL = 2^53  -- a server adds it to the present time
local LONGEST_STATE, MOST_BANDWIDTHS = '16384', 64
local NANOS_PER_MILLISECOND = 1000000

local key, request = KEYS[1], ARGV[2]
local unpack, pack, floor, ceil = struct.unpack, struct.pack, math.floor, math.ceil

-- Of a longer value a byte more than a state may have is read.
local before = redis.call('GETRANGE', key, '0', LONGEST_STATE)

-- The everyday case: tokens that are consumed if they are there, from one greedy bandwidth without id.

if (#before == 107 or #before == 116) and #request == 47 then
  local expiration, duration, wanted, wanted_version, now_high, now_low, verb, times, tokens =
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

  if verb == TRY_CONSUME and tokens >= 1 and tokens < 2^53 and elapsed < 2^53
    and state_format == format and configuration_format == 1 and bandwidths == 1 and bandwidth_format == 1
    and arithmetic == 3 and numbers_format == 1 and count == 3 and statistics_format == 1
    and (wanted == 0 or format == 2 and version >= wanted_version and version < 2^53 and wanted_version > -2^53)
    and intervally == 0 and adaptive == 0 and has_id == 0
    and first == -2^63  -- not aligned; and a 32-bit server, whose `i8` is cut off, has no everyday case
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
      local full = 0  -- the wait until the bucket is full, in milliseconds
      if size < capacity then
        local missing = capacity - size
        local needed = period * missing
        if needed < 2^53 then
          full = floor((needed - unfinished) / rate) / NANOS_PER_MILLISECOND
        elseif needed < 2^62 then
          -- Off by less than 2^-8, as it is below 2^43: certain if no whole number is that near.
          full = (needed - unfinished) / rate / NANOS_PER_MILLISECOND
          exact = exact and full % 1 > 2^-8 and full % 1 < 1 - 2^-8
        else
          full = floor(missing / rate * period) / NANOS_PER_MILLISECOND  -- as the product overflows
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

-- Every other case. First the arithmetic of doubles and pairs.

if before == '' then
  -- The bucket is missing; or empty, which is found when a new bucket is not stored.
  before = false
end

-- An operator on a pair gives not-a-number, so that one comparison finds both what is too large and what is a pair.
local function not_a_number()
  return 0 / 0
end
local PAIR = {__add = not_a_number, __sub = not_a_number, __mul = not_a_number, __mod = not_a_number}

function PAIR.__eq(x, y)  -- a pair never equals a double, as whole() makes pairs only of what does not fit into one
  return x[1] == y[1] and x[2] == y[2]
end

local function whole(high, low)  -- what exceeds 64 bits is cut off
  high = (high + 2^31) % 2^32 - 2^31
  local double = high * 2^32 + low
  if double > -2^53 and double < 2^53 then
    return double
  end
  return setmetatable({high, low}, PAIR)
end

local MAX, MIN = whole(2^31 - 1, 2^32 - 1), whole(-2^31, 0)

local function halves(x)
  if type(x) == 'table' then
    return x[1], x[2]
  end
  local high = floor(x / 2^32)
  return high, x - high * 2^32
end

local function rounded(x)  -- as a double, half to even: the sum is the one operation that rounds
  return type(x) == 'table' and x[1] * 2^32 + x[2] or x
end

local function from_integral(double)  -- at most 2^63 either way
  local high = floor(double / 2^32)
  return whole(high, double - high * 2^32)
end

local function truncated(double)  -- within 64 bits
  if double >= 2^63 then
    return MAX
  elseif double <= -2^63 then
    return MIN
  end
  return from_integral(double < 0 and -floor(-double) or floor(double))
end

local function less(x, y)
  local double = x - y
  if double == double then
    return double < 0
  end
  local x_high, x_low = halves(x)
  local y_high, y_low = halves(y)
  return x_high < y_high or x_high == y_high and x_low < y_low
end

local function sum(x, y)
  local double = x + y
  if double > -2^53 and double < 2^53 then
    return double
  end
  local x_high, x_low = halves(x)
  local y_high, y_low = halves(y)
  local low = x_low + y_low
  return whole(x_high + y_high + floor(low / 2^32), low % 2^32)
end

local function difference(x, y)
  local double = x - y
  if double > -2^53 and double < 2^53 then
    return double
  end
  local x_high, x_low = halves(x)
  local y_high, y_low = halves(y)
  local low = x_low - y_low
  return whole(x_high - y_high + floor(low / 2^32), low % 2^32)
end

local function low_half(x, y)  -- of the product of two halves
  local x_low = x % 2^16
  local x_high = (x - x_low) / 2^16
  return (x_high * y % 2^16 * 2^16 + x_low * y) % 2^32
end

local function product(x, y)
  local double = x * y
  if double > -2^53 and double < 2^53 then
    return double
  end
  local x_high, x_low = halves(x)
  local y_high, y_low = halves(y)
  -- x_low * y_low = upper * 2^16 + lower, both of 48 bits
  local x_lowest = x_low % 2^16
  local upper = (x_low - x_lowest) / 2^16 * y_low
  local lower = x_lowest * y_low + upper % 2^16 * 2^16
  local high = floor(upper / 2^16) + floor(lower / 2^32) + low_half(x_high, y_low) + low_half(y_high, x_low)
  return whole(high, lower % 2^32)
end

local function saturating_product(x, y)  -- MAX where it does not fit, also when it is too small
  local double = x * y
  if double > -2^53 and double < 2^53 then
    return double
  end
  double = rounded(x) * rounded(y)
  if double >= 2^64 or double <= -2^64 then
    return MAX
  end
  local wrapped = product(x, y)
  -- Below twice what fits, one that has wrapped has the wrong sign.
  return (double < 0) == less(wrapped, 0) and wrapped or MAX
end

-- x / y truncated toward zero, and x % y with the sign of x; y is above 0.
local function divided(x, y)
  local left = x % y
  if left == left then
    if x < 0 then
      left = math.fmod(x, y)
    end
    return (x - left) / y, left
  end
  -- The doubles tell the quotient nearly; the next round divides what was wrong with it.
  local quotient
  quotient, left = 0, x
  while less(left, 0) or not less(left, y) do
    local estimate = from_integral(floor(rounded(left) / rounded(y)))
    quotient = sum(quotient, estimate)
    left = difference(left, product(estimate, y))
  end
  if less(x, 0) and left ~= 0 then
    return sum(quotient, 1), difference(left, y)
  end
  return quotient, left
end

local expiration, duration_high, duration_low, wanted, wanted_high, wanted_low, now_high, now_low =
  unpack('>Bi4I4Bi4I4i4I4', request)
local now = whole(now_high, now_low)

-- The state, or nil where it cannot be read. A bandwidth holds its numbers too; the configuration stays in bytes.
local function decode(bytes)
  local length, position = #bytes, 13
  if length < position - 1 or length > tonumber(LONGEST_STATE) then
    return nil
  end
  local state_format, configuration_format, n = unpack('>i4i4i4', bytes)
  if state_format < 1 or state_format > 2 or configuration_format ~= 1 or n < 1 or n > MOST_BANDWIDTHS then
    return nil
  end
  local bandwidths, ids = {}, {}
  for i = 1, n do
    if length < position + 46 then
      return nil
    end
    local format, capacity_high, capacity_low, initial_high, initial_low, period_high, period_low,
      tokens_high, tokens_low, intervally, first_high, first_low, adaptive, has_id =
      unpack('>i4i4I4i4I4i4I4i4I4Bi4I4BB', bytes, position)
    local bandwidth = {
      capacity = whole(capacity_high, capacity_low),
      initial = whole(initial_high, initial_low),
      period = whole(period_high, period_low),
      tokens = whole(tokens_high, tokens_low),
      intervally = intervally == 1,
      aligned = first_high ~= -2^31 or first_low ~= 0,
      adaptive = adaptive == 1,
      last = 0, size = 0, rounding_error = 0,
    }
    if format ~= 1 or intervally > 1 or adaptive > 1 or has_id > 1
      or less(bandwidth.capacity, 1) or less(bandwidth.period, 1) or less(bandwidth.tokens, 1) then
      return nil
    end
    position = position + 47
    if has_id == 1 then
      local id_end = length > position and position + 1 + unpack('>I2', bytes, position)
      local id = id_end and id_end <= length and bytes:sub(position + 2, id_end)
      local characters = id
      if id and id:find('[^\1-\127]') then
        -- Each valid character that could not be written in fewer bytes becomes one letter. No byte that begins a
        -- character can continue one, so that a letter never completes another character.
        characters = id:gsub('\192\128', 'x'):gsub('[\194-\223][\128-\191]', 'x')
        characters = characters:gsub('\224[\160-\191][\128-\191]', 'x'):gsub('[\225-\239][\128-\191][\128-\191]', 'x')
      end
      if not id or ids[id] or characters:find('[^\1-\127]') then
        return nil
      end
      ids[id] = true
      bandwidth.id = id
      position = id_end + 1
    end
    bandwidths[i] = bandwidth
  end
  local configuration = bytes:sub(5, position - 1)

  -- Where there is no version there has to be room for one.
  if length < position + 12 + 24 * n + 12 - 1 or position + 12 + 24 * n + 12 + 8 > tonumber(LONGEST_STATE) then
    return nil
  end
  local arithmetic, numbers_format, count = unpack('>i4i4i4', bytes, position)
  if arithmetic ~= 3 or numbers_format ~= 1 or count ~= 3 * n then
    return nil
  end
  position = position + 12
  for _, bandwidth in ipairs(bandwidths) do
    local last_high, last_low, size_high, size_low, error_high, error_low = unpack('>i4I4i4I4i4I4', bytes, position)
    bandwidth.last = whole(last_high, last_low)
    bandwidth.size = whole(size_high, size_low)
    bandwidth.rounding_error = whole(error_high, error_low)
    position = position + 24
  end

  local statistics_format, consumed_high, consumed_low = unpack('>i4i4I4', bytes, position)
  position = position + 12
  local has_version, version = 0, nil
  if state_format == 2 then
    has_version = bytes:byte(position)
    if has_version == 1 and length >= position + 8 then
      version = whole(unpack('>i4I4', bytes, position + 1))
    end
  end
  if statistics_format ~= 1 or state_format == 2 and has_version ~= 0 and not version then
    return nil
  end
  return {
    configuration = configuration,
    bandwidths = bandwidths,
    consumed = whole(consumed_high, consumed_low),
    version = version,
  }
end

local function i64(x)
  return pack('>i4I4', halves(x))
end

local function encode(state)
  local format, count = state.version and 2 or 1, 3 * #state.bandwidths
  local parts = {pack('>i4', format), state.configuration, pack('>i4i4i4', 3, 1, count)}
  for _, bandwidth in ipairs(state.bandwidths) do
    parts[#parts + 1] = i64(bandwidth.last) .. i64(bandwidth.size) .. i64(bandwidth.rounding_error)
  end
  parts[#parts + 1] = pack('>i4', 1) .. i64(state.consumed) .. (state.version and '\1' .. i64(state.version) or '')
  return table.concat(parts)
end

-- A state from which a bucket is made, or its limits replaced; nil where it cannot be read.
local function decode_template(bytes)
  local template = decode(bytes)
  for _, bandwidth in ipairs(template and template.bandwidths or {}) do
    if not bandwidth.aligned then
      bandwidth.last = now
    end
  end
  return template
end

local state
if before then
  state = decode(before)
elseif ARGV[3] ~= '1' then
  state = decode_template(ARGV[1])
end
if not state then
  return {0, before}
end

-- Time. The steps are those of the format, and all sums, differences and plain products wrap.

local function fill(bandwidth)
  bandwidth.size, bandwidth.rounding_error = bandwidth.capacity, 0
end

local function refill(bandwidth)
  local last, size, period, tokens = bandwidth.last, bandwidth.size, bandwidth.period, bandwidth.tokens
  local time = now
  if not less(last, time) then
    return
  end
  if bandwidth.intervally then
    local _, since = divided(difference(time, last), period)
    time = difference(time, since)  -- the end of the last whole period
    if not less(last, time) then
      return
    end
  end
  bandwidth.last = time
  if not less(size, bandwidth.capacity) then
    return
  end
  local elapsed = difference(time, last)
  local new_size = size
  if less(period, elapsed) then
    local periods, left = divided(elapsed, period)
    new_size = sum(size, product(periods, tokens))
    if less(bandwidth.capacity, new_size) or less(new_size, size) then
      return fill(bandwidth)
    end
    elapsed = left
  end
  local gained = saturating_product(tokens, elapsed)
  local unfinished = sum(gained, bandwidth.rounding_error)
  local whole_tokens
  if gained == MAX or less(unfinished, 0) then
    whole_tokens, unfinished = truncated(rounded(elapsed) / rounded(period) * rounded(tokens)), 0
  else
    whole_tokens, unfinished = divided(unfinished, period)
  end
  new_size = sum(new_size, whole_tokens)
  if not less(new_size, bandwidth.capacity) or less(new_size, size) then
    return fill(bandwidth)
  end
  bandwidth.size, bandwidth.rounding_error = new_size, unfinished
end

local function wait_for(bandwidth, missing)
  local period, tokens = bandwidth.period, bandwidth.tokens
  if not bandwidth.intervally then
    local needed = saturating_product(period, missing)
    if needed == MAX then
      return truncated(rounded(missing) / rounded(tokens) * rounded(period))
    end
    return (divided(difference(needed, bandwidth.rounding_error), tokens))
  end
  local to_next_refill = difference(sum(bandwidth.last, period), now)
  if not less(tokens, missing) then
    return to_next_refill
  end
  missing = difference(missing, tokens)
  if less(missing, tokens) then
    return sum(to_next_refill, period)
  end
  local periods, left = divided(missing, tokens)
  local further = saturating_product(left == 0 and periods or sum(periods, 1), period)
  local wait = sum(further, to_next_refill)
  return further ~= MAX and not less(wait, 0) and wait or MAX
end

local function largest_wait(wait_of, tokens)
  local largest
  for _, bandwidth in ipairs(state.bandwidths) do
    local wait = wait_of(bandwidth, tokens)
    if not largest or less(largest, wait) then
      largest = wait
    end
  end
  return largest
end

local function wait_until(bandwidth, tokens)
  if not less(bandwidth.size, tokens) then
    return 0
  end
  local missing = difference(tokens, bandwidth.size)
  return less(0, missing) and wait_for(bandwidth, missing) or MAX
end

local function wait_until_full(bandwidth)
  if not less(bandwidth.size, bandwidth.capacity) then
    return 0
  end
  return wait_for(bandwidth, difference(bandwidth.capacity, bandwidth.size))
end

-- The operations. Each tells whether it has changed the state; one that has not would not the next time either.

local function available_tokens()
  local smallest
  for _, bandwidth in ipairs(state.bandwidths) do
    if not smallest or less(bandwidth.size, smallest) then
      smallest = bandwidth.size
    end
  end
  return smallest
end

local function consume(tokens)
  state.consumed = sum(state.consumed, tokens)
  for _, bandwidth in ipairs(state.bandwidths) do
    bandwidth.size = difference(bandwidth.size, tokens)
  end
  return true
end

local function try_consume(tokens, times)  -- all repetitions at once
  local available = available_tokens()
  if less(available, tokens) then
    return false
  end
  local most = tokens == 0 and times or divided(available, tokens)
  return consume(product(tokens, less(most, times) and most or times))
end

local function consume_as_much_as_possible(limit)
  local available = available_tokens()
  local tokens = less(available, limit) and available or limit
  return less(0, tokens) and consume(tokens)
end

-- Lowers a bandwidth so that it holds no more than its capacity less the tokens when the wait is over.
local function lower(bandwidth, tokens, wait)
  local period, last = bandwidth.period, bandwidth.last
  local room = less(tokens, bandwidth.capacity) and difference(bandwidth.capacity, tokens) or 0
  local elapsed = wait
  if bandwidth.intervally then
    elapsed = sum(difference(now, last), wait)
  elseif less(now, last) then
    elapsed = difference(wait, difference(last, now))
  end
  if less(elapsed, 0) then
    elapsed = 0
  end
  local periods, rest = divided(elapsed, period)
  local gained = saturating_product(periods, bandwidth.tokens)
  local unfinished = 0
  if bandwidth.intervally then
    unfinished = bandwidth.rounding_error
  else
    local part = saturating_product(rest, bandwidth.tokens)
    local more
    if part == MAX then
      -- A refill computes it in doubles as well, and rounds it down.
      more = sum(truncated(rounded(rest) / rounded(period) * rounded(bandwidth.tokens)), 1)
      more = less(more, 0) and MAX or more
    else
      more, unfinished = divided(part, period)
      if unfinished ~= 0 then
        more, unfinished = sum(more, 1), difference(period, unfinished)
      end
    end
    gained = sum(gained, more)
    if less(gained, 0) then
      gained = MAX
    end
  end
  local size = difference(room, gained)
  if less(size, bandwidth.size) or size == bandwidth.size and less(unfinished, bandwidth.rounding_error) then
    bandwidth.size, bandwidth.rounding_error = size, unfinished
  end
end

local function reserve(tokens, longest_wait)
  local wait = largest_wait(wait_until, tokens)
  if wait == MAX or less(longest_wait, wait) then
    return false
  end
  consume(tokens)
  if less(0, wait) and #state.bandwidths > 1 then
    for _, bandwidth in ipairs(state.bandwidths) do
      lower(bandwidth, tokens, wait)
    end
  end
  return true
end

local function consume_ignoring_rate_limits(tokens)
  return largest_wait(wait_until, tokens) ~= MAX and consume(tokens)
end

local function book(tokens)  -- in debt if need be, down to MIN
  local available = available_tokens()
  if less(available, 0) then
    local room = difference(available, MIN)
    tokens = less(room, tokens) and room or tokens
  end
  return less(0, tokens) and consume(tokens)
end

-- Puts tokens and an unfinished one into a bandwidth, up to `most`; no size gets smaller.
local function raise(bandwidth, tokens, unfinished, most)
  if not less(bandwidth.size, most) then
    return
  end
  local size = sum(bandwidth.size, tokens)
  unfinished = sum(bandwidth.rounding_error, unfinished)
  if not less(unfinished, bandwidth.period) then
    size, unfinished = sum(size, 1), difference(unfinished, bandwidth.period)
  end
  if less(size, bandwidth.size) or not less(size, most) then
    size, unfinished = most, 0
  end
  bandwidth.size, bandwidth.rounding_error = size, unfinished
end

local function give_back(tokens, later)
  state.consumed = difference(state.consumed, tokens)
  for _, bandwidth in ipairs(state.bandwidths) do
    raise(bandwidth, tokens, 0, difference(bandwidth.capacity, later))
  end
  return true
end

-- Bandwidths that have got back what the cancelled reservation took beside its tokens; nil where they must not.
local raised

local function cancel(tokens, noted)
  local later = difference(state.consumed, noted)
  if less(0, later) then
    raised = nil
    return not less(available_tokens(), 0) and give_back(tokens, later)
  end
  raised = 0
  return give_back(tokens, 0)
end

local function raise_next(tokens, unfinished)
  if not raised then
    return false
  end
  raised = raised + 1
  local bandwidth = state.bandwidths[raised]
  if bandwidth then
    raise(bandwidth, tokens, unfinished, bandwidth.capacity)
  end
  return true
end

local function add(tokens)
  for _, bandwidth in ipairs(state.bandwidths) do
    local size = sum(bandwidth.size, tokens)
    if not less(size, bandwidth.capacity) or less(size, bandwidth.size) then
      fill(bandwidth)
    else
      bandwidth.size = size
    end
  end
  return true
end

local function force_add(tokens)
  for _, bandwidth in ipairs(state.bandwidths) do
    local size = sum(bandwidth.size, tokens)
    if less(size, bandwidth.size) then
      bandwidth.size, bandwidth.rounding_error = MAX, 0
    else
      bandwidth.size = size
    end
  end
  return true
end

local function reset()
  for _, bandwidth in ipairs(state.bandwidths) do
    fill(bandwidth)
  end
  return true
end

-- In what follows functions are within functions: to make them all for each decision would take as long as the decision.

local function hold_back(nanos)
  if not less(largest_wait(wait_until, 1), nanos) then
    return false
  end

  -- Holding back multiplies what has 64 bits, and compares the products. Its numbers have 144 bits: six digits to the
  -- base 2^24, the lowest first, negative where the highest digit is 2^23 or more. No sum of products of digits reaches
  -- 2^53.
  local WIDE = {}

  local function wide_from(digits)
    -- Takes digits of any size, or below 0; what exceeds 144 bits is cut off.
    local carry = 0
    for i = 1, 6 do
      local digit = digits[i] + carry
      carry = floor(digit / 2^24)
      digits[i] = digit - carry * 2^24
    end
    return setmetatable(digits, WIDE)
  end

  local function wide(x)
    -- Takes a pair, or any integer that a double holds.
    if type(x) == 'table' then
      return wide_from({x[2], x[1] * 2^8, 0, 0, 0, 0})
    end
    return wide_from({x, 0, 0, 0, 0, 0})
  end

  local function narrow(x)  -- within 64 bits
    local above = floor(x[2] / 2^8)
    return whole(x[3] * 2^16 + above, (x[2] - above * 2^8) * 2^24 + x[1])
  end

  local function is_negative(x)
    return x[6] >= 2^23
  end

  function WIDE.__add(x, y)
    return wide_from({x[1] + y[1], x[2] + y[2], x[3] + y[3], x[4] + y[4], x[5] + y[5], x[6] + y[6]})
  end

  function WIDE.__sub(x, y)
    return wide_from({x[1] - y[1], x[2] - y[2], x[3] - y[3], x[4] - y[4], x[5] - y[5], x[6] - y[6]})
  end

  function WIDE.__mul(x, y)
    local digits = {0, 0, 0, 0, 0, 0}
    for i = 1, 6 do
      for j = 1, 7 - i do
        digits[i + j - 1] = digits[i + j - 1] + x[i] * y[j]
      end
    end
    return wide_from(digits)
  end

  function WIDE.__lt(x, y)
    return is_negative(x - y)
  end

  local function nearly(x)  -- as a double
    local double = is_negative(x) and x[6] - 2^24 or x[6]
    for i = 5, 1, -1 do
      double = double * 2^24 + x[i]
    end
    return double
  end

  -- x / y rounded down, and what is left; y is above 0. As in divided(), each round divides what was wrong with the
  -- last.
  local function floor_divided(x, y)
    local quotient, left = wide(0), x
    while is_negative(left) or not (left < y) do
      local estimate = floor(nearly(left) / nearly(y))
      estimate = wide(estimate == 0 and 1 or estimate)
      quotient = quotient + estimate
      left = left - estimate * y
    end
    return quotient, left
  end

  local LARGEST_DEBT = wide(sum(MIN, 2))

  -- The wait that a bandwidth can make of a wanted one, in how long it regains what that takes, its size and its error.
  local function way_to_hold_back(bandwidth, nanos)
    local period, tokens = wide(bandwidth.period), wide(bandwidth.tokens)
    local size, rounding_error = wide(bandwidth.size), wide(bandwidth.rounding_error)
    local wait, new_size, new_error = nanos, size, rounding_error
    if bandwidth.intervally then
      local to_next_refill = wide(bandwidth.last) + period - wide(now)
      local periods = wide(0) - floor_divided(to_next_refill - nanos, period)
      if is_negative(periods) then
        periods = wide(0)
      end
      wait = to_next_refill + periods * period
      local debt = wide(0) - periods * tokens
      if debt < size then
        new_size = debt
      end
      if new_size < LARGEST_DEBT then
        new_size = LARGEST_DEBT
      end
    else
      local level, highest = size * period + rounding_error, period - nanos * tokens
      new_size, new_error = floor_divided(highest < level and highest or level, period)
      if new_size < LARGEST_DEBT then
        new_size, new_error = LARGEST_DEBT, wide(0)
      end
    end
    local taken = (size - new_size) * period + rounding_error - new_error
    return wait, floor_divided(taken, tokens), new_size, new_error
  end

  local held, least_wait, least_regaining, its_size, its_error
  for _, bandwidth in ipairs(state.bandwidths) do
    local wait, regaining, size, rounding_error = way_to_hold_back(bandwidth, wide(nanos))
    if not held or wait < least_wait or not (least_wait < wait) and regaining < least_regaining then
      held, least_wait, least_regaining, its_size, its_error = bandwidth, wait, regaining, size, rounding_error
    end
  end
  held.size, held.rounding_error = narrow(its_size), narrow(its_error)
  return true
end

-- Gives the bucket the configuration and the bandwidths of the state `new`, which itself stays as it is. The order of
-- the computations is that of the format: in another order, doubles would round differently.
local function replace(new, inheritance)
  local function inherit_proportionally(old, new)
    if not less(old.size, old.capacity) then
      return fill(new)
    end
    local held = rounded(old.size) + rounded(old.rounding_error) / rounded(old.period)
    local exact = held * (rounded(new.capacity) / rounded(old.capacity))
    local size = truncated(exact)
    if not less(size, new.capacity) then
      return fill(new)
    end
    local fraction = exact - rounded(size)
    if size == MIN then
      fraction = 0
    elseif exact < 0 and fraction ~= 0 then
      -- This rounds the debt up, and keeps the part of a token.
      size = difference(size, 1)
      fraction = fraction + 1
    end
    new.size = size
    new.rounding_error = new.intervally and 0 or truncated(fraction * rounded(new.period))
  end

  local function inherit_tokens(old, new, additively)
    local grown = 0
    if additively and less(old.capacity, new.capacity) then
      grown = difference(new.capacity, old.capacity)
    end
    if not less(old.size, difference(new.capacity, grown)) then
      -- The sum might not fit into 64 bits.
      return fill(new)
    end
    new.size = sum(old.size, grown)
    if old.intervally or new.intervally then
      new.rounding_error = 0
      return
    end
    local scaled = product(truncated(rounded(new.period) / rounded(old.period)), old.rounding_error)
    local most = difference(new.period, 1)
    new.rounding_error = less(scaled, most) and scaled or most
  end

  local function has_several_without_id(limits)
    local count = 0
    for _, bandwidth in ipairs(limits.bandwidths) do
      if not bandwidth.id then
        count = count + 1
      end
    end
    return count > 1
  end

  local match_without_id = not has_several_without_id(state) and not has_several_without_id(new)
  local predecessors = {}
  for _, bandwidth in ipairs(state.bandwidths) do
    predecessors[bandwidth.id or match_without_id and 1 or bandwidth] = bandwidth
  end
  for _, bandwidth in ipairs(inheritance == INHERIT_NOTHING and {} or new.bandwidths) do
    local old = predecessors[bandwidth.id or 1]
    if old then
      bandwidth.last = old.last
      if inheritance == INHERIT_PROPORTIONALLY then
        inherit_proportionally(old, bandwidth)
      else
        inherit_tokens(old, bandwidth, inheritance == INHERIT_ADDITIVELY)
      end
    end
  end
  state.configuration, state.bandwidths = new.configuration, new.bandwidths
end

local verbs = {
  [CONSUME_AS_MUCH_AS_POSSIBLE] = consume_as_much_as_possible,
  [RESERVE] = reserve,
  [GIVE_BACK] = function(tokens) return give_back(tokens, 0) end,
  [ADD] = add,
  [FORCE_ADD] = force_add,
  [RESET] = reset,
  [BOOK] = book,
  [HOLD_BACK] = hold_back,
  [CANCEL] = cancel,
  [RAISE] = raise_next,
  [CONSUME_IGNORING_RATE_LIMITS] = consume_ignoring_rate_limits,
}

local function run(verb, times, tokens, further)
  if verb == TRY_CONSUME then
    return try_consume(tokens, times)
  end
  local operation = verbs[verb]
  local changed = false
  for _ = 1, times do
    if not operation(tokens, further) then
      break
    end
    changed = true
  end
  return changed
end

local function same_when_new()
  for _, bandwidth in ipairs(state.bandwidths) do
    local capacity, initial = bandwidth.capacity, bandwidth.initial
    if initial ~= capacity or less(capacity, bandwidth.size) or bandwidth.adaptive then
      return false
    end
  end
  return true
end

local function ttl_millis()
  local duration = whole(duration_high, duration_low)
  if expiration == NO_EXPIRY then
    return -1
  elseif expiration == FIXED then
    return duration
  end
  local full = largest_wait(wait_until_full)
  if expiration == AFTER_REFILL then
    local millis, part = divided(full, NANOS_PER_MILLISECOND)
    -- This is rounded up: the bucket never expires before it is full.
    local ttl = sum(duration, less(0, part) and sum(millis, 1) or millis)
    return less(0, ttl) and ttl or 1
  end
  if less(full, 0) then
    full = MAX  -- it has wrapped
  end
  full = divided(full, NANOS_PER_MILLISECOND)
  return full + (same_when_new() and MARGIN_MILLIS or IDLE_MILLIS)
end

for _, bandwidth in ipairs(state.bandwidths) do
  refill(bandwidth)
end
local changed = not before
if before and wanted ~= 0 and (not state.version or less(state.version, whole(wanted_high, wanted_low))) then
  local template = decode_template(ARGV[1])
  if not template then
    return {0, before}
  end
  replace(template, wanted - 1)
  state.version = template.version
  for _, bandwidth in ipairs(state.bandwidths) do
    refill(bandwidth)
  end
  changed = true
end
for position = 27, #request, 21 do
  local verb, times, tokens_high, tokens_low, further_high, further_low = unpack('>BI4i4I4i4I4', request, position)
  if verb == REPLACE then
    for _ = 1, times do
      local template = decode_template(ARGV[4 + further_low])
      if not template then
        return {0, before}
      end
      replace(template, tokens_low)
    end
    changed = true
  else
    changed = run(verb, times, whole(tokens_high, tokens_low), whole(further_high, further_low)) or changed
  end
end
if changed then
  local ttl = ttl_millis()
  if not less(ttl, LONGEST_TTL) then
    ttl = LONGEST_TTL
  end
  local after, condition = encode(state), before and 'XX' or 'NX'
  local stored
  if less(0, ttl) then
    stored = redis.call('SET', key, after, 'PX', string.format('%.0f', ttl), condition)
  else
    stored = redis.call('SET', key, after, condition)
  end
  if not stored then
    return {0, ''}
  end
end
return {1, before}
