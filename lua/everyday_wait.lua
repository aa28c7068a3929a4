-- Finds how long a greedy bandwidth takes to be full.
--
-- What everyday_refill says of numbers counts here as well.
--
-- Uses    capacity, period, rate, size, part; full, exact
-- Offers  nothing: it raises full (nanoseconds) to this wait, and sets exact to false where it cannot compute it
-- To      token_bucket_everyday, decide_all

if size < capacity then
  local missing = capacity - size
  local needed = missing * period
  local wait
  if needed < 2^53 then
    wait = needed - part
    wait = (wait - wait % rate) / rate
  elseif needed < 2^63 - 2^12 then
    -- With period = each * rate + odd, the wait is missing * each and what missing * odd takes.
    local odd = period % rate
    local rest = missing * odd
    exact = exact and rest < 2^53
    rest = rest - part
    wait = missing * ((period - odd) / rate) + (rest - rest % rate) / rate
  else
    -- From 2^63 on, the format computes in doubles as well.
    exact = exact and needed > 2^63 + 2^12
    wait = missing / rate * period
    wait = wait - wait % 1
  end
  exact = exact and wait < 2^53
  if wait > full then
    full = wait
  end
end
