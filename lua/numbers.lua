-- Computes exactly with signed 64-bit integers, which wrap.
--
-- Lua has doubles only, and a double holds every integer up to 2^53. A number here is a double if it is between -2^53
-- and 2^53, and else a pair {high, low} for high * 2^32 + low, with a signed high and an unsigned low. All functions
-- take both kinds and give both kinds. Rounding the quotient of two integers below 2^53 to a double never lifts it to
-- the next integer: floor() of it is exact.
--
-- Uses    floor
-- Offers  whole, halves, rounded, truncated, MAX, MIN; less, and == for equality; sum, difference, product,
--         saturating_product, divided
-- To      the rules of every algorithm, and whatever reads and writes states

-- An operator on a pair gives not-a-number, so that one comparison finds both a pair and a result that is too large.
local function not_a_number()
  return 0 / 0
end
local PAIR = {__add = not_a_number, __sub = not_a_number, __mul = not_a_number, __mod = not_a_number}

-- A pair never equals a double, as whole() makes a pair only of what does not fit into a double.
function PAIR.__eq(x, y)
  return x[1] == y[1] and x[2] == y[2]
end

-- Makes a number of its halves, and cuts off what exceeds 64 bits.
local function whole(high, low)
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

-- Gives the nearest double, half to even: the sum is the one operation here that rounds.
local function rounded(x)
  return type(x) == 'table' and x[1] * 2^32 + x[2] or x
end

-- Makes a number of a double that is an integer from -2^63 to 2^63.
local function from_integral(double)
  local high = floor(double / 2^32)
  return whole(high, double - high * 2^32)
end

-- Drops the fraction of a double, and keeps the result within 64 bits.
local function truncated(double)
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

-- Gives the low half of the product of two halves.
local function low_half(x, y)
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
  -- x_low * y_low is upper * 2^16 + lower, where both have 48 bits.
  local x_lowest = x_low % 2^16
  local upper = (x_low - x_lowest) / 2^16 * y_low
  local lower = x_lowest * y_low + upper % 2^16 * 2^16
  local high = floor(upper / 2^16) + floor(lower / 2^32) + low_half(x_high, y_low) + low_half(y_high, x_low)
  return whole(high, lower % 2^32)
end

-- Gives MAX where the product does not fit, even if it is too small.
local function saturating_product(x, y)
  local double = x * y
  if double > -2^53 and double < 2^53 then
    return double
  end
  double = rounded(x) * rounded(y)
  if double >= 2^64 or double <= -2^64 then
    return MAX
  end
  local wrapped = product(x, y)
  -- A product below twice what fits has the wrong sign if it has wrapped.
  return (double < 0) == less(wrapped, 0) and wrapped or MAX
end

-- Gives x / y truncated toward zero, and x % y with the sign of x; y is above 0.
local function divided(x, y)
  local left = x % y
  if left == left then
    if x < 0 then
      left = math.fmod(x, y)
    end
    return (x - left) / y, left
  end
  -- Doubles give the quotient nearly, and the next round divides the error that is left.
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
