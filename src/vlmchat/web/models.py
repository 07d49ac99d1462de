"""Which models a page can offer now, and the backend of each.

Called by the page. One model in this process, or those of a server, whose list is looked at again
and again: models come and go while the page stays. Knows nothing of browsers.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Protocol

import httpx2

from vlmchat.client import Client
from vlmchat.errors import NetworkError, NoWorker, Unauthorized
from vlmchat.request import Backend
from vlmchat.web.words import told

logger = logging.getLogger(__name__)

FRESH_S = 2.0  # a list is not asked for more often, however many pages look
LIST_TIMEOUT_S = 3.0


class Models(Protocol):
    """Where a page's models come from."""

    def names(self) -> tuple[str, ...]:
        """What can be chosen."""

    def present(self) -> tuple[str, ...]:
        """What answers at present."""

    @property
    def seen(self) -> tuple[str, ...]:
        """What has ever answered."""

    @property
    def trouble(self) -> str:
        """Why there is none, or nothing: for people at the page."""

    def backend(self, name: str) -> Backend:
        """Whoever answers for this model. Raises NoWorker, NetworkError and what `Client` does."""

    def close(self) -> None:
        """Give everything back."""


class OneModel:
    """A model that is there already."""

    trouble = ""

    def __init__(self, name: str, backend: Backend) -> None:
        self.seen, self._backend = (name,), backend

    def names(self) -> tuple[str, ...]:
        """See `Models`."""
        return self.seen

    def present(self) -> tuple[str, ...]:
        """See `Models`."""
        return self.seen

    def backend(self, name: str) -> Backend:
        """See `Models`."""
        return self._backend

    def close(self) -> None:
        """See `Models`."""
        self._backend.close()


class ServedModels:
    """The models of a controller, or of any OpenAI-compatible server.

    keep: a model that was there once can be chosen also while it is away. controller: `url` is a
    controller's, which knows more: a model whose workers have all failed is away, though they are
    registered still.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout_s: float,
        *,
        keep: bool,
        controller: bool = False,
    ) -> None:
        self._url, self._key, self._timeout_s, self._keep = url, api_key, timeout_s, keep
        self._controller = controller
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(headers=headers, timeout=LIST_TIMEOUT_S)
        self._looking, self._connecting = threading.Lock(), threading.Lock()
        self._looked_at = float("-inf")
        self._present: tuple[str, ...] = ()
        self.seen: tuple[str, ...] = ()
        self._clients: dict[str, Client] = {}
        self.trouble = ""

    def names(self) -> tuple[str, ...]:
        """See `Models`."""
        present = self.present()
        return self.seen if self._keep else present

    def present(self) -> tuple[str, ...]:
        """See `Models`. Who comes while the list is being asked for gets the last one."""
        if self._looking.acquire(blocking=self._looked_at < 0):
            try:
                if time.monotonic() - self._looked_at > FRESH_S:
                    self._look()
                    self._looked_at = time.monotonic()
            finally:
                self._looking.release()
        return self._present

    def backend(self, name: str) -> Backend:
        """See `Models`."""
        if name not in self.present():
            raise NoWorker(f"the model {name} is not there at present; try again")
        with self._connecting:
            if name not in self._clients:
                self._clients[name] = Client(self._url, self._key, name, self._timeout_s)
            return self._clients[name]

    def close(self) -> None:
        """See `Models`."""
        self._http.close()
        for client in self._clients.values():
            client.close()

    def _look(self) -> None:
        before = self.trouble
        try:
            self._present, self.trouble = _listed(self._http, self._url), ""
            if self._controller:
                failed = _failed(self._http, self._url)
                self._present = tuple(name for name in self._present if name not in failed)
        except (httpx2.HTTPError, NetworkError, Unauthorized, ValueError) as error:
            self._present, self.trouble = (), "the server does not answer"
            if isinstance(error, Unauthorized):
                self.trouble = told(error)
            if self.trouble != before:  # the address is for whoever runs the page
                logger.warning("no list of models from %s: %s", self._url, _why(error))
        self.seen = tuple(sorted({*self.seen, *self._present}))


def _listed(http: httpx2.Client, url: str) -> tuple[str, ...]:
    """The names in a server's list of models. Raises HTTPError, NetworkError, Unauthorized."""
    root = url.rstrip("/")
    response = http.get(f"{root}/models" if root.endswith("/v1") else f"{root}/v1/models")
    if response.status_code == 401:
        raise Unauthorized("it wants a key; give --api-key")
    response.raise_for_status()
    try:
        told: Any = response.json()
    except ValueError:
        raise NetworkError("it sent no list of models") from None
    data = told.get("data") if isinstance(told, dict) else None
    entries = data if isinstance(data, list) else []
    return tuple(sorted(str(e["id"]) for e in entries if isinstance(e, dict) and e.get("id")))


def _failed(http: httpx2.Client, url: str) -> set[str]:
    """Models none of whose workers is well, as a controller's /status has it. Raises HTTPError."""
    response = http.get(f"{url.rstrip('/').removesuffix('/v1')}/status")
    if response.status_code != 200:
        return set()  # a controller of another kind
    workers = [w for w in response.json().get("workers", []) if w.get("models")]
    well = {model for w in workers if w.get("healthy", True) for model in w["models"]}
    return {model for w in workers for model in w["models"]} - well


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
