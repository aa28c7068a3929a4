"""An adapter of requests that stays under somebody else's limit.

::

    session = requests.Session()
    session.mount("https://api.example.com", RateLimitAdapter(OutboundLimit("10/second", key="api.example.com")))
"""

from __future__ import annotations

from collections.abc import Mapping

from ratelimit.integrations.extras import needing

with needing("requests"):
    import requests
    from requests.adapters import BaseAdapter, HTTPAdapter
    from urllib3.exceptions import ResponseError

    from ratelimit.integrations.outbound import OutboundLimit, host_of
    from ratelimit.integrations.outbound.answers import TOO_MANY_REQUESTS

__all__ = ["OutboundLimit", "RateLimitAdapter", "host_of"]


class RateLimitAdapter(BaseAdapter):
    """Makes each request, redirects too, wait for its turn, and learns from its answer.

    :param limit: its callables are given the ``requests.PreparedRequest``.
    :param adapter: what sends the requests; an ``HTTPAdapter()`` when None.
    :raises InvalidArgumentError: where the limit has a manager for asyncio.
    """

    def __init__(self, limit: OutboundLimit, adapter: BaseAdapter | None = None) -> None:
        super().__init__()
        limit.check_face(asynchronous=False)
        self._limit = limit
        self._adapter = HTTPAdapter() if adapter is None else adapter

    def send(  # noqa: PLR0917  # as requests has it
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float, float] | tuple[float, None] | None = None,
        verify: bool | str = True,
        cert: bytes | str | tuple[bytes | str, bytes | str] | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Wait for the turn of the request, send it, and learn from the answer, which is given back as it is.

        The timeout is for the request alone, not for the wait for its turn.
        """
        key = self._limit.acquire(request)
        try:
            response = self._adapter.send(request, stream, timeout, verify, cert, proxies)
        except requests.exceptions.RetryError as error:
            # The answers that made urllib3 repeat the request are gone, with their fields.
            if _was_refused(error):
                self._limit.learn(key, TOO_MANY_REQUESTS, {})
            raise
        try:
            self._limit.learn(key, response.status_code, response.headers)
        except BaseException:
            response.close()
            raise
        return response

    def close(self) -> None:
        """Close the inner adapter."""
        self._adapter.close()


def _was_refused(error: requests.exceptions.RetryError) -> bool:
    """Return whether urllib3 has given up because the server kept answering with 429."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return str(reason) == ResponseError.SPECIFIC_ERROR.format(status_code=TOO_MANY_REQUESTS)
