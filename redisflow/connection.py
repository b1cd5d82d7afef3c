"""URLs and clients to connections of our own.

Connection set-up (TLS, AUTH, SELECT, client names, credential providers) is redis-py's; pooling and resending
are not, because a client that resends by itself applies a change twice.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit
from weakref import WeakValueDictionary

import attrs
import redis
import redis.asyncio
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.backoff import NoBackoff
from redis.connection import to_bool
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from redisflow.errors import InvalidData
from redisflow.sentinel import Sentinels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from redis.cluster import RedisCluster

    from redisflow.embedded import Lease
    from redisflow.topology import Address, Remap

DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_PORT, DEFAULT_SENTINEL_PORT = 6379, 26379
DEFAULT_SOCKET_TIMEOUT_S = 5.0
_CLUSTER, _SENTINEL = "+cluster", "+sentinel"
_SCHEMES = (
    "redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel", "memory",
    "embedded",
)  # fmt: skip


@attrs.frozen
class Endpoint:
    """How to open connections to one server.

    Attributes:
        open: makes a connection of redis-py's, not yet connected, that never resends.
        socket_timeout_s: how long a connection waits for a reply.
        real_server: false for fakeredis, which knows neither `#!lua` nor INFO.
        lease: what keeps an embedded server running, to be closed in the end.
        sentinels: who says which server is the primary: what `open` makes is connected to that one.
    """

    open: Callable[[], Any]
    socket_timeout_s: float
    real_server: bool = True
    lease: Lease | None = None
    sentinels: Sentinels | None = None
    is_cluster: ClassVar[bool] = False

    @classmethod
    def of_client(cls, client: redis.Redis | redis.asyncio.Redis, lease: Lease | None = None) -> Endpoint:
        """Take a client's settings, for connections of our own with its automatic resends off."""
        pool = client.connection_pool
        settings = _quiet(pool.connection_kwargs, is_async=isinstance(client, redis.asyncio.Redis))
        real_server = not type(client).__module__.startswith("fakeredis")
        return cls(
            lambda: pool.connection_class(**settings),
            settings["socket_timeout"],
            real_server,
            lease,
            _sentinels_of(pool),
        )


@attrs.frozen
class ClusterEndpoint:
    """How to open connections to the nodes of a cluster.

    Attributes:
        seeds: the nodes to ask first.
        endpoint_at: how to reach the node at an address.
        remap: what becomes of an address the cluster tells; `None` for nothing.
    """

    seeds: tuple[Address, ...]
    endpoint_at: Callable[[Address], Endpoint]
    remap: Remap | None = None
    real_server: ClassVar[bool] = True
    is_cluster: ClassVar[bool] = True

    @classmethod
    def of_client(cls, client: RedisCluster | AsyncRedisCluster) -> ClusterEndpoint:
        """Take the settings and the nodes of a cluster client."""
        nodes: Any
        if isinstance(client, AsyncRedisCluster):
            nodes = client.startup_nodes
            template = nodes[0]
        else:
            nodes = client.get_nodes()  # type: ignore[no-untyped-call]  # redis-py's
            template = client.get_redis_connection(nodes[0]).connection_pool
        seeds = [(node.host, int(node.port)) for node in nodes]
        kind, settings = template.connection_class, template.connection_kwargs
        return cls.of_settings(seeds, kind, settings, client.nodes_manager.address_remap)

    @classmethod
    def of_settings(
        cls, seeds: Iterable[Address], kind: type, settings: Mapping[str, Any], remap: Remap | None = None
    ) -> ClusterEndpoint:
        """Open connections of a kind, with those settings, to whatever node."""
        common = _quiet(settings, is_async=issubclass(kind, redis.asyncio.connection.AbstractConnection))

        def endpoint_at(address: Address) -> Endpoint:
            own = common | {"host": address[0], "port": address[1]}
            return Endpoint(lambda: kind(**own), common["socket_timeout"])

        return cls(tuple(seeds), endpoint_at, remap)


def _sentinels_of(pool: Any) -> Sentinels | None:
    """Those a client's pool asks for its primary."""
    if not isinstance(pool, SentinelConnectionPool | AsyncSentinelConnectionPool):
        return None
    asker = pool.sentinel_manager
    settings = [_sentinel_settings(client.connection_pool) for client in asker.sentinels]
    return Sentinels(pool.service_name, settings, asker, tuple(asker.sentinels))


def _sentinel_settings(pool: Any) -> dict[str, Any]:
    """How to connect to a Sentinel for good, as to hear from it: in asyncio, which knows nothing of OCSP."""
    named = {"host", "port", "username", "password", "credential_provider"}
    given = {key: value for key, value in pool.connection_kwargs.items() if "ocsp" not in key}
    kept = {key: value for key, value in given.items() if key in named or key.startswith("ssl_")}
    secure = issubclass(pool.connection_class, redis.SSLConnection | redis.asyncio.SSLConnection)
    return kept | {"ssl": secure, "protocol": 2, "retry": AsyncRetry(NoBackoff(), 0), "socket_keepalive": True}


def _quiet(settings: Mapping[str, Any], *, is_async: bool) -> dict[str, Any]:
    """A client's settings, for connections that resend nothing and speak RESP2."""
    # Push messages of RESP3, which these connections do not speak.
    kept = {name: value for name, value in settings.items() if not name.startswith(("maint_", "oss_cluster_", "orig_"))}
    return kept | {
        "retry": (AsyncRetry if is_async else Retry)(NoBackoff(), 0),
        "retry_on_timeout": False,
        "retry_on_error": [],
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": settings.get("socket_timeout") or DEFAULT_SOCKET_TIMEOUT_S,
    }


def taken_from(client: Any, manager: str, kinds: tuple[type, type]) -> Endpoint | ClusterEndpoint:
    """The endpoint of a client of one of the kinds a manager takes: one server's, or a cluster's.

    Raises:
        InvalidData: it is something else.
    """
    endpoints: tuple[Callable[[Any], Endpoint | ClusterEndpoint], ...] = (Endpoint.of_client, ClusterEndpoint.of_client)
    for kind, endpoint in zip(kinds, endpoints, strict=True):
        if isinstance(client, kind):
            return endpoint(client)
    found = f"{type(client).__module__}.{type(client).__qualname__}"
    wanted = " or a ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    raise InvalidData(f"{manager} takes a {wanted}, not a {found}")


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


def endpoint_of(url: str, *, is_async: bool) -> Endpoint | ClusterEndpoint:
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
        if parts.scheme.endswith(_CLUSTER):
            return _cluster(parts, client)
        if parts.scheme.endswith(_SENTINEL):
            return _sentinel(parts, is_async=is_async)
        return Endpoint.of_client(client.from_url(url))
    except (ValueError, TypeError) as error:
        raise InvalidData(f"not a usable URL: {url!r}: {error}") from error


def _sentinel(parts: SplitResult, *, is_async: bool) -> Endpoint:
    """Read `redis+sentinel://user:password@host:port,host:port,…/name/database`."""
    scheme, client = parts.scheme.removesuffix(_SENTINEL), redis.asyncio.Redis if is_async else redis.Redis
    user, at, hosts = parts.netloc.rpartition("@")
    name, _, database = parts.path.strip("/").partition("/")
    if not name:
        raise ValueError("the primary's name, as Sentinel has it, comes behind the hosts: redis+sentinel://host/name")
    url = f"{scheme}://{user}{at}host/{database}?{parts.query}"
    settings = dict(client.from_url(url).connection_pool.connection_kwargs)
    own = {key.removeprefix("sentinel_"): settings.pop(key) for key in list(settings) if key.startswith("sentinel_")}
    del settings["host"]
    if "ssl" in own:
        own["ssl"] = to_bool(own["ssl"])  # type: ignore[no-untyped-call]  # redis-py's
    shared = {key: value for key, value in settings.items() if key.startswith(("socket_", "ssl_"))}
    sentinel = (AsyncSentinel if is_async else Sentinel)(
        _places(scheme, hosts, DEFAULT_SENTINEL_PORT),
        sentinel_kwargs={"ssl": scheme == "rediss"}
        | shared
        | own
        | {"retry": (AsyncRetry if is_async else Retry)(NoBackoff(), 0)},
        ssl=scheme == "rediss",
        **settings,
    )
    endpoint = Endpoint.of_client(sentinel.master_for(name))
    sentinels = endpoint.sentinels and attrs.evolve(endpoint.sentinels, own=True)
    return attrs.evolve(endpoint, sentinels=sentinels)


def _places(scheme: str, hosts: str, default_port: int) -> list[Address]:
    places = [urlsplit(f"{scheme}://{host}") for host in hosts.split(",")]
    return [(place.hostname or "localhost", place.port or default_port) for place in places]


def _cluster(parts: SplitResult, client: Any) -> ClusterEndpoint:
    """Read `redis+cluster://user:password@host:port,host:port,…`."""
    scheme = parts.scheme.removesuffix(_CLUSTER)
    user, at, hosts = parts.netloc.rpartition("@")
    if parts.path not in {"", "/", "/0"}:
        raise ValueError("a cluster has just the database 0")
    # The settings are redis-py's reading of the same URL with one host.
    pool = client.from_url(f"{scheme}://{user}{at}{hosts.partition(',')[0]}/?{parts.query}").connection_pool
    return ClusterEndpoint.of_settings(
        _places(scheme, hosts, DEFAULT_PORT), pool.connection_class, pool.connection_kwargs
    )


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
