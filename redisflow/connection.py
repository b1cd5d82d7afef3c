"""URLs and clients to connections of our own.

Connection set-up (TLS, AUTH, SELECT, client names, credential providers) is redis-py's; pooling and resending
are not, because a client that resends by itself applies a change twice.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit
from weakref import WeakValueDictionary

import attrs
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from redisflow.errors import InvalidData

if TYPE_CHECKING:
    from collections.abc import Callable

    from redisflow.embedded import Lease

DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_SOCKET_TIMEOUT_S = 5.0
_SERVER_SCHEMES = ("redis", "rediss", "unix")
_SCHEMES = (*_SERVER_SCHEMES, "memory", "embedded")


@attrs.frozen
class Endpoint:
    """How to open connections to one server.

    Attributes:
        open: makes a connection of redis-py's, not yet connected, that never resends.
        socket_timeout_s: how long a connection waits for a reply.
        real_server: false for fakeredis, which knows neither `#!lua` nor INFO.
        lease: what keeps an embedded server running, to be closed in the end.
    """

    open: Callable[[], Any]
    socket_timeout_s: float
    real_server: bool = True
    lease: Lease | None = None

    @classmethod
    def of_client(cls, client: redis.Redis | redis.asyncio.Redis, lease: Lease | None = None) -> Endpoint:
        """Take a client's settings, for connections of our own with its automatic resends off."""
        pool = client.connection_pool
        settings = dict(pool.connection_kwargs)
        for name in [name for name in settings if name.startswith(("maint_", "oss_cluster_", "orig_"))]:
            del settings[name]  # push messages of RESP3, which these connections do not speak
        is_async = isinstance(client, redis.asyncio.Redis)
        socket_timeout_s = settings.get("socket_timeout") or DEFAULT_SOCKET_TIMEOUT_S
        settings |= {
            "retry": (AsyncRetry if is_async else Retry)(NoBackoff(), 0),
            "retry_on_timeout": False,
            "retry_on_error": [],
            "protocol": 2,
            "decode_responses": False,
            "socket_timeout": socket_timeout_s,
        }
        real_server = not type(client).__module__.startswith("fakeredis")
        return cls(lambda: pool.connection_class(**settings), socket_timeout_s, real_server, lease)


def require_client(manager: str, kind: type, client: object) -> None:
    """Refuse what is not a client of the kind a manager takes."""
    if not isinstance(client, kind):
        found = f"{type(client).__module__}.{type(client).__qualname__}"
        raise InvalidData(f"{manager} takes a {kind.__module__}.{kind.__qualname__}, not a {found}")


def url_of(url: str | None) -> str:
    """The URL to use: the caller's, `$REDISFLOW_URL`, or the default.

    Raises:
        InvalidData: not a URL of a kind this library knows.
    """
    url = url or os.environ.get("REDISFLOW_URL") or DEFAULT_URL
    if urlsplit(url).scheme not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise InvalidData(f"not a URL this library knows: {url!r}; it begins with one of {known}")
    return url


def endpoint_of(url: str, *, is_async: bool) -> Endpoint:
    """Open a URL. Starts the server of an `embedded://` one, which may take a second.

    Raises:
        InvalidData: the URL makes no sense.
        StorageError: the embedded server cannot be started.
    """
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return _memory(parts.netloc + parts.path, is_async=is_async)
    client = redis.asyncio.Redis if is_async else redis.Redis
    if parts.scheme == "embedded":
        from redisflow import embedded  # noqa: PLC0415 - an extra, not needed for the other schemes

        if parts.netloc:
            raise InvalidData(f"{url!r} names a host; an embedded server's folder takes three slashes: embedded:///dir")
        lease = embedded.join(Path(unquote(parts.path)) if parts.path else None)
        return Endpoint.of_client(client(unix_socket_path=str(lease.socket_path)), lease)
    if "none" in parse_qs(parts.query).get("ssl_cert_reqs", []):
        warnings.warn(
            "ssl_cert_reqs=none in the URL turns certificate verification off: anyone on the path can read and "
            "change what is sent",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        return Endpoint.of_client(client.from_url(url))
    except (ValueError, TypeError) as error:
        raise InvalidData(f"not a usable URL: {url!r}: {error}") from error


_fake_servers: WeakValueDictionary[str, Any] = WeakValueDictionary()
_fake_servers_lock = threading.Lock()


def _memory(name: str, *, is_async: bool) -> Endpoint:
    """A fakeredis server in this process: one of its own, or one shared by name."""
    try:
        import fakeredis  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InvalidData("memory:// needs fakeredis: pip install 'redisflow[memory]'") from error
    with _fake_servers_lock:
        server = _fake_servers.get(name) if name else None
        if server is None:
            server = fakeredis.FakeServer()
            if name:
                _fake_servers[name] = server
    client = fakeredis.FakeAsyncRedis(server=server) if is_async else fakeredis.FakeRedis(server=server)
    return Endpoint.of_client(client)
