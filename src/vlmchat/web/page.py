"""The page itself: what is on it, and what happens when somebody does something.

Called by `site`. The only module that knows Gradio's components; what they show comes from
`markup`, what they do is done by `person`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from vlmchat.config import sampling_params
from vlmchat.errors import InvalidRequest, SessionError, Unavailable, VlmchatError
from vlmchat.images import ImageLoader
from vlmchat.request import Backend
from vlmchat.server.pictures import Pictures, Source
from vlmchat.session_file import SavedSession
from vlmchat.store import read_file
from vlmchat.web import markup, words
from vlmchat.web.log import ConversationLog, Vote
from vlmchat.web.models import Models
from vlmchat.web.moderation import Moderation
from vlmchat.web.person import Find, People, Person, Wishes
from vlmchat.web.shapes import MODES

logger = logging.getLogger(__name__)

TICK_S = 4.0  # how often an open page gives a sign of life and looks at the models
EXAMPLES = (
    ("shapes.png", "Describe the image."),
    ("star.png", "What colour is the star?"),
    ("two-circles.png", "How many shapes are there?"),
)
_FOLDER = Path(__file__).parent / "examples"
VOTES: dict[Vote, str] = {"upvote": "Good answer", "downvote": "Bad answer", "flag": "Flag"}
_LEAST_TOP_P = 0.01  # 0 on the slider: the likeliest tokens only
TITLE = (
    "<div><h1>vlmchat</h1><p>Ask a vision-language model about pictures.</p></div>"
    '<button id="theme" type="button">Dark</button>'  # the page's script names it
)
PLACEHOLDER = "Add a picture and ask about it.\n\nEnter sends, Shift+Enter begins a new line."

EDIT_AT = "() => [window.editTurn]"  # the page's script sets it, when a question's Edit is pressed
# A tab keeps its person's secret, to be known when it is loaded again; some frames keep nothing.
RECALL = '() => { try { return [sessionStorage.getItem("vlmchat")] } catch { return [""] } }'
REMEMBER = '(token) => { try { sessionStorage.setItem("vlmchat", token) } catch {} }'

Updates = dict[Any, Any]


@dataclass(frozen=True, slots=True)
class PageOptions:
    """How the page is. concurrency: answers at a time; embed: without title and frame."""

    concurrency: int = 16
    embed: bool = False


class UploadsOnly(gr.Blocks):  # type: ignore[misc]  # Gradio's types are not read
    """Gradio's page, which reads what was uploaded to it and nothing else.

    A browser names the files that it means. Gradio would copy any path of this machine before a
    handler sees it (mounted as we have it, it checks none), and fetch any address.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> Any:
        """See Gradio's Blocks."""
        uploads = Path(get_upload_folder()).resolve()
        for path in _paths(inputs):
            if not Path(path).resolve().is_relative_to(uploads):
                raise gr.Error("only files that were uploaded here are read", print_exception=False)
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def _paths(value: Any) -> Iterator[str]:
    """Every path and address in what a browser sent."""
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "path" and isinstance(item, str):
                yield item
            else:
                yield from _paths(item)


class Page:
    """The page over one source of models."""

    def __init__(
        self,
        models: Models,
        people: People,
        loader: ImageLoader,
        pictures: Pictures,
        options: PageOptions,
        log: ConversationLog | None = None,
        moderation: Moderation | None = None,
    ) -> None:
        self._models, self._people = models, people
        self._loader, self._pictures = loader, pictures
        self._options, self._log, self._moderation = options, log, moderation
        self._uploads = Path(get_upload_folder()).resolve()
        with UploadsOnly(
            title="vlmchat", analytics_enabled=False, delete_cache=(600, 600)
        ) as blocks:
            self.blocks = blocks
            self._lay_out()
            self._connect()
        self._own_files = frozenset(self._uploads.rglob("*"))
        blocks.queue(default_concurrency_limit=None, max_size=1000)

    # -- what is on it ------------------------------------------------------------------------

    def _lay_out(self) -> None:
        if not self._options.embed:
            gr.HTML(TITLE, elem_id="title")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=3, min_width=280, elem_id="left"):
                self._lay_out_left()
            with gr.Column(scale=7, min_width=300, elem_id="right"):
                self._lay_out_right()
        self.timer = gr.Timer(TICK_S)
        self.known = gr.State(())

    def _lay_out_left(self) -> None:
        self.model = gr.Dropdown([], label="Model", interactive=True, elem_id="model")
        self.model_note = gr.HTML("", elem_id="model-note")
        self.picture = gr.Image(
            label="Picture",
            sources=["upload", "webcam", "clipboard"],
            type="filepath",
            height=190,
            buttons=[],
            elem_id="picture",
        )
        self.address = gr.Textbox(
            label="Picture from the web",
            placeholder="https://…",
            submit_btn="Add",
            elem_id="address",
        )
        with gr.Column(elem_id="examples"):
            gr.HTML("Examples")
            self.examples = [
                gr.Button(question, icon=_FOLDER / name, size="sm") for name, question in EXAMPLES
            ]
            for example in self.examples:
                example.keep_in_cache.update(example.temp_files)  # their icons: see delete_cache
        with gr.Accordion("Parameters", open=False, elem_id="parameters"):
            self._lay_out_parameters()
        with gr.Row(elem_id="files"):
            self.export = gr.HTML("", elem_id="export")
            self.load = gr.UploadButton(
                "Import", size="sm", min_width=80, file_types=[".json"], elem_id="import"
            )

    def _lay_out_parameters(self) -> None:
        self.temperature = gr.Slider(
            0, 1, 0.2, step=0.1, label=words.TEMPERATURE, info="0 is deterministic."
        )
        self.top_p = gr.Slider(0, 1, 0.7, step=0.1, label=words.TOP_P)
        self.max_tokens = gr.Slider(0, 1024, 512, step=64, label=words.LONGEST, info="In tokens.")
        self.seed = gr.Textbox(label=words.SEED, placeholder="a fresh one for each answer")
        self.system = gr.Textbox(label=words.SYSTEM, lines=2)
        self.mode = gr.Radio(
            list(MODES), value=MODES[0], label="Pictures", info="What is done to them first."
        )

    def _lay_out_right(self) -> None:
        self.chat = gr.Chatbot(
            label="Conversation",
            show_label=False,
            buttons=["copy"],
            layout="bubble",
            feedback_options=None,
            allow_tags=False,
            placeholder=PLACEHOLDER,
            elem_id="chat",
        )
        with gr.Row(elem_id="trouble-row"):
            self.trouble = gr.HTML("", elem_id="trouble")
            self.retry = gr.Button(
                "Retry", variant="primary", size="sm", visible=False, elem_id="retry", scale=0
            )
        self.waiting = gr.HTML("", elem_id="waiting")
        self.waiting_names = gr.CheckboxGroup(
            [], label="Pictures for the next question", visible=False, elem_id="waiting-names"
        )
        self.question = gr.MultimodalTextbox(
            label="Question",
            placeholder="Ask about the pictures …",
            file_count="multiple",
            sources=["upload"],
            autofocus=True,
            elem_id="question",
        )
        with gr.Row(elem_id="actions"):
            button = partial(gr.Button, size="sm", min_width=80, interactive=False)
            self.stop = button("Stop", variant="stop", elem_id="stop")
            self.regenerate = button("Regenerate", elem_id="regenerate")
            self.edit = button("Edit", elem_id="edit")
            self.undo = button("Undo", elem_id="undo")
            self.clear = button("Clear", elem_id="clear")
            votes = partial(button, visible=self._log is not None)
            self.votes = {kind: votes(label, elem_id=kind) for kind, label in VOTES.items()}
        self.facts = gr.HTML("", elem_id="facts")
        self.edit_at = gr.Button("Edit an earlier question", elem_id="edit-at")  # see EDIT_AT
        self.which = gr.Number(label="Which", elem_id="which")
        self.token = gr.Textbox(label="Who", elem_id="who")

    # -- what happens -------------------------------------------------------------------------

    def _connect(self) -> None:
        small: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # Gradio's own reading of files would decode pictures, and fetch what addresses name.
        raw = {**small, "preprocess": False}
        turn = {**raw, "concurrency_limit": self._options.concurrency, "concurrency_id": "answer"}
        wishes = {self.model, self.temperature, self.top_p, self.max_tokens, self.seed}
        wishes |= {self.system, self.mode}
        shown = self._outputs()
        self.question.submit(self._ask, {self.question, *wishes}, shown, **turn)
        self.regenerate.click(self._again, wishes, shown, **turn)
        self.retry.click(self._retry, {self.question, *wishes}, shown, **turn)
        # Beside the queue, so that it is never behind the answer that it stops.
        self.stop.click(self._stop, None, None, queue=False, **small)
        self.edit.click(self._edit, None, shown, **small)
        self.edit_at.click(self._edit_at, [self.which], shown, js=EDIT_AT, **small)
        self.undo.click(self._undo, None, shown, **small)
        gr.on([self.clear.click, self.chat.clear], self._clear, None, shown, **small)
        self.picture.input(self._attach_file, [self.picture], shown, **raw)
        self.address.submit(self._attach_address, [self.address], shown, **small)
        self.waiting_names.input(self._choose_waiting, [self.waiting_names], shown, **small)
        for example, (name, text) in zip(self.examples, EXAMPLES, strict=True):
            example.click(self._example(name, text), None, shown, **small)
        for kind, vote in self.votes.items():
            vote.click(self._vote(kind), None, shown, **small)
        self.load.upload(self._load_file, [self.load], shown, **raw)
        models = [self.model, self.model_note, self.known]
        self.timer.tick(self._look, [self.model, self.known], models, **small)
        self.model.input(self._choose_model, [self.model], [self.model_note], **small)
        arrived = [*models, *shown, self.mode, self.export, self.token]
        loaded = self.blocks.load(self._arrive, [self.token], arrived, js=RECALL, **small)
        loaded.then(None, [self.token], None, js=REMEMBER, **small)
        self.blocks.unload(self._leave)

    def _outputs(self) -> list[Any]:
        return [
            *(self.chat, self.trouble, self.retry, self.waiting, self.waiting_names),
            *(self.question, self.stop, self.regenerate, self.edit, self.undo, self.clear),
            *(self.address, self.picture, self.facts, *self.votes.values()),
            *(self.system, self.temperature, self.top_p, self.max_tokens, self.seed),
        ]

    def _view(self, person: Person) -> Updates:
        """Everything that depends on the person's state."""
        busy, asked = person.busy, bool(person.conversation.turns or person.open)
        names = [f"{n}. {image.source}" for n, image in enumerate(person.waiting, 1)]
        voting = not busy and person.answered is not None and not person.voted
        label = "Question"
        if person.edited is not None:
            number = len(person.edited.before.turns) + 1
            goes = len(person.conversation.turns) > number
            label = f"Question {number}, to be changed{'; what follows goes' if goes else ''}"
        return {
            self.chat: markup.messages(person),
            self.trouble: markup.trouble(person.trouble),
            self.retry: gr.update(visible=person.open is not None and not busy),
            self.waiting: markup.waiting(person),
            self.waiting_names: gr.update(choices=names, value=names, visible=bool(names)),
            self.stop: gr.update(interactive=busy),
            self.regenerate: gr.update(interactive=asked and not busy),
            self.edit: gr.update(
                interactive=asked and not busy, value="Keep as it was" if person.edited else "Edit"
            ),
            self.undo: gr.update(interactive=asked and not busy),
            self.clear: gr.update(interactive=(asked or bool(names)) and not busy),
            self.facts: markup.facts(person),
            self.question: gr.update(label=label),
            **{
                vote: gr.update(
                    interactive=voting,
                    value=f"{'✓ ' if person.voted == kind else ''}{VOTES[kind]}",
                )
                for kind, vote in self.votes.items()
            },
        }

    def _told(self, person: Person, error: VlmchatError) -> Updates:
        """The view with what went wrong."""
        person.trouble = words.told(error)
        return self._view(person)

    def _filled(self, text: str, label: str = "Question") -> Any:
        return gr.update(value={"text": text, "files": []}, label=label)

    # -- coming, going, models ----------------------------------------------------------------

    def _arrive(self, token: str | None, request: gr.Request) -> Updates:
        """A page was loaded: a fresh conversation, or the one that stood there before it was loaded
        again; `?model=NAME` is honoured."""
        person = self._people.back(_tab(request), token or "")
        person.model = str(request.query_params.get("model", person.model))
        link = f'href="conversation/{person.token}" download="conversation.json"'
        model, note, known = self._look("", (), request)
        view = self._view(person)
        if person.edited is not None:
            text = person.edited.question.text
            view[self.question] = self._filled(text, view[self.question]["label"])
        if person.wishes is not None:
            view |= {**self._controls(person.wishes), self.mode: person.wishes.mode}
        return {
            **view,
            self.model: model,
            self.model_note: note,
            self.known: known,
            self.export: f'<a class="export" {link}>Export</a>',
            self.token: person.token,
        }

    def _leave(self, request: gr.Request) -> None:
        self._people.leave(_tab(request))

    def _look(
        self, chosen: str | None, known: tuple[str, ...], request: gr.Request
    ) -> tuple[Any, Any, Any]:
        """What models there are now; one is chosen where none was."""
        person = self._people.of(_tab(request))
        names, present = self._models.names(), self._models.present()
        wishes = (person.model, chosen or "", *present, *names)
        pick = next((wish for wish in wishes if wish in names), "")
        now = (*names, pick)
        changed = gr.update(choices=list(names), value=pick or None)
        model = gr.skip() if tuple(known) == now else changed
        return model, self._note(pick, present, person.model), now

    def _choose_model(self, chosen: str | None, request: gr.Request) -> str:
        person = self._people.of(_tab(request))
        person.model = chosen or ""
        return self._note(person.model, self._models.present(), person.model)

    def _note(self, chosen: str, present: tuple[str, ...], wish: str) -> str:
        text = ""
        if not (present or self._models.seen):
            trouble = self._models.trouble
            because = f" {trouble[:1].upper()}{trouble[1:]}." if trouble else ""
            text = f"No model is there yet.{because} This page looks again by itself."
        elif chosen not in present:
            gone = chosen or wish or "The model"
            text = f"{gone} has gone. This page goes on by itself when it is back."
        elif wish and wish != chosen:
            text = f"{wish} is not here; {chosen} answers."
        shown = f"<b>{escape(text)}</b>" if text else ""
        return f'<p role="status" class="note">{shown}</p>'

    # -- turns --------------------------------------------------------------------------------

    def _ask(self, values: Updates, request: gr.Request) -> Iterator[Updates]:
        """A question was sent, with the files in its box."""
        person, asked = self._people.of(_tab(request)), values[self.question]
        text = str(asked["text"])
        try:
            if person.busy:
                raise InvalidRequest("an answer is under way; stop it first")
            self._attach_files(person, asked["files"])
            wishes, find = self._wishes(values), self._finder(text, values)
            ask = person.ask_edited if person.edited else person.ask
            turn = ask(text, find, wishes)
            yield from self._turn(person, turn, request, {self.question: self._filled("")})
        except VlmchatError as error:
            yield {**self._told(person, error), self.question: self._filled(text)}

    def _retry(self, values: Updates, request: gr.Request) -> Iterator[Updates]:
        """After an error. A question that is being changed is asked as it stands in the box."""
        person = self._people.of(_tab(request))
        yield from (self._ask if person.edited else self._again)(values, request)

    def _again(self, values: Updates, request: gr.Request) -> Iterator[Updates]:
        """Regenerate, and Retry where the question is not being changed."""
        person = self._people.of(_tab(request))
        try:
            find = self._finder(person.last_question(), values)
            turn = person.again(find, self._wishes(values))
            yield from self._turn(person, turn, request, {})
        except VlmchatError as error:
            yield self._told(person, error)

    def _turn(
        self, person: Person, turn: Iterator[None], request: gr.Request, first: Updates
    ) -> Iterator[Updates]:
        before = person.answered
        next(turn)  # until here the question can be refused
        yield {**self._view(person), **first}
        for _ in turn:
            yield {self.chat: markup.messages(person)}
        if person.answered is not before and person.answered is not None and self._log:
            self._write(self._log.chat, person.conversation, person.answered, _ip(request))
        view = self._view(person)
        if person.edited is not None:  # it is to be changed before it is asked again
            label = view[self.question]["label"]
            view[self.question] = self._filled(person.edited.question.text, label)
        else:  # what has been typed meanwhile stays
            del view[self.question]
        yield view

    def _wishes(self, values: Updates) -> Wishes:
        """Raises InvalidRequest, ConfigError for values that cannot be."""
        seed = str(values[self.seed] or "").strip()
        if seed and not (seed.isdecimal() and len(seed) < 20 and int(seed) < 2**63):
            raise InvalidRequest(
                f"{words.SEED} is {seed[:40]!r}; it must be a whole number below 2^63, or empty"
            )
        params = sampling_params(
            temperature=float(values[self.temperature]),
            top_p=max(float(values[self.top_p]), _LEAST_TOP_P),
            max_new_tokens=max(1, int(values[self.max_tokens])),
            seed=int(seed) if seed else None,
        )
        system, mode = str(values[self.system] or ""), str(values[self.mode])
        return Wishes(self._chosen(values), params, system, mode)

    def _chosen(self, values: Updates) -> str:
        return str(values[self.model] or next(iter(self._models.present()), ""))

    def _finder(self, text: str, values: Updates) -> Find:
        """Gives whoever answers, once the question has passed moderation."""
        model = self._chosen(values)

        def find() -> Backend:
            if not model:
                raise Unavailable("no model is there at present; try again once there is one")
            if self._moderation is not None:
                self._moderation.check(text)
            return self._models.backend(model)

        return find

    def _stop(self, request: gr.Request) -> None:
        self._people.of(_tab(request)).stop()

    def _edit(self, request: gr.Request) -> Updates:
        """The last question into the box; a second press leaves it as it was."""
        person = self._people.of(_tab(request))
        if person.edited is None:
            return self._take_up(person, None)
        try:
            person.leave_unchanged()
        except VlmchatError as error:
            return self._told(person, error)
        return {**self._view(person), self.question: self._filled("")}

    def _edit_at(self, index: float | None, request: gr.Request) -> Updates:
        """An earlier question into the box."""
        return self._take_up(self._people.of(_tab(request)), int(index or 0))

    def _take_up(self, person: Person, index: int | None) -> Updates:
        try:
            text = person.edit(index)
        except VlmchatError as error:
            return self._told(person, error)
        view = self._view(person)
        return {**view, self.question: self._filled(text, view[self.question]["label"])}

    def _undo(self, request: gr.Request) -> Updates:
        person = self._people.of(_tab(request))
        try:
            text = person.undo()
        except VlmchatError as error:
            return self._told(person, error)
        return {**self._view(person), self.question: self._filled(text)}

    def _clear(self, request: gr.Request) -> Updates:
        person = self._people.of(_tab(request))
        try:
            person.clear()
        except VlmchatError as error:
            return self._told(person, error)
        return {**self._view(person), self.question: self._filled("")}

    # -- pictures -----------------------------------------------------------------------------

    def _attach_file(self, file: Any, request: gr.Request) -> Updates:
        person = self._people.of(_tab(request))
        try:
            self._attach_files(person, [file] if file else [])
        except VlmchatError as error:
            return {**self._told(person, error), self.picture: None}
        return {**self._view(person), self.picture: None}

    def _attach_files(self, person: Person, files: list[Any]) -> None:
        """Read, check and forget what was uploaded. Raises the first ImageError met.

        files: Gradio's descriptions of them, as a browser sent them.
        """
        first: VlmchatError | None = None
        for file in files:
            name = str(file.get("orig_name") or "picture")
            try:
                person.attach(self._loader.load_bytes(self._taken(file), name))
            except VlmchatError as error:
                first = first or error
        if first is not None:
            raise first

    def _uploaded(self, file: Any) -> Path:
        """Where an upload lies. Raises InvalidRequest for any other file of this machine."""
        found = file[0] if isinstance(file, list) and file else file
        path = Path(str(found.get("path") if isinstance(found, dict) else "")).resolve()
        if not path.is_relative_to(self._uploads):
            raise InvalidRequest("only files that were uploaded here are read")
        if not path.is_file():
            raise InvalidRequest("the upload was lost; send the file again")
        return path

    def _taken(self, file: Any) -> bytes:
        """An upload's bytes; the file goes."""
        path = self._uploaded(file)
        data = path.read_bytes()
        self._remove(path)
        return data

    def _remove(self, path: Path) -> None:
        """Gradio names uploads by their content: one may be an example's icon."""
        if path not in self._own_files:
            path.unlink(missing_ok=True)

    def _attach_address(self, address: str, request: gr.Request) -> Updates:
        person, address = self._people.of(_tab(request)), (address or "").strip()
        try:
            if not address.lower().startswith(("http://", "https://")):
                raise InvalidRequest("give an address that begins with http:// or https://")
            data = self._pictures.fetch(Source(address, "the picture"))
            person.attach(self._loader.load_bytes(data, address))
        except VlmchatError as error:
            return self._told(person, error)
        return {**self._view(person), self.address: ""}

    def _choose_waiting(self, names: list[str], request: gr.Request) -> Updates:
        person = self._people.of(_tab(request))
        person.keep_waiting([int(name.partition(".")[0]) - 1 for name in names])
        return self._view(person)

    def _example(self, name: str, text: str) -> Callable[..., Updates]:
        def fill(request: gr.Request) -> Updates:
            person = self._people.of(_tab(request))
            try:
                person.attach(self._loader.load_bytes((_FOLDER / name).read_bytes(), name))
            except VlmchatError as error:
                return self._told(person, error)
            return {**self._view(person), self.question: self._filled(text)}

        return fill

    # -- what is kept -------------------------------------------------------------------------

    def _vote(self, kind: Vote) -> Callable[..., Updates]:
        def vote(request: gr.Request) -> Updates:
            person = self._people.of(_tab(request))
            if self._log and person.answered is not None and not (person.voted or person.busy):
                person.voted = kind
                model = person.answered.model
                self._write(self._log.vote, kind, person.conversation, model, _ip(request))
            return self._view(person)

        return vote

    def _write(self, record: Callable[..., None], *values: Any) -> None:
        """Into the log. A full disk ends no chat."""
        try:
            record(*values)
        except OSError as error:
            logger.warning("the log cannot be written: %s", error)

    def _load_file(self, file: Any, request: gr.Request) -> Updates:
        """Go on with an exported conversation, or with a file of the terminal's /save."""
        person = self._people.of(_tab(request))
        try:
            saved = self._saved(self._uploaded(file))
            person.resume(saved.conversation, saved.forgotten, saved.params)
            for image in saved.queued:
                person.attach(image)
            if saved.lost:
                raise InvalidRequest(f"the file lacks {len(saved.lost)} of its pictures")
        except VlmchatError as error:
            return self._told(person, error)
        assert person.wishes is not None
        return {**self._view(person), **self._controls(person.wishes)}

    def _controls(self, wishes: Wishes) -> Updates:
        params = wishes.params
        return {
            self.system: wishes.system,
            self.temperature: params.temperature,
            self.top_p: params.top_p,
            self.max_tokens: params.max_new_tokens,
            self.seed: "" if params.seed is None else str(params.seed),
        }

    def _saved(self, path: Path) -> SavedSession:
        """The conversation in an upload, which goes. Raises SessionError."""
        try:
            return read_file(path, self._loader)
        except SessionError as error:
            logger.warning("an import failed: %s", error.message)
            raise SessionError(
                "this file is no exported conversation, is broken, or is of a newer version"
            ) from None
        finally:
            self._remove(path)


def _tab(request: gr.Request) -> str:
    """What names a person's tab."""
    return str(request.session_hash)


def _ip(request: gr.Request) -> str:
    return request.client.host if request.client else ""
