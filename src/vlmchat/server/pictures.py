"""Pictures that remote clients point at: http(s) and data URLs, nothing of this machine.

Called by the worker: `check` before anything is read, `fetch` and `decode` in its bounded pools.
What a client is told of a failure names its own request, never what the address resolves to or
what a decoder tripped over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vlmchat.config import ImagePolicy
from vlmchat.conversation import Image
from vlmchat.errors import DownloadFailed, FetchRefused, ImageError, ImageRejected, NetworkError
from vlmchat.fetch import fetch
from vlmchat.images import ImageLoader

_FOR_OPERATORS = re.compile(r"(;| or) (resize it or )?raise --\S+|; --\S+ lifts this")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one picture comes from, and which part of the request says so."""

    url: str
    param: str


class Pictures:
    """Reads the pictures of requests, within one policy.

    max_count: pictures in a request.  policy.max_pixels bounds each, and all of a request together
    at twice as many.
    """

    def __init__(self, policy: ImagePolicy, max_count: int) -> None:
        self._policy = replace(policy, allow_local_files=False)
        self._loader = ImageLoader(self._policy)
        self._max_count = max_count

    def check(self, sources: Sequence[Source]) -> None:
        """Raises ImageRejected and FetchRefused for what can be refused unread."""
        if len(sources) > self._max_count:
            raise ImageRejected(
                f"the request has {len(sources)} pictures, {self._max_count} is the most"
            )
        for source in sources:
            if not is_remote(source.url) and not source.url[:5].lower() == "data:":
                raise _about(source, FetchRefused("only http, https and data URLs are read"))
            if len(source.url) * 3 // 4 > self._policy.max_bytes + 1024:
                raise _about(source, ImageRejected(f"larger than {self._policy.max_bytes} bytes"))

    def fetch(self, source: Source) -> bytes:
        """The file at an http(s) URL. Blocks. Raises ImageError of the fitting kind."""
        try:
            return fetch(source.url, self._policy)
        except FetchRefused as error:
            reason = "this address may not be fetched: public http and https addresses only"
            raise _about(source, FetchRefused(reason)) from error
        except NetworkError as error:
            raise _about(source, DownloadFailed(error.message)) from error
        except ImageError as error:
            raise _about(source, error) from error

    def decode(self, sources: Sequence[Source], fetched: Mapping[str, bytes]) -> list[Image]:
        """Every picture, each file decoded once. Blocks. Raises ImageRejected."""
        images: dict[str, Image] = {}
        pixels = 0
        for source in sources:
            if source.url not in images:
                images[source.url] = image = self._decode(source, fetched.get(source.url))
                pixels += image.width * image.height
            if pixels > 2 * self._policy.max_pixels:
                raise ImageRejected(
                    f"the request's pictures have more than {2 * self._policy.max_pixels} pixels"
                )
        return [images[source.url] for source in sources]

    def _decode(self, source: Source, data: bytes | None) -> Image:
        try:
            if data is None:
                return self._loader.load(source.url)
            return self._loader.load_bytes(data, "the picture")
        except ImageError as error:
            raise _about(source, error) from error


def is_remote(url: str) -> bool:
    """Whether it takes a fetch."""
    return url[:8].lower().startswith(("http://", "https://"))


def _about(source: Source, error: ImageError) -> ImageError:
    """The same error, naming the request's part, without what only operators may know."""
    message = _FOR_OPERATORS.sub("", error.message)
    message = re.sub(r" is broken: .*", " is broken", message)  # decoders tell of their memory
    told = type(error)(f"{source.param}: {message}")
    told.param = source.param
    return told
