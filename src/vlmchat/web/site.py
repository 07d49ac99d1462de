"""The web application: Gradio's, the people's pictures and conversations, and a guard before all.

Called by `commands/web`. The guard lets in requests for hosts of this machine only where the page
is open to this machine only, and tells browsers to load nothing from other hosts.
"""

from __future__ import annotations

import logging
from datetime import datetime
from ipaddress import ip_address
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI
from gradio.themes.utils.fonts import Font
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmchat.config import ImagePolicy
from vlmchat.request import SamplingParams
from vlmchat.session_file import SavedSession
from vlmchat.store import encode_file
from vlmchat.web.page import Page
from vlmchat.web.person import People

_CSP = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors {ancestors}"
)
THREADS_BESIDE_ANSWERS = 32

CSS = """
.gradio-container, .gradio-container .fillable { max-width: 1400px !important; }
#columns { align-items: flex-start; }
#left, #right { gap: .6rem; }
#left .html-container, #right .html-container { padding: 0; }
#right { height: calc(100dvh - 6.2rem); min-height: 30rem; flex-wrap: nowrap; }
body:not(:has(#title)) #right { height: calc(100dvh - 3rem); }
#right > * { flex: none; }
#title .html-container { padding: 0; }
#title .prose { position: relative; padding-right: 6rem; max-width: none; }
#title .prose > div { display: flex; flex-wrap: wrap; align-items: baseline; column-gap: 1rem; }
#title h1 { margin: 0; font-size: 1.6rem; }
#title p { margin: 0; }
#theme, a.export { padding: .3rem .9rem; border-radius: var(--button-small-radius);
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color);
  font-size: var(--button-small-text-size); line-height: 1.4; cursor: pointer; }
#theme:hover, a.export:hover { background: var(--button-secondary-background-fill-hover); }
#theme { position: absolute; right: 0; top: .2rem; }
a.export { display: block; text-align: center; text-decoration: none; }
#files { flex-wrap: nowrap; gap: .4rem; align-items: center; }
#files > * { flex: 1 1 0; min-width: 0 !important; padding: 0 !important; }
#import { padding: .3rem .9rem !important; line-height: 1.4; }
#examples { gap: .4rem; }
#examples button { justify-content: flex-start; padding-block: .2rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .4rem; }
.pictures img { width: auto !important; height: auto !important; max-height: 200px;
  max-width: 100%; object-fit: contain; border-radius: .5rem; margin: 0; }
.pictures.waiting { flex-wrap: nowrap; overflow-x: auto; }
.pictures.waiting img { max-height: 64px; max-width: none; }
#waiting-names { padding: .3rem .7rem !important; }
#waiting-names .wrap { max-height: 4.4rem; overflow-y: auto; }
#trouble-row { flex-wrap: nowrap; align-items: stretch; gap: .5rem; }
#trouble { flex: 1 1 auto; min-width: 0 !important; padding: 0 !important; }
#retry { flex: none; width: auto; min-width: 5.5rem !important; align-self: center;
  min-height: 2.25rem; }
.trouble { border-left: .3rem solid #b91c1c; background: #fee2e2; color: #7f1d1d;
  padding: .5rem .8rem; border-radius: .3rem; overflow-wrap: anywhere; }
.dark .trouble { background: #450a0a; color: #fecaca; }
.facts { font-size: .85rem; min-height: 1.4rem; color: var(--body-text-color); }
.facts meter { width: 7rem; vertical-align: middle; }
.note { margin: 0; font-size: .9rem; }
#chat { flex: 1 1 0; height: auto !important; min-height: 8rem !important; }
#chat button[aria-label="Clear"] { display: none; }
#chat .placeholder, #chat .placeholder-content { text-align: center; }
#chat p:has(> a.edit) { margin: 0; line-height: 1; }
#chat a.edit { display: inline-block; padding: .4rem .6rem .3rem 0; font-size: .75rem;
  opacity: .8; }
#edit-at, #which, #who, .form:has(> #which) { display: none !important; }
#waiting:not(:has(img)) { display: none !important; }
#model-note:not(:has(b)) { display: none !important; }
#trouble-row:not(:has(.trouble)) { display: none !important; }
#actions { gap: .4rem; }
#actions button { flex: 1 1 5.2rem; min-width: 5.2rem !important; padding-inline: .3rem;
  white-space: nowrap; }
#stop:disabled { background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color); }
*:focus-visible { outline: 3px solid #2563eb !important; outline-offset: 1px; }
#question textarea:focus-visible { outline-width: 2px !important; border-radius: .3rem; }
#question textarea { padding-inline: .4rem; }
#question .submit-button { background: var(--button-primary-background-fill);
  color: var(--button-primary-text-color); }
#parameters :is(.min_value, .max_value) { color: var(--block-info-text-color); }
@media (max-width: 700px) {
  #right { order: -1; }
  #title p { display: none; }
  .pictures img { max-height: 160px; }
  #actions button { flex-basis: auto; min-width: 0 !important; padding-inline: .5rem; }
}
@media (max-width: 700px), (pointer: coarse) {
  #actions button, #examples button, #theme, a.export, #import, #parameters > button,
    #address button, #retry { min-height: 2.25rem; }
  #chat a.edit { padding: .6rem 1rem .6rem 0; }
  #chat .icon-button, #picture .icon, .copy_code_button { min-width: 2rem; min-height: 2rem; }
  a.export { line-height: 1.65rem; }
}
footer { display: none !important; }
"""
JS = """() => {
  document.documentElement.lang = "en";
  const set = (element, key, value) => {  // what is set anew is observed anew
    if (element && element.getAttribute(key) !== value) element.setAttribute(key, value);
  };
  const words = (message) => {  // as a person reads them
    const read = message.cloneNode(true);
    for (const button of read.querySelectorAll("a.edit, button")) button.remove();
    for (const image of read.querySelectorAll("img")) image.replaceWith(`picture: ${image.alt}. `);
    for (const block of read.querySelectorAll("p, li, td, th, pre, h1, h2, h3")) block.append(" ");
    return read.textContent.replace(/\\s+/g, " ").trim();
  };
  const name = () => {  // what Gradio leaves without one, or names by its markup
    set(document.querySelector("#question textarea"), "aria-label", "Question");
    const theme = document.querySelector("#theme");
    const other = document.body.classList.contains("dark") ? "Light" : "Dark";
    if (theme && theme.textContent !== other) theme.textContent = other;
    set(theme, "aria-label", `${other} mode`);
    for (const message of document.querySelectorAll("#chat [data-testid][aria-label]"))
      set(message, "aria-label", words(message));
  };
  const kept = (theme) => {  // what the person chose; frames of other sites may keep nothing
    try {
      if (theme) localStorage.setItem("vlmchat-theme", theme);
      return localStorage.getItem("vlmchat-theme");
    } catch { return theme; }
  };
  if (kept() && !new URL(location).searchParams.has("__theme"))
    document.body.classList.toggle("dark", kept() === "dark");
  let waiting = 0;
  const look = () => {  // a picture that was added far down on a phone is shown where it waits
    const now = document.querySelectorAll("#waiting img").length;
    if (now > waiting) document.querySelector("#right").scrollIntoView({ block: "nearest" });
    waiting = now;
    name();
  };
  look();
  const changes = { childList: true, subtree: true, attributeFilter: ["aria-label"] };
  new MutationObserver(look).observe(document.body, changes);
  new MutationObserver(name).observe(document.body, { attributeFilter: ["class"] });
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#theme"))
      kept(document.body.classList.toggle("dark") ? "dark" : "light");
    const edit = event.target.closest?.("#chat a[href*='#edit-']");
    if (!edit) return;
    event.preventDefault();
    window.editTurn = Number(edit.getAttribute("href").split("#edit-")[1]);
    document.querySelector("#edit-at").click();
    document.querySelector("#question textarea").focus();
  }, true);
  document.addEventListener("keydown", (event) => {
    const stop = document.querySelector("#stop");
    if (event.key === "Escape" && stop && !stop.disabled) stop.click();
  });
  const board = navigator.clipboard;  // a question is copied as it was typed
  const write = board?.writeText.bind(board);
  if (write) board.writeText = (text) => {
    const asked = text.includes('<a class="edit"');
    if (!asked) return write(text);
    const html = text.replace(/<(div|a) class="(pictures|edit)".*?<\\/\\1>/gs, "");
    const plain = document.createElement("textarea");
    plain.innerHTML = html;
    return write(plain.value.trim());
  };
}"""


def site(
    page: Page, people: People, policy: ImagePolicy, *, answers: int, only_local: bool, embed: bool
) -> ASGIApp:
    """The whole application. It must be run with ASGI's lifespan.

    answers: at a time. only_local: requests must name a host of this machine. embed: the page may
    stand in a frame of another site.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def picture(request: Request) -> Response:
        person = people.by_token(request.path_params["token"])
        data = person and person.shown(request.path_params["sha256"])
        if not data:
            return PlainTextResponse("no such picture", 404)
        return Response(data, media_type="image/jpeg", headers=_PRIVATE)

    async def conversation(request: Request) -> Response:
        person = people.by_token(request.path_params["token"])
        if person is None:
            return PlainTextResponse("no such conversation", 404)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        model = person.answered.model if person.answered else ""
        params = person.wishes.params if person.wishes else SamplingParams(top_p=0.7)
        saved = SavedSession(
            "web", model, params, person.conversation, now, now, person.forgotten, person.waiting
        )
        headers = {**_PRIVATE, "content-disposition": 'attachment; filename="conversation.json"'}
        return Response(encode_file(saved), media_type="application/json", headers=headers)

    app.router.routes += [
        Route("/picture/{token}/{sha256}", picture),
        Route("/conversation/{token}", conversation),
    ]
    page.blocks.max_threads = answers + THREADS_BESIDE_ANSWERS
    fonts = [Font("system-ui"), Font("Segoe UI"), Font("Roboto"), Font("sans-serif")]
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=policy.max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(
            primary_hue="blue", font=fonts, font_mono=[Font("ui-monospace"), Font("monospace")]
        ).set(**_LEGIBLE),
        css=CSS,
        js=JS,
    )
    page.blocks.has_launched = True  # from here on Gradio checks the paths that it serves and reads
    return Guard(app, only_local=only_local, ancestors="*" if embed else "'self'")


# Gradio's own are too pale to be read by all (WCAG 1.4.3).
_LEGIBLE = {
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "block_info_text_color": "*neutral_500",
    "block_info_text_color_dark": "*neutral_400",
}
_PRIVATE = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}


class Guard:
    """Before the application: hosts that may be asked for; headers that keep a page at home."""

    def __init__(self, app: ASGIApp, *, only_local: bool, ancestors: str) -> None:
        self._app, self._only_local = app, only_local
        self._policy = _CSP.format(ancestors=ancestors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._only_local and not _is_local(Headers(scope=scope).get("host", "")):
            text = "this page is for this machine only; --host opens it\n"
            await PlainTextResponse(text, 403)(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = self._policy
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
            await send(message)

        await self._app(scope, receive, guarded)


def _is_local(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
