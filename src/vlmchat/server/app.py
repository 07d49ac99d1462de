"""The edge that worker and controller share: who may come in, how much, and how it ends.

Wraps their routes in one ASGI application: request ids, keys, hosts and origins, the size of
bodies, errors as OpenAI's error objects, one log record for each request. Knows no models.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmchat.errors import (
    BodyTooLarge,
    Forbidden,
    InvalidRequest,
    Overloaded,
    Unauthorized,
    VlmchatError,
)

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)  # what is told without a key
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CLIENT_CLOSED = 499  # what logs and metrics say of a client that has left


class Keys:
    """The keys that open a server; none at all leave it open."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_sha256(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __or__(self, other: Keys) -> Keys:
        both = Keys()
        both._digests = self._digests + other._digests
        return both

    def __contains__(self, name: object) -> bool:
        """Whether one of them has this short name."""
        return name in [_name(digest) for digest in self._digests]

    def name_of(self, authorization: str) -> str:
        """A short name, fit for logs, of the key in `Bearer KEY`. Raises Unauthorized.

        Every key is compared, each in constant time.
        """
        scheme, _, key = authorization.partition(" ")
        given = _sha256(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("a key is needed: send the header 'Authorization: Bearer KEY'")
        return _name(given)


def _name(digest: bytes) -> str:
    return f"key:{digest.hex()[:8]}"


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


@dataclass
class HeldBytes:
    """How many bytes of requests a server holds at a time, and may hold."""

    limit: int
    held: int = 0

    def take(self, count: int) -> None:
        """Raises Overloaded when `count` more would be too many."""
        if self.held + count > self.limit:
            raise Overloaded(f"requests under way hold {self.held} bytes, {self.limit} is the most")
        self.held += count

    def give(self, count: int) -> None:
        """Back what was taken."""
        self.held -= count


@dataclass(frozen=True, slots=True)
class EdgePolicy:
    """Who may come in, and with how much.

    only_local: the server listens on loopback without a key, so requests must name a loopback
    host, or pages of strangers could reach it through a browser (DNS rebinding).
    """

    keys: Keys = field(default_factory=Keys)
    max_body_bytes: int = 64 * 2**20
    max_held_bytes: int = 2**30
    body_timeout_s: float = 60.0
    only_local: bool = False


class Edge:
    """The application: `routes` behind the policy.

    log(record) is called once for each request, when it has ended. Routes may put more into
    `request.state.record`; the client's name is in `request.state.client`, and what they keep
    beside the body they count by `request.state.hold(bytes)`, which raises Overloaded.
    """

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        policy: EdgePolicy,
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self._router: ASGIApp = Router(routes, redirect_slashes=False)
        self._policy = policy
        self._log = log
        self.held = HeldBytes(policy.max_held_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, from the first byte to the log line."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record: dict[str, Any] = {
            "time": round(time.time(), 3),
            "request_id": request_id,
            "method": request.method,
            "path": request.url.path[:200],
        }
        start = time.monotonic()
        answer = _Answer(send, request_id)
        body = _Body(receive, self._policy, self.held)
        scope["app"] = self
        scope["state"] = {"record": record, "hold": body.hold}
        try:
            scope["state"]["client"] = record["client"] = self._admit(request)
            body.expect(request.headers.get("content-length", ""))
            await self._router(scope, body.receive, answer.send)
        except (ClientDisconnect, asyncio.CancelledError):
            record["status"] = CLIENT_CLOSED
        except Exception as error:  # the edge: whatever it was, the client gets an error object
            note(record, error)
            if not answer.started:
                await error_response(error)(scope, receive, answer.send)
        finally:
            body.forget()
            record.setdefault("status", answer.status)
            record["total_s"] = round(time.monotonic() - start, 4)
            self._log(record)

    def _admit(self, request: Request) -> str:
        """The client's name: of its key, else its address. Raises Unauthorized, Forbidden."""
        host = request.headers.get("host", "")
        if self._policy.only_local and not _is_local(host):
            raise Forbidden(
                f"this server answers to loopback addresses, not to {host[:100]!r}; "
                "start it with --api-key to use other names"
            )
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Forbidden("requests from other sites' pages are not answered")
        address = request.client.host if request.client else "unknown"
        if self._policy.keys and request.url.path not in OPEN_PATHS:
            return self._policy.keys.name_of(request.headers.get("authorization", ""))
        return address


class _Answer:
    """Sends with the request's id, and remembers how far it got."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._id = send, request_id.encode()
        self.started, self.status = False, 500

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._id)]
            message = {**message, "headers": headers}
        await self._send(message)


class _Body:
    """Receives, within the policy's bytes and time, and within what the server may hold."""

    def __init__(self, receive: Receive, policy: EdgePolicy, held: HeldBytes) -> None:
        self._receive, self._policy, self._held = receive, policy, held
        self._size, self._taken, self._complete = 0, 0, False
        self._deadline = asyncio.get_running_loop().time() + policy.body_timeout_s

    def expect(self, content_length: str) -> None:
        """Refuse by the header what would be refused later. Raises BodyTooLarge."""
        if content_length.isdecimal() and int(content_length[:20]) > self._policy.max_body_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to leave
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise InvalidRequest(
                f"the body did not arrive within {self._policy.body_timeout_s:g} s"
            ) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            if self._size + size > self._policy.max_body_bytes:
                raise self._too_large()
            self._size += size
            self.hold(size)
            self._complete = not message.get("more_body", False)
        return message

    def hold(self, count: int) -> None:
        """Count bytes as held until the request ends. Raises Overloaded."""
        self._held.take(count)
        self._taken += count

    def forget(self) -> None:
        """The request is over: its bytes are held no more."""
        self._held.give(self._taken)
        self._taken = 0

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._policy.max_body_bytes} bytes")


def _is_local(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises InvalidRequest where it is none (NaN and the like included)."""
    body = await request.body()
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InvalidRequest(f"the body is not JSON: {reason}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def error_object(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object for anything that can go wrong."""
    status, code, message = _described(error)
    fallback = "invalid_request_error" if status < 500 else "server_error"
    kind = _ERROR_TYPES.get(status, fallback)
    param = getattr(error, "param", None)
    told = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": {key: value and _sendable(value) for key, value in told.items()}}


def _sendable(text: str) -> str:
    """Without lone surrogates, which a client can send as \\u escapes, and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def error_response(error: BaseException) -> JSONResponse:
    """The same with its status and headers."""
    status = _described(error)[0]
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after_s)
    elif status == 503:
        headers["retry-after"] = "5"
    elif status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_object(error), status, headers)


def _described(error: BaseException) -> tuple[int, str, str]:
    """HTTP status, code, and what a client is told."""
    if isinstance(error, VlmchatError):
        return error.http_status, error.code, error.message
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        return error.status_code, codes.get(error.status_code, "http"), error.detail.lower()
    if isinstance(error, MemoryError):
        return 503, "out_of_memory", "out of memory"
    return 500, "internal", "internal error; the server's log has it under this request's id"


def note(record: dict[str, Any], error: Exception) -> None:
    """Into the log record; a bug with its traceback."""
    status, code, message = _described(error)
    record["error"] = {"code": code, "message": message}
    if status == 500:
        logger.error("request %s failed", record["request_id"], exc_info=error)
