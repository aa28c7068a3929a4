-- Runs operations on a bucket where it is stored: refills it, changes it, and stores the new state with its expiry.
--
-- KEYS[1]  key of the bucket
-- ARGV[1]  state from which a missing bucket is made, with its initial sizes; its bandwidths begin at the present time
--          unless they are aligned. Its configuration and version replace those of a bucket whose version is lower than
--          the wanted one, or that has none
-- ARGV[2]  kind of expiration (u8) and its milliseconds (i64); whether a configuration version is wanted (u8: 0, or 1
--          plus the number of the inheritance) and which one (i64); the present time in nanoseconds since the epoch
--          (i64); then for each operation its number (u8), how many times it is run (u32), the tokens, 0 or more (i64),
--          and a further number (i64): for reserve the longest wait in nanoseconds, for cancel the tokens that were
--          counted as consumed right after the reservation, for raise an unfinished token, for replace the place of its
--          state, 0 for ARGV[4]. In the place of the tokens, hold_back has nanoseconds and replace the number of the
--          inheritance. After cancel, one raise for each bandwidth gives back what the reservation took beside its
--          tokens
-- ARGV[3]  1 where a missing bucket is not to be made; it may be absent, as may what follows
-- ARGV[4]  and further ones: states like ARGV[1], whose configurations the operation replace puts in place
--
-- Reply: {1, before} when the operations were run on the state `before`, or on a new bucket where that is nil;
--        {0, before} when they were not, and nothing was changed: the bucket is missing and is not to be made, or its
--        bytes (the first 16385 of them, if there are more) are not those of a state as they would be written again:
--        another format or length, more than 16384 bytes or 64 bandwidths, a flag other than 0 and 1, a count of
--        numbers that is not three per bandwidth, a character of an id that is written in a longer form than needed;
--        or they are, but have two equal ids, or a capacity, period or number of refill tokens below 1. A bucket that
--        was made from valid limits has none of these bytes.
--
-- The numbers in ARGV and in a state are big-endian. The state that is stored at the end follows from `before` and from
-- the arguments: the state with all operations applied, if one of them has changed it or if the bucket is new, and
-- else still `before`.
--
-- A line `include` stands for a file beside this one, or for a text that is made of the list of operations; it is replaced
-- when the script is loaded. The everyday case comes before all else and makes no function, as making the functions
-- takes longer than deciding.

-- include: operation_numbers
-- 0: proportionally, 1: as they are, 2: none, 3: additively.
local INHERIT_PROPORTIONALLY, INHERIT_NOTHING, INHERIT_ADDITIVELY = 0, 2, 3
-- 0: no expiry, 1: fixed, 2: after refill, 3: automatic.
local NO_EXPIRY, FIXED, AFTER_REFILL = 0, 1, 2
-- An automatic expiration keeps a full bucket for the margin where a new one would be equal, and else for longer.
local MARGIN_MILLIS, IDLE_MILLIS = 10000, 30 * 86400000
-- The server adds a time to live to the present time, and their sum must fit into 64 bits.
local LONGEST_TTL = 2^53
local LONGEST_STATE, MOST_BANDWIDTHS = '16384', 64
local NANOS_PER_MILLISECOND = 1000000

local key, request = KEYS[1], ARGV[2]
local unpack, pack, floor, ceil = struct.unpack, struct.pack, math.floor, math.ceil

-- This reads one byte more than a state may have, and so tells a value that is too long.
local before = redis.call('GETRANGE', key, '0', LONGEST_STATE)

-- include: token_bucket_everyday

if before == '' then
  -- The bucket is missing, or the value is empty: then the new bucket is not stored at the end, and the reply says so.
  before = false
end

-- include: numbers

local expiration, duration_high, duration_low, wanted, wanted_high, wanted_low, now_high, now_low =
  unpack('>Bi4I4Bi4I4i4I4', request)
local now = whole(now_high, now_low)

-- include: token_bucket_state

local state
if before then
  state = decode(before)
elseif ARGV[3] ~= '1' then
  state = decode_template(ARGV[1])
end
if not state then
  return {0, before}
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
  local number, times, tokens_high, tokens_low, further_high, further_low = unpack('>BI4i4I4i4I4', request, position)
  if number == REPLACE then
    for _ = 1, times do
      local template = decode_template(ARGV[4 + further_low])
      if not template then
        return {0, before}
      end
      replace(template, tokens_low)
    end
    changed = true
  else
    changed = run(number, times, whole(tokens_high, tokens_low), whole(further_high, further_low)) or changed
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
