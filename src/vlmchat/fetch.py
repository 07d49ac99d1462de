"""HTTP GET that cannot be turned inward: for pictures whose address someone else may have chosen.

Called by `images` only. Each connection, also after a redirect, resolves the host, refuses every
address that is not public, and dials the very address it has checked; the Host header and the TLS
name stay the host's. No proxies, cookies or credentials. Knows nothing of what a picture is.

Not covered: ports (any is allowed), hosts of yours that have public addresses, and what a server
learns from being asked.
"""

from __future__ import annotations

import queue
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from ssl import SSLContext
from typing import Any

import httpcore2
import httpx2

from vlmchat.config import ImagePolicy
from vlmchat.errors import FetchRefused, ImageRejected, NetworkError
from vlmchat.shown import shown, shown_bytes

Resolver = Callable[[str, int], Sequence[str]]

_HTTPCORE_ERRORS = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.UnsupportedProtocol,
    httpcore2.ConnectionNotAvailable,
    httpcore2.ProxyError,
)
_REDIRECTS = (301, 302, 303, 307, 308)
_FORBIDDEN_IN_URL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_USERINFO = re.compile(r"([^/?#]*:)?//[^/?#]*@")

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_GLOBAL_UNICAST = IPv6Network("2000::/3")  # RFC 4291: everything else in IPv6 has a special use
# `is_global` of older Pythons misses some of these; RFC 6890 and its successors.
_SPECIAL = tuple(
    ip_network(net)
    for net in (
        "100.64.0.0/10",  # carrier-grade NAT
        "168.63.129.16/32",  # Azure's platform address, the same inside every virtual network
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: embeds any IPv4 address
        "3fff::/20",  # documentation
    )
)


def fetch(url: str, policy: ImagePolicy, resolve: Resolver | None = None) -> bytes:
    """The body that `url` answers with, after at most `policy.max_redirects` redirects.

    `policy.timeout_s` bounds the whole fetch; `policy.max_bytes` bounds the body as it arrives,
    before and after decompression. resolve(host, port) gives the host's addresses; the system's
    resolver by default.

    Raises FetchRefused (scheme, private address, too many redirects), ImageRejected (too large,
    an HTML page), NetworkError (no such host, no answer in time, an HTTP error status).
    """
    deadline = _Deadline(policy.timeout_s)
    backend = _CheckedBackend(policy, deadline, resolve or _system_resolver)
    target = _parse(url)
    for _ in range(policy.max_redirects + 1):
        answer = _get(target, policy, backend)
        if isinstance(answer, bytes):
            return answer
        target = answer
    raise FetchRefused(f"{shown(url)}: more than {policy.max_redirects} redirects")


def is_public(address: str) -> bool:
    """Whether `address` (IPv4 or IPv6, perhaps with a zone) belongs to the public internet."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _GLOBAL_UNICAST:
            return False
    special = ip.is_multicast or ip.is_reserved or not ip.is_global
    return not special and not any(ip in net for net in _SPECIAL if net.version == ip.version)


def _parse(url: str, base: httpx2.URL | None = None) -> httpx2.URL:
    if _FORBIDDEN_IN_URL.search(url):
        raise FetchRefused(
            f"{shown(url)}: an address may not hold backslashes or control characters"
        )
    try:
        parsed = base.join(url) if base is not None else httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise FetchRefused(f"{shown(url)}: not a valid address ({_line(error)})") from None
    if parsed.scheme not in ("http", "https"):
        raise FetchRefused(f"{shown(url)}: only http and https addresses are fetched")
    if parsed.userinfo or _USERINFO.match(url):
        raise FetchRefused(f"{shown(url)}: an address may not hold a user name or password")
    if not parsed.host:
        raise FetchRefused(f"{shown(url)}: the address names no host")
    return parsed


def _get(url: httpx2.URL, policy: ImagePolicy, backend: _CheckedBackend) -> bytes | httpx2.URL:
    """One request: its body, or where it redirects to."""
    name = shown(str(url))
    try:
        with (
            httpcore2.ConnectionPool(network_backend=backend) as pool,
            pool.stream("GET", _core_url(url), headers=_headers(url)) as response,
        ):
            return _answer(response, url, policy)
    except httpcore2.TimeoutException:
        raise NetworkError(
            f"{name}: not received within {policy.timeout_s:g} s; raise --image-timeout"
        ) from None
    except _HTTPCORE_ERRORS as error:
        raise NetworkError(f"{name}: {_line(error) or 'the connection failed'}") from None
    except (OSError, ValueError) as error:  # bad names that only TLS or the socket notices
        raise NetworkError(f"{name}: {_line(error)}") from None


def _core_url(url: httpx2.URL) -> httpcore2.URL:
    return httpcore2.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )


def _headers(url: httpx2.URL) -> list[tuple[bytes, bytes]]:
    return [
        (b"Host", url.netloc),
        (b"User-Agent", b"vlmchat"),
        (b"Accept", b"image/*"),
        (b"Accept-Encoding", b"identity"),
        (b"Connection", b"close"),
    ]


def _answer(
    response: httpcore2.Response, url: httpx2.URL, policy: ImagePolicy
) -> bytes | httpx2.URL:
    headers = {key.lower(): value.decode("latin-1") for key, value in response.headers}
    location = headers.get(b"location")
    if response.status in _REDIRECTS and location is not None:
        return _parse(location, url)
    name = shown(str(url))
    if not 200 <= response.status < 300:
        raise NetworkError(f"{name}: the server answered {_status(response.status)}")
    content_type = headers.get(b"content-type", "").split(";")[0].strip().lower()
    if content_type in ("text/html", "application/xhtml+xml"):
        raise ImageRejected(
            f"{name}: the server sent an HTML page ({content_type}), not a picture; "
            "give the address of the picture itself"
        )
    declared = headers.get(b"content-length", "")
    if declared.isdecimal() and int(declared) > policy.max_bytes:
        raise _too_large(name, policy, f"{shown_bytes(int(declared))}, ")
    decode = _decoder(headers.get(b"content-encoding", ""), name)
    body = bytearray()
    for chunk in response.iter_stream():
        try:
            body += decode(chunk, policy.max_bytes + 1 - len(body))
        except zlib.error as error:
            raise ImageRejected(f"{name}: broken compression ({_line(error)})") from None
        if len(body) > policy.max_bytes:
            raise _too_large(name, policy)
    return bytes(body)


def _too_large(name: str, policy: ImagePolicy, size: str = "") -> ImageRejected:
    limit = shown_bytes(policy.max_bytes)
    return ImageRejected(f"{name}: {size}more than the limit of {limit}; raise --max-image-bytes")


def _decoder(encoding: str, name: str) -> Callable[[bytes, int], bytes]:
    """decode(chunk, max_length): undoes a compression that we did not ask for."""
    match encoding.strip().lower():
        case "" | "identity":
            return lambda chunk, max_length: chunk
        case "gzip" | "x-gzip" | "deflate":
            return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress  # 32: either header
        case other:
            raise ImageRejected(
                f"{name}: sent in the encoding {shown(other)}, though asked for none"
            )


def _status(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _line(error: BaseException) -> str:
    return re.sub(r"^\[Errno -?\d+\] ", "", " ".join(str(error).split()))[:200]


class _Deadline:
    """One moment by which everything must be done, however slowly it drips."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise httpcore2.ReadTimeout("deadline")
        return left_s


class _CheckedBackend(httpcore2.NetworkBackend):
    """Opens connections to checked addresses only; the one way out of this module."""

    def __init__(self, policy: ImagePolicy, deadline: _Deadline, resolve: Resolver) -> None:
        self._policy, self._deadline, self._resolve = policy, deadline, resolve
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Resolve, check, dial what was checked: the name is not looked up a second time."""
        failure: Exception = NetworkError(f"host {shown(host)} has no address")
        addresses = self._checked_addresses(host, port)
        for tried, address in enumerate(addresses):
            patience_s = self._deadline.left_s() / (len(addresses) - tried)
            try:
                stream = self._sockets.connect_tcp(address, port, patience_s)
                return _DeadlineStream(stream, self._deadline)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = NetworkError(f"cannot reach {shown(host)} port {port}: {_line(error)}")
        raise failure

    def _checked_addresses(self, host: str, port: int) -> Sequence[str]:
        addresses = _within(self._deadline, lambda: self._resolve(host, port), host)
        if not self._policy.allow_private_urls:
            for address in addresses:
                if not is_public(address):
                    raise FetchRefused(
                        f"host {shown(host)} resolves to {address}, which is not a public address; "
                        "--allow-private-urls lifts this"
                    )
        return addresses


class _DeadlineStream(httpcore2.NetworkStream):
    """A stream on which every step may take only what is left of the deadline."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: _Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left_s())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left_s())
        return _DeadlineStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _system_resolver(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _within(deadline: _Deadline, look_up: Callable[[], Sequence[str]], host: str) -> Sequence[str]:
    """The look-up's result; a thread, because the system's resolver knows no deadline."""
    results: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(look_up())
        except (OSError, ValueError, OverflowError) as error:
            results.put(error)

    threading.Thread(target=work, name="resolve", daemon=True).start()
    try:
        result = results.get(timeout=deadline.left_s())
    except queue.Empty:
        raise httpcore2.ConnectTimeout("deadline") from None
    if isinstance(result, Exception):
        raise NetworkError(f"host {shown(host)} is not known: {_line(result)}") from None
    return result
