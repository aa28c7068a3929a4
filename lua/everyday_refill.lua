-- Puts into a greedy bandwidth what has come since its last refill.
--
-- Every number here is an integer below 2^53, which a double holds exactly. A quotient of two such integers, rounded as
-- doubles are, never reaches the next integer. So `x % y` is exact, and `(x - x % y) / y` is x / y rounded down.
--
-- Uses    elapsed (nanoseconds), capacity, period, rate, size, part; exact
-- Offers  nothing: it changes size and part, and sets exact to false where it cannot compute them
-- To      token_bucket_everyday, decide_all

if elapsed > 0 and size < capacity then
  -- Counted in token x nanosecond: every whole period of it is a token, and the rest is the part of one.
  local gained = elapsed * rate + part
  if gained >= 2^53 then
    local since = elapsed
    if elapsed > period then
      -- Whole periods bring whole refills, and do not change the part. What is left comes within a period.
      exact = exact and rate <= period
      since = elapsed % period
      size = size + (elapsed - since) / period * rate
      gained = since * rate + part
    end
    if size < capacity and gained >= 2^53 then
      if gained < 2^63 - 2^12 then
        -- With period = each * rate + odd and since = whole * each + left, the product
        -- since * rate = whole * period + left * rate - whole * odd, and all of these terms are small.
        local odd = period % rate
        local each = (period - odd) / rate
        local left = since % each
        local whole = (since - left) / each
        gained = left * rate + part
        exact = exact and gained < 2^53 and whole * odd < 2^53
        gained = gained - whole * odd
        size = size + whole
      else
        -- From 2^63 on, the format computes in doubles as well, and drops the part.
        exact = exact and gained > 2^63 + 2^12
        gained = since / period * rate
        size = size + (gained - gained % 1)
        gained = 0
      end
    end
  end
  part = gained % period
  size = size + (gained - part) / period
  if size >= capacity then
    size, part = capacity, 0
  end
end
