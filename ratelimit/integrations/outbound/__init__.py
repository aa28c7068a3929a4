"""Staying under somebody else's limit, for all workers of a fleet together: the part that no client library is in."""

from ratelimit.integrations.outbound.limit import OutboundLimit, host_of

__all__ = ["OutboundLimit", "host_of"]
