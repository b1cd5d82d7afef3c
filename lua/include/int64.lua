-- Exact checks of 64-bit integers written as decimal text; Lua's own numbers are doubles.

-- Splits canonical decimal text into sign * (high * 1e9 + low); nil for what HINCRBY would refuse.
local function split_int64(text)
  local sign, digits = string.match(text, '^(%-?)(%d+)$')
  if not digits or #digits > 19 or (string.sub(digits, 1, 1) == '0' and text ~= '0') then
    return nil
  end
  local factor = sign == '-' and -1 or 1
  local high = #digits > 9 and tonumber(string.sub(digits, 1, -10)) or 0
  return factor * high, factor * tonumber(string.sub(digits, -9))
end

-- Says whether the sum of two such integers is one again: -2^63 <= a + b < 2^63.
local function sum_fits(a, b)
  local a_high, a_low = split_int64(a)
  local b_high, b_low = split_int64(b)
  if not a_high or not b_high then
    return false
  end
  local low = a_low + b_low
  local carry = math.floor(low / 1e9)
  local high = a_high + b_high + carry
  low = low - carry * 1e9
  -- As high * 1e9 + low with 0 <= low < 1e9: 2^63 is 9223372036 and 854775808, -2^63 is -9223372037 and 145224192.
  local too_big = high > 9223372036 or (high == 9223372036 and low > 854775807)
  local too_small = high < -9223372037 or (high == -9223372037 and low < 145224192)
  return not (too_big or too_small)
end
