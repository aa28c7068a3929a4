"""Staying under somebody else's limit, for all workers of a fleet together, whatever the client library."""

from ratelimit.integrations.outbound.limit import OutboundLimit, host_of

__all__ = ["OutboundLimit", "host_of"]
