-- Reads and writes the state of a token bucket.
--
-- Uses    numbers; now, LONGEST_STATE, MOST_BANDWIDTHS; unpack, pack
-- Offers  decode, decode_template, encode
-- To      scripts that decide on token buckets
--
-- decode() refuses whatever encode() would write in other bytes, so that a bucket that is changed and changed back has
-- the bytes that it had. What lies beyond the end of a state is not read, and is lost at the next write.

-- Reads a state; nil where it cannot be read. A bandwidth holds its numbers too; the configuration stays in bytes.
local function decode(bytes)
  local length, position = #bytes, 13
  if length < position - 1 or length > tonumber(LONGEST_STATE) then
    return nil
  end
  local state_format, configuration_format, n = unpack('>i4i4i4', bytes)
  if state_format < 1 or state_format > 2 or configuration_format ~= 1 or n < 1 or n > MOST_BANDWIDTHS then
    return nil
  end
  local bandwidths, ids = {}, {}
  for i = 1, n do
    if length < position + 46 then
      return nil
    end
    local format, capacity_high, capacity_low, initial_high, initial_low, period_high, period_low,
      tokens_high, tokens_low, intervally, first_high, first_low, adaptive, has_id =
      unpack('>i4i4I4i4I4i4I4i4I4Bi4I4BB', bytes, position)
    local bandwidth = {
      capacity = whole(capacity_high, capacity_low),
      initial = whole(initial_high, initial_low),
      period = whole(period_high, period_low),
      tokens = whole(tokens_high, tokens_low),
      intervally = intervally == 1,
      aligned = first_high ~= -2^31 or first_low ~= 0,
      adaptive = adaptive == 1,
      last = 0, size = 0, rounding_error = 0,
    }
    if format ~= 1 or intervally > 1 or adaptive > 1 or has_id > 1
      or less(bandwidth.capacity, 1) or less(bandwidth.period, 1) or less(bandwidth.tokens, 1) then
      return nil
    end
    position = position + 47
    if has_id == 1 then
      local id_end = length > position and position + 1 + unpack('>I2', bytes, position)
      local id = id_end and id_end <= length and bytes:sub(position + 2, id_end)
      local characters = id
      if id and id:find('[^\1-\127]') then
        -- Each valid character that could not be written in fewer bytes becomes one letter. No byte that begins a
        -- character can continue one, so that such a letter never completes another character.
        characters = id:gsub('\192\128', 'x'):gsub('[\194-\223][\128-\191]', 'x')
        characters = characters:gsub('\224[\160-\191][\128-\191]', 'x'):gsub('[\225-\239][\128-\191][\128-\191]', 'x')
      end
      if not id or ids[id] or characters:find('[^\1-\127]') then
        return nil
      end
      ids[id] = true
      bandwidth.id = id
      position = id_end + 1
    end
    bandwidths[i] = bandwidth
  end
  local configuration = bytes:sub(5, position - 1)

  -- A state without a version must have room for one.
  if length < position + 12 + 24 * n + 12 - 1 or position + 12 + 24 * n + 12 + 8 > tonumber(LONGEST_STATE) then
    return nil
  end
  local arithmetic, numbers_format, count = unpack('>i4i4i4', bytes, position)
  if arithmetic ~= 3 or numbers_format ~= 1 or count ~= 3 * n then
    return nil
  end
  position = position + 12
  for _, bandwidth in ipairs(bandwidths) do
    local last_high, last_low, size_high, size_low, error_high, error_low = unpack('>i4I4i4I4i4I4', bytes, position)
    bandwidth.last = whole(last_high, last_low)
    bandwidth.size = whole(size_high, size_low)
    bandwidth.rounding_error = whole(error_high, error_low)
    position = position + 24
  end

  local statistics_format, consumed_high, consumed_low = unpack('>i4i4I4', bytes, position)
  position = position + 12
  local has_version, version = 0, nil
  if state_format == 2 then
    has_version = bytes:byte(position)
    if has_version == 1 and length >= position + 8 then
      version = whole(unpack('>i4I4', bytes, position + 1))
    end
  end
  if statistics_format ~= 1 or state_format == 2 and has_version ~= 0 and not version then
    return nil
  end
  return {
    configuration = configuration,
    bandwidths = bandwidths,
    consumed = whole(consumed_high, consumed_low),
    version = version,
  }
end

local function i64(x)
  return pack('>i4I4', halves(x))
end

local function encode(state)
  local format, count = state.version and 2 or 1, 3 * #state.bandwidths
  local parts = {pack('>i4', format), state.configuration, pack('>i4i4i4', 3, 1, count)}
  for _, bandwidth in ipairs(state.bandwidths) do
    parts[#parts + 1] = i64(bandwidth.last) .. i64(bandwidth.size) .. i64(bandwidth.rounding_error)
  end
  parts[#parts + 1] = pack('>i4', 1) .. i64(state.consumed) .. (state.version and '\1' .. i64(state.version) or '')
  return table.concat(parts)
end

-- Reads a state from which a bucket is made or its limits are replaced; nil where it cannot be read.
local function decode_template(bytes)
  local template = decode(bytes)
  for _, bandwidth in ipairs(template and template.bandwidths or {}) do
    if not bandwidth.aligned then
      bandwidth.last = now
    end
  end
  return template
end
