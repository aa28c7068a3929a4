-- Decides the everyday case of one bandwidth.
--
-- Uses    what token_bucket_everyday uses; stored, length, missing, times, tokens
-- Offers  nothing: either it returns the reply of the script, or what follows decides
-- To      token_bucket_everyday

-- `fixed` holds what is alike in all such states: not by intervals, not aligned, not adaptive, no id; and then that
-- there are numbers of 64 bits, in format 1, three of them.
local formats, counts, capacity, initial, period, rate, fixed, last_high, last_low, size, part, statistics, consumed =
  unpack('>i8i8i8i8i8i8c23i4I4i8i8i4i8', stored)
if missing then
  -- A new bucket begins now.
  last_high, last_low = now_high, now_low
end
local elapsed = (now_high - last_high) * 2^32 + (now_low - last_low)
local exact = counts == 2^32 + 1 and fixed == '\0\128\0\0\0\0\0\0\0\0\0\0\0\0\3\0\0\0\1\0\0\0\3'
  and statistics == 1 and consumed > -2^53 and consumed + tokens * times < 2^53
  and capacity >= 1 and capacity < 2^53 and period < 2^53 and rate >= 1 and rate < 2^53
  and size <= capacity and size > -2^53 and part >= 0 and part < period and elapsed < 2^53
-- include: everyday_version
if exact and elapsed <= 0 and strict and not missing then
  return {before}
end
-- include: everyday_refill
local available = size
-- include: everyday_taken
size = size - taken
local full = 0
if expiration > FIXED then
  -- include: everyday_wait
end
if exact then
  local same_when_new = initial == capacity
  local last = (elapsed > 0 or missing) and request or stored:sub(72)
  local after = pack('>c71c8i8i8i4i8', stored, last, size, part, 1, consumed + taken)
  -- include: everyday_store
end
