"""Java's modified UTF-8, in which ids are stored: the UTF-16 code units of a string, one to three bytes each.

It differs from UTF-8 in two places: NUL is ``C0 80``, and a character outside the basic plane is its two surrogates of
three bytes each. Lone surrogates are possible.
"""

from __future__ import annotations


def encode(text: str) -> bytes:
    """Return the bytes of any Python string, of any length."""
    pairs = text.encode("utf-16-be", "surrogatepass")
    units = "".join(chr(pairs[i] << 8 | pairs[i + 1]) for i in range(0, len(pairs), 2))
    return units.encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")


def decode(data: bytes) -> str:
    """Return the string; as lenient as Java: a plain zero byte is a NUL, and overlong forms are taken.

    :raises ValueError: for bytes that do not begin a character, and for a character that is cut off.
    """
    units = bytearray()
    position = 0
    while position < len(data):
        first = data[position]
        length = 1 if first < 0x80 else 2 if first >> 5 == 0b110 else 3 if first >> 4 == 0b1110 else 0
        group = data[position : position + length]
        if not length or len(group) < length or any(byte >> 6 != 0b10 for byte in group[1:]):
            raise ValueError(f"malformed character at byte {position} of a string")
        unit = first & (0x7F, 0x7F, 0x1F, 0x0F)[length]
        for byte in group[1:]:
            unit = unit << 6 | byte & 0x3F
        units += unit.to_bytes(2, "big")
        position += length
    return units.decode("utf-16-be", "surrogatepass")
