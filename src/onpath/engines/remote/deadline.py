"""A time limit for an exchange as a whole: httpx's own is per read, and a server may send a byte in each."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

_exchange = threading.local()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What this thread sends and receives in this block through a client that is `bounded` ends in time.

    Raises:
        httpx.TransportError: it does not.
    """
    _exchange.seconds, _exchange.end = seconds, time.monotonic() + seconds
    try:
        yield
    finally:
        del _exchange.seconds, _exchange.end


def bounded(client: httpx.Client) -> httpx.Client:
    """The client, for `within`. httpx lets nobody choose the sockets' side of its transports, proxies among
    them, so it is put in their place."""
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx.HTTPTransport):
            pool: Any = transport._pool
            pool._network_backend = _Backend(pool._network_backend)
    return client


def _left(timeout: float | None) -> float | None:
    """Of the exchange, or the library's own limit if that is shorter."""
    if not hasattr(_exchange, "end"):
        return timeout
    left: float = _exchange.end - time.monotonic()
    if left <= 0:
        raise _too_late()
    return left if timeout is None else min(left, timeout)


def _too_late() -> Exception:
    return httpcore.ReadTimeout(f"not whole after {_exchange.seconds:g} s")


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return self._inner.read(max_bytes, _left(timeout))
        except httpcore.ReadTimeout:
            if hasattr(_exchange, "end"):
                raise _too_late() from None
            raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, *given: Any, **options: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(*given, **options))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, inner: httpcore.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(self, *given: Any, **options: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.connect_tcp(*given, **options))

    def connect_unix_socket(self, *given: Any, **options: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.connect_unix_socket(*given, **options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)
