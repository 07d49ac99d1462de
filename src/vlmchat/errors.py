"""The error tree: what can go wrong, told once, for every edge.

Each class has a `code` (stable, machine-readable), an `http_status` for servers and an
`exit_code` for the command line (the finer codes are those of BSD's sysexits.h). A message is one
line in lower case: what was wrong, with which input, and what to do. No torch, no I/O.

VlmchatError
├─ ConfigError              an option, a variable or the config file holds a bad value
├─ InvalidRequest           the request itself cannot be served
│  ├─ NoInput               nothing was asked
│  ├─ UnsupportedParameter  a parameter that is not served
│  ├─ BodyTooLarge
│  ├─ PromptTooLong
│  └─ ImageError
│     ├─ ImageNotFound      no such file
│     ├─ ImageRejected      not a picture, broken, or over a limit
│     ├─ DownloadFailed     the address was reached, no picture came
│     └─ FetchRefused       the address may not be reached
├─ Unauthorized             no key, or a wrong one
├─ Forbidden                from a host or page that may not ask
├─ Overloaded               more than may wait; try again later
├─ Unavailable              loading, or shutting down
├─ NoWorker                 no worker serves the model at present
├─ WorkerFailed             one after the other
├─ NetworkError             no network, a server that does not answer, a failed download
├─ SomeFailed               requests of a batch failed; their lines say why
├─ ModelError
│  ├─ ModelNotFound
│  ├─ UnsupportedModel
│  └─ CheckpointError       files missing, tensors missing or wrongly shaped
├─ DiskFull                 no room on the disk
├─ OutOfMemory              before loading (with the numbers) or during an answer
├─ SessionError             a saved conversation cannot be read or written
├─ TerminalError            the clipboard or the terminal cannot do what was asked
└─ EngineDead               the engine stopped; nothing can be answered any more
"""

from __future__ import annotations

from typing import ClassVar


class VlmchatError(Exception):
    """The root: whoever catches this has caught everything vlmchat raises on purpose."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 70

    @property
    def message(self) -> str:
        """The one line for people."""
        return str(self)


class ConfigError(VlmchatError):
    """An option, an environment variable or the config file holds a bad value."""

    code = "config"
    http_status = 400
    exit_code = 2


class InvalidRequest(VlmchatError):
    """The request cannot be served as it stands; `param` names what is wrong in it."""

    code = "invalid_request"
    http_status = 400
    exit_code = 65
    param: str | None = None


class NoInput(InvalidRequest):
    """Nothing was asked: there is no question on stdin."""

    code = "no_input"
    exit_code = 66


class UnsupportedParameter(InvalidRequest):
    """A parameter, or a value of it, that is known but not served: refused, never ignored."""

    code = "unsupported_parameter"


class BodyTooLarge(InvalidRequest):
    """The request has more bytes than a server takes."""

    code = "body_too_large"
    http_status = 413


class PromptTooLong(InvalidRequest):
    """The prompt does not leave room for an answer: `tokens` asked for, `limit` available."""

    code = "context_length_exceeded"

    def __init__(self, tokens: int, limit: int, image_tokens: int = 0, said: str = "") -> None:
        """said: a server's words, where it gives no numbers; these are 0 then."""
        self.tokens, self.limit, self.image_tokens = tokens, limit, image_tokens
        if said:
            super().__init__(said)
            return
        of_images = f" ({image_tokens} of them pictures)" if image_tokens else ""
        fewer_images = "use fewer pictures, " if image_tokens else ""
        super().__init__(
            f"the message needs {tokens} tokens{of_images}, "
            f"the context has room for {max(limit, 0)}; "
            f"shorten it, {fewer_images}or lower --max-new-tokens"
        )


class ImageError(InvalidRequest):
    """Anything wrong with one picture."""

    code = "invalid_image"


class ImageNotFound(ImageError):
    """The picture's path does not exist, or the clipboard or stdin holds none."""

    code = "image_not_found"
    exit_code = 66


class ImageRejected(ImageError):
    """Not a picture, a broken one, or one over a limit."""

    code = "image_rejected"


class DownloadFailed(ImageError):
    """The server that has the picture did not send it."""

    code = "image_download_failed"


class FetchRefused(ImageError):
    """The address may not be reached: scheme, private host, or redirect."""

    code = "fetch_refused"
    exit_code = 77


class Unauthorized(VlmchatError):
    """The request has no key, or one that is not known."""

    code = "unauthorized"
    http_status = 401
    exit_code = 77


class Forbidden(VlmchatError):
    """The request comes from a host or a page that may not ask."""

    code = "forbidden"
    http_status = 403
    exit_code = 77


class Overloaded(VlmchatError):
    """The server has too much to do; `retry_after_s` says when to ask again."""

    code = "overloaded"
    http_status = 429
    exit_code = 75

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Unavailable(VlmchatError):
    """The server does not answer at present: it loads its model, or shuts down."""

    code = "unavailable"
    http_status = 503
    exit_code = 75


class NoWorker(VlmchatError):
    """No worker that serves the model is there at present."""

    code = "no_worker"
    http_status = 503
    exit_code = 69


class WorkerFailed(VlmchatError):
    """Workers failed one after the other over the same request."""

    code = "worker_failed"
    http_status = 502
    exit_code = 69


class NetworkError(VlmchatError):
    """No network, or the other side did not answer as it should."""

    code = "network"
    http_status = 502
    exit_code = 69


class SomeFailed(VlmchatError):
    """Some requests of a batch failed; the output says which and why."""

    code = "some_failed"
    exit_code = 1


class ModelError(VlmchatError):
    """Anything wrong with the model that was asked for."""

    code = "model"
    exit_code = 65


class ModelNotFound(ModelError):
    """No such model: not a directory here, not in the cache, not on the hub."""

    code = "model_not_found"
    http_status = 404
    exit_code = 72


class UnsupportedModel(ModelError):
    """The checkpoint is of a kind that vlmchat does not run."""

    code = "unsupported_model"
    http_status = 400


class CheckpointError(ModelError):
    """The checkpoint's files are missing, broken or do not fit its config."""

    code = "checkpoint"


class DiskFull(VlmchatError):
    """No room on the disk."""

    code = "disk_full"
    http_status = 507
    exit_code = 74


class OutOfMemory(VlmchatError):
    """Not enough memory: known before loading, or met during an answer."""

    code = "out_of_memory"
    http_status = 503
    exit_code = 71


class SessionError(VlmchatError):
    """A saved conversation cannot be read or written."""

    code = "session"
    exit_code = 74


class TerminalError(VlmchatError):
    """The terminal or the clipboard cannot do what was asked."""

    code = "terminal"
    exit_code = 69


class EngineDead(VlmchatError):
    """The engine has stopped; restart the program."""

    code = "engine_dead"
    http_status = 503
