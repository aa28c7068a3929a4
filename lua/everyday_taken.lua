-- Finds how many tokens are taken.
--
-- Uses    available, tokens, times, exact; strict, counting, missing, before
-- Offers  taken; where a bucket that exists has too few tokens, it returns the reply of the script
-- To      everyday_one, everyday_two

local taken = tokens * times
if available < taken then
  if available < tokens then
    taken = 0
  elseif strict and exact then
    -- A strict request is granted as a whole or refused as a whole, so that its effect is seen afterwards.
    return {not missing and before}
  else
    taken = available - available % tokens
  end
  -- A bucket with too few tokens stays as it is: not even the refill is stored.
  if taken == 0 and exact and not missing then
    return counting and 0 or before
  end
end
