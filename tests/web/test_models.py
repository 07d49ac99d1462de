"""Where the page's models come from, and who judges its questions."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from tests.fakes import ScriptedBackend
from tests.server.running import MODEL, running
from tests.server.sockets import serving
from vlmchat.errors import Forbidden, NoWorker, Unavailable
from vlmchat.web import models
from vlmchat.web.models import ServedModels
from vlmchat.web.moderation import Moderation


@pytest.mark.parametrize(("keep", "left"), [(True, (MODEL,)), (False, ())])
def test_served_models_come_and_go(
    monkeypatch: pytest.MonkeyPatch, keep: bool, left: tuple[str, ...]
) -> None:
    monkeypatch.setattr(models, "FRESH_S", 0.0)
    with running(ScriptedBackend()) as worker:
        served = ServedModels(worker.url, None, 20.0, keep=keep)
        assert served.names() == (MODEL,)
        assert served.backend(MODEL).status().model == MODEL
    assert served.names() == left
    assert served.present() == ()
    assert served.trouble == "the server does not answer"  # its address is not for everybody
    assert served.seen == (MODEL,)
    with pytest.raises(NoWorker, match="not there at present"):
        served.backend(MODEL)
    served.close()


async def _judge(request: Request) -> Response:
    text = (await request.json())["input"]
    if "break" in text:
        return JSONResponse({}, 500)
    return JSONResponse({"results": [{"flagged": "bad" in text}]})


def test_moderation_lets_through_what_is_judged_and_found_well() -> None:
    async def ask() -> None:
        async with serving(Router([Route("/", _judge, methods=["POST"])])) as url:
            moderation = Moderation(f"{url}/", "key")
            await asyncio.to_thread(moderation.check, "a good question")
            with pytest.raises(Forbidden, match="rules"):
                await asyncio.to_thread(moderation.check, "a bad question")
            with pytest.raises(Unavailable, match="cannot be checked"):
                await asyncio.to_thread(moderation.check, "break it")
            moderation.close()

    asyncio.run(ask())
