-- Decides the everyday case: tokens that are consumed if they are there, once or several times, from one or two greedy
-- bandwidths without ids, which may be in debt or missing.
--
-- It computes in plain doubles. Each integer in it is below 2^53, or else it changes nothing and leaves the bucket to
-- what follows. Times are read in halves, as only differences of times fit into a double. Pieces of the old state are
-- copied as they are, also into a new one.
--
-- Two i4 of a state are read as one i8, so that 2^32 + 1 stands for a 1 in both. A 32-bit server cuts off an i8, so
-- that no bucket passes the checks there.
--
-- Uses    key, request, before, and what was read of the request; TRY_CONSUME, the constants of expiration; unpack,
--         pack, format
-- Offers  nothing: either it stores the new state and returns the reply of the script, or what follows decides
-- To      scripts that decide on token buckets, before they make their functions

if operations == 1 then
  local missing = before == ''
  local stored = not missing and before or must_exist and '' or request:sub(51)
  local length = #stored
  local number, times, tokens = unpack('>BI4i8', request, 14)
  if number == TRY_CONSUME and tokens >= 1 and tokens * times < 2^53 then
    if length == 107 or length == 116 then
      -- include: everyday_one
    elseif length == 178 or length == 187 then
      -- include: everyday_two
    end
  end
end
