-- Looks at the format of a state, and at the version of its configuration, which must be the wanted one or higher.
--
-- Uses    stored, length, formats, wanted, request; exact
-- Offers  suffix, what follows the state's numbers; it sets exact to false where the version will not do
-- To      everyday_one, everyday_two, decide_all

local suffix = ''
if length == 107 or length == 178 then
  exact = exact and formats == 2^32 + 1 and wanted == 0
else
  suffix = stored:sub(-9)
  exact = exact and formats == 2 * 2^32 + 1 and suffix:byte() == 1
  if wanted ~= 0 then
    local version, wanted_version = unpack('>i8', suffix, 2), unpack('>i8', request, 43)
    exact = exact and version >= wanted_version and version < 2^53 and wanted_version > -2^53
  end
end
