-- Computes with integers of 144 bits, for rules that multiply numbers of 64 bits and compare the products.
--
-- A wide number is six digits to the base 2^24, the lowest first; it is negative where the highest digit is 2^23 or
-- more. No sum of products of digits reaches 2^53, so that doubles hold it.
--
-- Uses    numbers; floor
-- Offers  wide, narrow, is_negative; +, -, *, < between wide numbers; floor_divided
-- To      one function of the rules, within which it is included, as few decisions need it

local WIDE = {}

-- Takes digits of any size, also below 0, and cuts off what exceeds 144 bits.
local function wide_from(digits)
  local carry = 0
  for i = 1, 6 do
    local digit = digits[i] + carry
    carry = floor(digit / 2^24)
    digits[i] = digit - carry * 2^24
  end
  return setmetatable(digits, WIDE)
end

-- Makes a wide number of a pair, or of any integer that a double holds.
local function wide(x)
  if type(x) == 'table' then
    return wide_from({x[2], x[1] * 2^8, 0, 0, 0, 0})
  end
  return wide_from({x, 0, 0, 0, 0, 0})
end

-- Makes a number of a wide one that fits into 64 bits.
local function narrow(x)
  local above = floor(x[2] / 2^8)
  return whole(x[3] * 2^16 + above, (x[2] - above * 2^8) * 2^24 + x[1])
end

local function is_negative(x)
  return x[6] >= 2^23
end

function WIDE.__add(x, y)
  return wide_from({x[1] + y[1], x[2] + y[2], x[3] + y[3], x[4] + y[4], x[5] + y[5], x[6] + y[6]})
end

function WIDE.__sub(x, y)
  return wide_from({x[1] - y[1], x[2] - y[2], x[3] - y[3], x[4] - y[4], x[5] - y[5], x[6] - y[6]})
end

function WIDE.__mul(x, y)
  local digits = {0, 0, 0, 0, 0, 0}
  for i = 1, 6 do
    for j = 1, 7 - i do
      digits[i + j - 1] = digits[i + j - 1] + x[i] * y[j]
    end
  end
  return wide_from(digits)
end

function WIDE.__lt(x, y)
  return is_negative(x - y)
end

-- Gives a double near the wide number.
local function nearly(x)
  local double = is_negative(x) and x[6] - 2^24 or x[6]
  for i = 5, 1, -1 do
    double = double * 2^24 + x[i]
  end
  return double
end

-- Gives x / y rounded down, and what is left; y is above 0. As in divided(), each round divides the error that the
-- last one has left.
local function floor_divided(x, y)
  local quotient, left = wide(0), x
  while is_negative(left) or not (left < y) do
    local estimate = floor(nearly(left) / nearly(y))
    estimate = wide(estimate == 0 and 1 or estimate)
    quotient = quotient + estimate
    left = left - estimate * y
  end
  return quotient, left
end
