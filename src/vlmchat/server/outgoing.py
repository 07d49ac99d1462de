"""Requests from the controller to workers: to allowed addresses only, a connection for each.

Called by the controller and what carries its answers. A worker's name is resolved, checked against
the allow-list and dialled at the very address that was checked, at every connection. No proxies,
redirects, cookies; kept-alive connections neither, so that none outlives its worker. Knows nothing
of what is said.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpcore2

from vlmchat.errors import ConfigError, Forbidden, InvalidRequest, NetworkError

CONNECT_TIMEOUT_S = 5.0
LOOPBACK = ("127.0.0.0/8", "::1", "localhost")
_MAX_ANSWER_BYTES = 2**20  # of answers that are read whole
# A name that ends in a number is an address to resolvers: 2130706433, 127.1, 0x7f000001.
_HOST_NAME = re.compile(r"(?!(.*\.)?(\d+|0x[0-9a-f]*)$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_FORBIDDEN_IN_URL = re.compile(r"[^\x21-\x7e]|[\\@?#]")
_HTTPCORE_ERRORS = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.UnsupportedProtocol,
    httpcore2.ConnectionNotAvailable,
    httpcore2.ProxyError,
)


class AllowList:
    """Where workers may live: addresses, networks, trusted host names, `*` for anywhere."""

    def __init__(self, entries: Iterable[str] = LOOPBACK) -> None:
        """Raises ConfigError for an entry that is none of these."""
        self._networks: list[IPv4Network | IPv6Network] = []
        self._names: set[str] = set()
        self._anywhere = False
        for entry in entries:
            self._add(entry.strip().lower())

    def _add(self, entry: str) -> None:
        if entry == "*":
            self._anywhere = True
            return
        try:
            self._networks.append(ip_network(entry))
        except ValueError as error:
            if not _HOST_NAME.fullmatch(entry):
                raise ConfigError(
                    f"--allow-worker {entry!r} is no address, network or host name: {error}"
                ) from None
            # localhost means loopback, whatever a resolver says.
            if entry != "localhost":
                self._names.add(entry)

    def allows(self, host: str, address: str) -> bool:
        """Whether a worker called `host`, which resolves to `address`, may be talked to."""
        ip = ip_address(address.partition("%")[0])
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        if self._anywhere or host.lower() in self._names:
            return True
        return any(ip in network for network in self._networks if network.version == ip.version)


def check_worker_name(name: Any) -> str:
    """A worker's name is the address to call it by: http(s)://host[:port][/path].

    Raises InvalidRequest for anything else, a user name or a query included.
    """
    if not isinstance(name, str) or len(name) > 2048 or _FORBIDDEN_IN_URL.search(name):
        raise InvalidRequest("worker_name is not an address such as http://localhost:21002")
    try:
        parts = urlsplit(name)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
        known = known and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known:
        raise InvalidRequest("worker_name is not an address such as http://localhost:21002")
    return name


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON, None where it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Readable(Protocol):
    """An answer that is under way."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]: ...
    def aiter_stream(self) -> AsyncIterator[bytes]: ...


class Outgoing:
    """The way out. `key` goes with each request, so a worker knows its controller."""

    def __init__(self, allowed: AllowList, key: str | None = None) -> None:
        self._pool = httpcore2.AsyncConnectionPool(
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=_CheckedBackend(allowed),
        )
        self._key = key

    async def close(self) -> None:
        """Every connection."""
        await self._pool.aclose()

    async def post(self, url: str, body: Any, timeout_s: float) -> Answer:
        """POST, the answer read whole within `timeout_s`. Raises NetworkError, Forbidden."""
        try:
            async with asyncio.timeout(timeout_s), self.stream(url, body, {}) as response:
                return await read(response)
        except TimeoutError:
            raise NetworkError(f"{url} did not answer within {timeout_s:g} s") from None

    @asynccontextmanager
    async def stream(
        self, url: str, body: Any, headers: Mapping[str, str]
    ) -> AsyncIterator[httpcore2.Response]:
        """POST; the response once its headers are here, however long that takes.

        Raises NetworkError (from reading within the context too) and Forbidden.
        """
        content = b"" if body is None else json.dumps(body).encode()
        sent = {
            "Content-Type": "application/json",
            "Connection": "close",
            "User-Agent": "vlmchat",
            **headers,
        }
        if self._key is not None:
            sent["Authorization"] = f"Bearer {self._key}"
        with translated(url):
            async with self._pool.stream(
                "POST",
                url,
                headers=[("Host", urlsplit(url).netloc), *sent.items()],
                content=content,
                extensions={"timeout": {"connect": CONNECT_TIMEOUT_S}},
            ) as response:
                yield response


class translated:
    """`with translated(url)`: what httpcore raises becomes NetworkError."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, _HTTPCORE_ERRORS):
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise NetworkError(f"{self._url}: {reason}") from error


async def read(response: Readable) -> Answer:
    """The whole of an answer that is to be short. Raises NetworkError when it is not."""
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            raise NetworkError(f"the answer is larger than {_MAX_ANSWER_BYTES} bytes")
    headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in response.headers}
    return Answer(response.status, headers, bytes(body))


class _CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Opens connections to allowed addresses only."""

    def __init__(self, allowed: AllowList) -> None:
        self._allowed = allowed
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Resolve, check, dial what was checked."""
        addresses = await _resolve(host, port)
        for address in addresses:
            if not self._allowed.allows(host, address):
                raise Forbidden(
                    f"workers at {address} ({host}) are not allowed; --allow-worker lifts this"
                )
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        for address in addresses:
            try:
                return await self._sockets.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


async def _resolve(host: str, port: int) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError) as error:
        raise httpcore2.ConnectError(f"{host} is not known: {error}") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
