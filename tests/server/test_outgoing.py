"""Which workers may be talked to, and how answers from them are read."""

from __future__ import annotations

import json

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route, Router

from tests.server.sockets import serving
from tests.server.test_controller import run_async
from vlmchat.errors import ConfigError, Forbidden, NetworkError
from vlmchat.server.outgoing import AllowList, Outgoing


@pytest.mark.parametrize(
    ("entries", "host", "address", "allowed"),
    [
        ((), "h", "127.0.0.1", False),
        (("127.0.0.0/8", "::1"), "h", "127.9.9.9", True),
        (("127.0.0.0/8", "::1"), "h", "::1", True),
        (("127.0.0.0/8",), "h", "::ffff:127.0.0.1", True),
        (("127.0.0.0/8",), "h", "::ffff:10.0.0.1", False),
        (("127.0.0.0/8",), "h", "fe80::1%eth0", False),
        (("localhost",), "localhost", "10.0.0.1", False),
        (("gpu1.example",), "GPU1.example", "10.0.0.1", True),
        (("gpu1.example",), "gpu2.example", "10.0.0.1", False),
        (("gpu-1", "10.example.x2"), "gpu-1", "10.0.0.1", True),
        (("10.0.0.0/24",), "h", "10.0.0.7", True),
        (("10.0.0.0/24",), "h", "10.0.1.7", False),
        (("*",), "h", "8.8.8.8", True),
    ],
)
def test_allow_list_goes_by_address_or_by_a_trusted_name(
    entries: tuple[str, ...], host: str, address: str, allowed: bool
) -> None:
    assert AllowList(entries).allows(host, address) is allowed


@pytest.mark.parametrize(
    "entry", ["", "10.0.0.1/8", "10.0.0", "http://x", "2130706433", "h.0x7f", "0x7f000001"]
)
def test_allow_list_refuses_what_is_no_address_network_or_name(entry: str) -> None:
    with pytest.raises(ConfigError, match="--allow-worker"):
        AllowList([entry])


async def _moved(request: Request) -> Response:
    return RedirectResponse("/told")


async def _told(request: Request) -> Response:
    return JSONResponse([(await request.body()).decode(), request.headers.get("authorization")])


async def _endless(request: Request) -> Response:
    return Response(b"x" * (2**20 + 1))


APP = Router(
    [
        Route("/moved", _moved, methods=["POST"]),
        Route("/told", _told, methods=["POST"]),
        Route("/endless", _endless, methods=["POST"]),
    ]
)


@run_async
async def test_outgoing_shows_its_key_and_follows_no_redirect() -> None:
    outgoing = Outgoing(AllowList(), "secret")
    async with serving(APP) as url:
        told = await outgoing.post(f"{url}/told", {"a": 1}, 5)
        moved = await outgoing.post(f"{url}/moved", None, 5)
    assert told.json() == [json.dumps({"a": 1}), "Bearer secret"]
    assert moved.status == 307
    await outgoing.close()


@run_async
async def test_outgoing_dials_allowed_addresses_only_whatever_the_name() -> None:
    outgoing = Outgoing(AllowList(["10.0.0.0/8"]))
    async with serving(APP) as url:
        for address in (
            url,
            url.replace("127.0.0.1", "localhost"),
            url.replace("127.", "2130706433."),
        ):
            with pytest.raises((Forbidden, NetworkError)):
                await outgoing.post(f"{address}/told", None, 5)


@run_async
async def test_outgoing_reads_no_more_than_an_answer_may_have() -> None:
    async with serving(APP) as url:
        with pytest.raises(NetworkError, match="larger"):
            await Outgoing(AllowList()).post(f"{url}/endless", None, 5)


@run_async
async def test_outgoing_tells_who_does_not_answer() -> None:
    with pytest.raises(NetworkError, match="http://127"):
        await Outgoing(AllowList()).post("http://127.0.0.1:9/x", None, 5)
