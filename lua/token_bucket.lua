-- Applies time and operations to the state of a token bucket.
--
-- Uses    numbers; now, and the constants of inheritance; `state`, the state that was read, which it changes
-- Offers  refill; one function for each operation, by its name; largest_wait, wait_until_full, same_when_new
-- To      scripts that decide on token buckets

-- The passing of time. The order of the steps is part of the format, and all sums, differences and plain products wrap.

local function fill(bandwidth)
  bandwidth.size, bandwidth.rounding_error = bandwidth.capacity, 0
end

-- Puts in the tokens that have come since the last refill; the rounding error is the part of a token that has come.
local function refill(bandwidth)
  local last, size, period, tokens = bandwidth.last, bandwidth.size, bandwidth.period, bandwidth.tokens
  local time = now
  if not less(last, time) then
    return
  end
  if bandwidth.intervally then
    local _, since = divided(difference(time, last), period)
    -- This is the end of the last whole period.
    time = difference(time, since)
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

-- Gives the nanoseconds until the missing tokens will be there, MAX at most.
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

-- Gives the longest of the waits that `wait_of` gives for the bandwidths.
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

-- Gives the wait for a bandwidth to have these tokens; MAX where what is missing does not fit into 64 bits.
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

-- Returns whether a new bucket would be equal to this one when it is full.
local function same_when_new()
  for _, bandwidth in ipairs(state.bandwidths) do
    local capacity, initial = bandwidth.capacity, bandwidth.initial
    if initial ~= capacity or less(capacity, bandwidth.size) or bandwidth.adaptive then
      return false
    end
  end
  return true
end

-- The operations follow. Each returns whether it has changed the state. An operation that has changed nothing would
-- change nothing if it were run again.

-- Gives what the scarcest bandwidth has.
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

-- Runs all repetitions at once.
local function try_consume(tokens, times)
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

-- Lowers a bandwidth so that, when the wait is over, it holds at most its capacity less the tokens.
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

-- Consumes on credit. Under several limits it also keeps others from the tokens that come during the wait.
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

-- Consumes in debt if need be, down to MIN.
local function book(tokens)
  local available = available_tokens()
  if less(available, 0) then
    local room = difference(available, MIN)
    tokens = less(room, tokens) and room or tokens
  end
  return less(0, tokens) and consume(tokens)
end

-- Puts tokens and a part of one into a bandwidth, up to `most`; its size never gets smaller.
local function put_into(bandwidth, tokens, unfinished, most)
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

-- Gives back what was consumed; `later` tokens were consumed after it, and stay consumed.
local function give_back(tokens, later)
  state.consumed = difference(state.consumed, tokens)
  for _, bandwidth in ipairs(state.bandwidths) do
    put_into(bandwidth, tokens, 0, difference(bandwidth.capacity, later))
  end
  return true
end

-- Counts the bandwidths that raise() has served since the last cancel(); nil where it must not serve any.
local raised

-- Undoes a reservation, whose place stays empty where others have reserved after it.
local function cancel(tokens, noted)
  local later = difference(state.consumed, noted)
  if less(0, later) then
    raised = nil
    return not less(available_tokens(), 0) and give_back(tokens, later)
  end
  raised = 0
  return give_back(tokens, 0)
end

-- Gives the next bandwidth what the cancelled reservation took from it beside its tokens.
local function raise(tokens, unfinished)
  if not raised then
    return false
  end
  raised = raised + 1
  local bandwidth = state.bandwidths[raised]
  if bandwidth then
    put_into(bandwidth, tokens, unfinished, bandwidth.capacity)
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

-- From here on, functions have functions inside: to make all of them at every call takes as long as a decision.

-- Makes every token wait for at least this long from now, by lowering the bandwidth that has to be lowered least.
local function hold_back(nanos)
  if not less(largest_wait(wait_until, 1), nanos) then
    return false
  end

  -- include: wide_numbers

  local LARGEST_DEBT = wide(sum(MIN, 2))

  -- Gives the wait that lowering a bandwidth can give in place of the wanted one, the time in which the bandwidth
  -- regains what it has lost by that, and the size and the rounding error that it then has.
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
      -- A debt is rounded up, and the part of a token is kept.
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
      -- The sum below might not fit into 64 bits.
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

  -- A bandwidth without an id follows another one where each of both states has at most one of them.
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
