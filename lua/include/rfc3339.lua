-- RFC 3339 text of a server time; the server's Lua has no os.date.

-- Turns days since 1970-01-01 into a date by the calendar's 400-year cycle of 146,097 days, years from March.
local function civil_date(days)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local day_of_era = z - era * 146097
  local leap_days = math.floor(day_of_era / 1460) - math.floor(day_of_era / 36524) + math.floor(day_of_era / 146096)
  local year_of_era = math.floor((day_of_era - leap_days) / 365)
  local day_of_year = day_of_era - (365 * year_of_era + math.floor(year_of_era / 4) - math.floor(year_of_era / 100))
  local month_from_march = math.floor((5 * day_of_year + 2) / 153)
  local day = day_of_year - math.floor((153 * month_from_march + 2) / 5) + 1
  local month = month_from_march < 10 and month_from_march + 3 or month_from_march - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  return year, month, day
end

-- Takes the two numbers of TIME; always 27 characters.
local function rfc3339(seconds, microseconds)
  local days = math.floor(seconds / 86400)
  local rest = seconds - days * 86400
  local year, month, day = civil_date(days)
  return string.format(
    '%04d-%02d-%02dT%02d:%02d:%02d.%06dZ',
    year, month, day, math.floor(rest / 3600), math.floor(rest % 3600 / 60), rest % 60, microseconds
  )
end
