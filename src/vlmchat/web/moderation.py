"""Asks a moderation service whether a question may be sent on.

Called by the page with --moderate. Speaks OpenAI's moderations wire: `{"input": text}` gives
`{"results": [{"flagged": bool}]}`.
"""

from __future__ import annotations

from typing import Any

import httpx2

from vlmchat.errors import Forbidden, Unavailable

TIMEOUT_S = 10.0


class Moderation:
    """A service at `url`, opened by `key`."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = url
        self._http = httpx2.Client(headers=headers, timeout=TIMEOUT_S)

    def check(self, text: str) -> None:
        """Raises Forbidden for what is flagged, Unavailable where nobody judges: unjudged
        questions are not sent."""
        try:
            response = self._http.post(self._url, json={"input": text})
            response.raise_for_status()
            told: Any = response.json()
            flagged = any(result["flagged"] for result in told["results"])
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            raise Unavailable(
                "questions cannot be checked at present, so none is sent; try again later"
            ) from None
        if flagged:
            raise Forbidden("this question breaks the rules of this page; please change it")

    def close(self) -> None:
        """Give the connection back."""
        self._http.close()
