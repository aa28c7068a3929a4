-- Decides the everyday case of two bandwidths.
--
-- Uses    what token_bucket_everyday uses; stored, length, missing, times, tokens
-- Offers  nothing: either it returns the reply of the script, or what follows decides
-- To      token_bucket_everyday

-- `fixed` and `fixed_2` hold what is alike in all such states; see everyday_one.
local formats, counts, capacity, initial, period, rate, fixed,
  format_2, capacity_2, initial_2, period_2, rate_2, fixed_2,
  last_high, last_low, size, part, last_high_2, last_low_2, size_2, part_2, statistics, consumed =
  unpack('>i8i8i8i8i8i8c11i4i8i8i8i8c23i4I4i8i8i4I4i8i8i4i8', stored)
if missing then
  -- A new bucket begins now.
  last_high, last_low, last_high_2, last_low_2 = now_high, now_low, now_high, now_low
end
local elapsed = (now_high - last_high) * 2^32 + (now_low - last_low)
local elapsed_2 = (now_high - last_high_2) * 2^32 + (now_low - last_low_2)
local exact = counts == 2 * 2^32 + 1 and fixed == '\0\128\0\0\0\0\0\0\0\0\0' and format_2 == 1
  and fixed_2 == '\0\128\0\0\0\0\0\0\0\0\0\0\0\0\3\0\0\0\1\0\0\0\6'
  and statistics == 1 and consumed > -2^53 and consumed + tokens * times < 2^53
  and capacity >= 1 and capacity < 2^53 and period < 2^53 and rate >= 1 and rate < 2^53
  and size <= capacity and size > -2^53 and part >= 0 and part < period and elapsed < 2^53
  and capacity_2 >= 1 and capacity_2 < 2^53 and period_2 < 2^53 and rate_2 >= 1 and rate_2 < 2^53
  and size_2 <= capacity_2 and size_2 > -2^53 and part_2 >= 0 and part_2 < period_2 and elapsed_2 < 2^53
-- include: everyday_version
if exact and elapsed <= 0 and strict and not missing then
  return {before}
end
local last = (elapsed > 0 or missing) and request or stored:sub(119)
local last_2 = (elapsed_2 > 0 or missing) and request or stored:sub(143)
local same_when_new = initial == capacity and initial_2 == capacity_2
-- include: everyday_refill
local available = size
-- The pieces that are included know one bandwidth, so that the two change places.
local capacity_1, period_1, rate_1, size_1, part_1 = capacity, period, rate, size, part
capacity, period, rate, size, part, elapsed = capacity_2, period_2, rate_2, size_2, part_2, elapsed_2
-- include: everyday_refill
if size < available then
  available = size
end
-- include: everyday_taken
size = size - taken
local full = 0
if expiration > FIXED then
  -- include: everyday_wait
end
size_2, part_2 = size, part
capacity, period, rate, size, part = capacity_1, period_1, rate_1, size_1 - taken, part_1
if expiration > FIXED then
  -- include: everyday_wait
end
if exact then
  local after = pack('>c118c8i8i8c8i8i8i4i8', stored, last, size, part, last_2, size_2, part_2, 1, consumed + taken)
  -- include: everyday_store
end
