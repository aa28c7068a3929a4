-- Runs operations on a bucket where it is stored: refills it, changes it, and stores the new state with its expiry.
--
-- KEYS[1]  key of the bucket
-- ARGV[1]  the request, whose parts follow each other:
--          the present time in nanoseconds since the epoch (i64); flags (u8), a sum of 1 for a strict request, 2 for a
--          count as the reply, and 4 where a missing bucket is not to be made; the kind of expiration (u8); whether a
--          configuration version is wanted (u8: 0, or 1 plus the number of the inheritance; 4 more: where the stored
--          version differs in the last 24 bits only, another period has begun, and tokens stay as they are); how many
--          operations there are (u16);
--          for each operation its number (u8), how many times it is run (u32), the tokens, 0 or more (i64), and a
--          further number (i64): for reserve the longest wait in nanoseconds, for cancel the tokens that were counted
--          as consumed right after the reservation, for raise an unfinished token, for replace which of the ARGV from
--          ARGV[2] on has its state, 0 for the first. In the place of the tokens, hold_back has nanoseconds and replace
--          the number of the inheritance. After cancel, one raise for each bandwidth gives back what the reservation
--          took beside its tokens;
--          the milliseconds of the expiration (i64); the configuration version that is wanted (i64);
--          a state, from which a missing bucket is made, with its initial sizes; its bandwidths begin at the present
--          time unless they are aligned. Its configuration and version replace those of a bucket whose version is lower
--          than the wanted one, or that has none
-- ARGV[2]  and further ones: states, whose configurations the operation replace puts in place
--
-- Reply: before, the state on which the operations were run, nil for a new bucket; with flag 2, where everything was
--        plain, the number of tokens that were consumed instead;
--        {before} when they were not run, and nothing was changed: the request is strict, and would not be sure to be
--        seen afterwards; or the bucket is missing and is not to be made; or its bytes (the first 16385 of them, if
--        there are more) are not those of a state as they would be written again: another format or length, more than
--        16384 bytes or 64 bandwidths, a flag other than 0 and 1, a count of numbers that is not three per bandwidth, a
--        character of an id that is written in a longer form than needed; or they are, but have two equal ids, or a
--        capacity, period or number of refill tokens below 1. A bucket that was made from valid limits has none of
--        these bytes.
--
-- A strict request is for one operation, try_consume. It is run only where it leaves a trace: the present time must be
-- later than the last refill of the first bandwidth, and becomes the last refill. Where the operation is run several
-- times, all of them are granted or none. So a caller that got no reply can repeat the request: it is run once,
-- whichever of the two arrives, and the state shows whether it was.
--
-- All numbers in a request and in a state are big-endian. The state that is stored at the end follows from `before` and
-- from the arguments: the state with all operations applied, if one of them has changed it or if the bucket is new, and
-- else still `before`.
--
-- A line `include` stands for a file beside this one, or for a text that is made of the list of operations; it is
-- replaced when the script is loaded. The everyday case comes before all else and makes no function, as making the
-- functions takes longer than deciding.

-- include: operation_numbers
local key, request = KEYS[1], ARGV[1]
local unpack, pack, format = struct.unpack, struct.pack, string.format
local LONGEST_STATE = '16384'
local STRICT, COUNTING, MUST_EXIST = 1, 2, 4
-- 0: no expiry, 1: fixed, 2: after refill, 3: automatic.
local NO_EXPIRY, FIXED, AFTER_REFILL = 0, 1, 2
-- An automatic expiration keeps a full bucket for the margin where a new one would be equal, and else for longer.
local MARGIN_MILLIS, IDLE_MILLIS = 10000, 30 * 86400000
local NANOS_PER_MILLISECOND = 1000000

-- This reads one byte more than a state may have, and so tells a value that is too long.
local before = redis.call('GETRANGE', key, '0', LONGEST_STATE)

local now_high, now_low, flags, expiration, wanted, operations = unpack('>i4I4BBBI2', request)
local strict, counting, must_exist = flags % 2 == STRICT, flags % 4 >= COUNTING, flags >= MUST_EXIST

-- include: token_bucket_everyday

-- 0: proportionally, 1: as they are, 2: none, 3: additively.
local INHERIT_PROPORTIONALLY, INHERIT_AS_IS, INHERIT_NOTHING, INHERIT_ADDITIVELY = 0, 1, 2, 3
-- What is added to these where versions have the number of a period in their last 24 bits.
local WITH_PERIODS, PERIODS = 4, 2^24
-- The server adds a time to live to the present time, and their sum must fit into 64 bits.
local LONGEST_TTL = 2^53
local MOST_BANDWIDTHS = 64
-- Where the first operation is, where what follows the operations is, and where the state is that follows that.
local FIRST_OPERATION = 14
local rules = FIRST_OPERATION + 21 * operations
local template = rules + 16
local floor, ceil = math.floor, math.ceil

if before == '' then
  -- The bucket is missing, or the value is empty: then the new bucket is not stored at the end, and the reply says so.
  before = false
end

-- include: numbers

local duration_high, duration_low, wanted_high, wanted_low = unpack('>i4I4i4I4', request, rules)
local now = whole(now_high, now_low)

-- include: token_bucket_state

local state
if before then
  state = decode(before)
elseif not must_exist then
  state = decode_template(request:sub(template))
end
if not state then
  return {before}
end

-- include: token_bucket

-- include: operation_functions

local function run(number, times, tokens, further)
  if number == TRY_CONSUME then
    return try_consume(tokens, times)
  end
  local operation = operation_functions[number]
  local changed = false
  for _ = 1, times do
    if not operation(tokens, further) then
      break
    end
    changed = true
  end
  return changed
end

-- Gives the time to live of the state, in milliseconds; 0 or less: it does not expire.
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
    -- The wait has wrapped.
    full = MAX
  end
  full = divided(full, NANOS_PER_MILLISECOND)
  return full + (same_when_new() and MARGIN_MILLIS or IDLE_MILLIS)
end

local first = state.bandwidths[1]
if strict and before and (first.intervally or not less(first.last, now)) then
  return {before}
end
for _, bandwidth in ipairs(state.bandwidths) do
  refill(bandwidth)
end
local changed = not before
if before and wanted ~= 0 and (not state.version or less(state.version, whole(wanted_high, wanted_low))) then
  local raised = decode_template(request:sub(template))
  if not raised then
    return {before}
  end
  local inheritance = wanted - 1
  if inheritance >= WITH_PERIODS then
    inheritance = inheritance - WITH_PERIODS
    if state.version then
      local high, low = halves(state.version)
      if high == wanted_high and floor(low / PERIODS) == floor(wanted_low / PERIODS) then
        inheritance = INHERIT_AS_IS
      end
    end
  end
  replace(raised, inheritance)
  state.version = raised.version
  for _, bandwidth in ipairs(state.bandwidths) do
    refill(bandwidth)
  end
  changed = true
end
for position = FIRST_OPERATION, rules - 1, 21 do
  local number, times, tokens_high, tokens_low, further_high, further_low = unpack('>BI4i4I4i4I4', request, position)
  if number == REPLACE then
    for _ = 1, times do
      local other = decode_template(ARGV[2 + further_low])
      if not other then
        return {before}
      end
      replace(other, tokens_low)
    end
    changed = true
  else
    local tokens = whole(tokens_high, tokens_low)
    local available = available_tokens()
    if strict and not less(available, tokens) and less(available, product(tokens, times)) then
      return {before}
    end
    changed = run(number, times, tokens, whole(further_high, further_low)) or changed
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
    stored = redis.call('SET', key, after, 'PX', format('%.0f', ttl), condition)
  else
    stored = redis.call('SET', key, after, condition)
  end
  if not stored then
    return {''}
  end
end
return before
