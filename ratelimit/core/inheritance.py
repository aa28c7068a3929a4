"""How a live bucket keeps its tokens when its configuration is replaced."""

from __future__ import annotations

from enum import Enum


class TokensInheritance(Enum):
    """How the bandwidths of a new configuration take over the tokens of the old ones.

    A new bandwidth inherits from the old one with the same id. Where both configurations have one bandwidth without an
    id, these two belong together. A bandwidth without a predecessor, and every one with RESET, begins with its initial
    tokens, and so do limits that replace those of another algorithm.

    Sliding windows inherit by their length. With AS_IS and ADDITIVE, what was used goes on counting.
    """

    PROPORTIONALLY = 0
    """The bucket keeps its share of the capacity: 4 tokens of 10 become 40 of 100."""
    AS_IS = 1
    """The bucket keeps the number of its tokens, at most the new capacity."""
    RESET = 2
    """The bucket gets the initial tokens of the new configuration; a debt is forgotten."""
    ADDITIVE = 3
    """The bucket keeps its tokens and gains the growth of its capacity; it never holds more than the new capacity.

    A capacity that is raised and lowered again and again gives the difference each time.
    """
