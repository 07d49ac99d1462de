"""The engine: requests in, streams of text out, one thread that owns the model.

`Engine` is the `Backend` of this process. Callers' threads render and encode; the engine's thread
schedules, runs and samples. Imports torch only inside `Engine.load`.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import replace
from typing import TYPE_CHECKING

from vlmchat.config import EngineConfig, ModelConfig
from vlmchat.conversation import Conversation, Image
from vlmchat.engine.detokenizer import Detokenizer
from vlmchat.engine.prefix_cache import PrefixCache
from vlmchat.engine.scheduler import Chunk, Scheduler, Step
from vlmchat.engine.sequence import ImageSpan, Row, Sequence
from vlmchat.engine.speculation import PromptLookup, RowCost
from vlmchat.errors import EngineDead, OutOfMemory, PromptTooLong, UnsupportedModel, VlmchatError
from vlmchat.queued_stream import Outlet, QueuedStream
from vlmchat.request import FinishReason, PromptSize, SamplingParams, Status

if TYPE_CHECKING:
    import torch

    from vlmchat.engine.loader import LoadedModel
    from vlmchat.engine.processor import Processor
    from vlmchat.engine.runner import Runner
    from vlmchat.engine.sampler import Sampler
    from vlmchat.engine.vision import VisionCache

_log = logging.getLogger(__name__)
_LIMITS = EngineConfig()
_OVER = object()
_WARM_UP_SIZE = (336, 336)
_NOT_A_NUMBER = (
    "the model's output is not a number; its weights may be broken, or another --dtype may hold "
    "them (bfloat16, float32)"
)


TOKENS_BEFORE = 8  # of an answer's given beginning: enough to tell how the next one is written


class EngineStream(QueuedStream):
    """One answer on its way out of the engine."""

    def __init__(self, sequence: Sequence, outlet: Outlet) -> None:
        super().__init__(outlet, sequence.cancel)
        self.sequence = sequence


class Engine:
    """A model in this process, answering any number of streams."""

    def __init__(
        self,
        runner: Runner,
        processor: Processor,
        sampler: Sampler,
        eos_token_ids: frozenset[int],
        status: Status,
        num_slots: int = 1,
        *,
        vision: VisionCache | None = None,
        limits: EngineConfig = _LIMITS,
    ) -> None:
        """num_slots: sequences that the runner holds.  vision: the runner's, to fill ahead."""
        self._runner = runner
        self._processor = processor
        self._sampler = sampler
        self._eos_token_ids = eos_token_ids
        self._status = status
        self._vision = vision
        self._speculation = limits.speculation
        self._part_length = limits.max_num_batched_tokens
        self._row_cost = RowCost()
        self._scheduler = Scheduler(
            PrefixCache(num_slots),
            limits.max_num_batched_tokens,
            splits_pictures=runner.splits_pictures,
        )
        self._generated = self._drafted = self._accepted = self._encoded = 0
        # Inbox and `_dead` change under one lock, so that no stream is queued for a dead engine.
        self._wake = threading.Condition()
        self._inbox: list[Sequence] = []
        self._dead: EngineDead | None = None
        self._warming: Iterator[None] | None = None
        self._warm = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vlmchat-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        progress: Callable[[str], None] = lambda stage: None,
        limits: EngineConfig = _LIMITS,
    ) -> Engine:
        """Load a model. `progress` is told each stage in words, and what to heed as `note: …`.

        Raises ConfigError, ModelNotFound, NetworkError, UnsupportedModel, CheckpointError and
        OutOfMemory (before any weight is read).
        """
        if config.tensor_parallel > 1:
            return cls._shared(config, progress, limits)
        from vlmchat.engine.spare import spare_imports

        spare_imports()
        from vlmchat.engine.loader import load_model

        loaded = load_model(config, progress, limits.answer_tokens)
        engine = cls.over(loaded, config, limits, progress)
        gc.freeze()  # all this stays; looking through it again takes as long as some tokens
        return engine

    @classmethod
    def _shared(
        cls, config: ModelConfig, progress: Callable[[str], None], limits: EngineConfig
    ) -> Engine:
        """As `load`, over several processes."""
        from vlmchat.engine.parallel import Team, load_whole

        team = Team(config)
        loaded = load_whole(config, progress, limits.answer_tokens)
        team.join(loaded)
        return cls.over(replace(loaded, team=team), config, limits, progress)

    @classmethod
    def over(
        cls,
        loaded: LoadedModel,
        config: ModelConfig,
        limits: EngineConfig = _LIMITS,
        progress: Callable[[str], None] = lambda stage: None,
    ) -> Engine:
        """The engine of a model that is loaded, for whoever wants to look at the model too.

        Raises OutOfMemory when the keys and values of not one sequence fit, and ConfigError.
        """
        from vlmchat.engine.borrowed import take_over
        from vlmchat.engine.capacity import make_runner
        from vlmchat.engine.grammar import Grammars
        from vlmchat.engine.memory import give_threads_back
        from vlmchat.engine.processor import Processor
        from vlmchat.engine.sampler import Sampler
        from vlmchat.engine.vision import VisionCache

        spec, vision = loaded.spec, VisionCache(loaded.model, limits.image_cache)
        grammars = Grammars(loaded.processor.tokenizer, spec.eos_token_ids)
        runner, slots, name = make_runner(loaded, vision, config, limits)
        take_over(loaded.model)
        give_threads_back()  # from here on the engine's own thread computes
        fewer = slots.count < (limits.max_num_seqs or 1)
        asked = f"; {limits.max_num_seqs} were asked for, more do not fit" if fewer else ""
        progress(f"{'note: ' if fewer else ''}slots for conversations: {slots}{asked}")
        details = (*loaded.status.details, ("runner", name), ("slots", f"{slots}{asked}"))
        return cls(
            runner,
            Processor(loaded.processor, spec, loaded.template),
            Sampler(spec.repetition_penalty, spec.vocab_size, grammars),
            spec.eos_token_ids,
            replace(loaded.status, details=details),
            slots.count,
            vision=vision,
            limits=limits,
        )

    def stream(self, conversation: Conversation, params: SamplingParams) -> EngineStream:
        """See `Backend.stream`."""
        prompt = self._processor.encode(conversation)
        limit = self._status.context_length - params.max_new_tokens
        if len(prompt.ids) > limit:
            raise PromptTooLong(len(prompt.ids), limit, prompt.num_image_tokens)
        stop = params.stop + self._processor.stop
        begun = prompt.ids[-TOKENS_BEFORE:] if conversation.begun else ()
        detokenizer = Detokenizer(self._processor.tokenizer, stop, begun)
        # The sequence knows the outlet, not the stream: only the caller holds that.
        outlet = Outlet()
        sequence = Sequence(prompt, params, detokenizer, self._eos_token_ids, outlet.put)
        sequence.sampler_state = self._sampler.start(params, prompt.ids)
        stream = EngineStream(sequence, outlet)
        with self._wake:
            if self._dead is not None:
                raise self._dead
            self._inbox.append(sequence)
            self._wake.notify()
        return stream

    def count(self, conversation: Conversation) -> PromptSize:
        """See `Backend.count`."""
        return self._processor.count(conversation)

    def render(self, conversation: Conversation) -> str:
        """The prompt as text, for people who want to see it."""
        return self._processor.render(conversation)

    def status(self) -> Status:
        """See `Backend.status`."""
        load = self._scheduler.load()
        with self._wake:
            inbox = [len(sequence.prefix.ids) for sequence in self._inbox]
        load = replace(
            load,
            waiting=load.waiting + len(inbox),
            waiting_tokens=load.waiting_tokens + sum(inbox),
            generated_tokens=self._generated,
            drafted=self._drafted,
            accepted=self._accepted,
            images_cached=max(0, load.images - self._encoded),
        )
        return replace(self._status, load=load)

    def warm_up(self) -> threading.Event:
        """Let vision, prefill and decode run once while nobody asks, on a picture of nothing.

        What is made at first use is then there for the first answer. Nothing is left behind; the
        first request waits for one part of it at most, and ends it. The event: it is over.
        """
        with self._wake:
            if self._dead is None and not self._warm.is_set() and self._warming is None:
                self._warming = self._warm_parts()
                self._wake.notify()
        return self._warm

    def close(self) -> None:
        """See `Backend.close`. Returns once the thread has ended its step."""
        self._die(EngineDead("the engine was closed"))
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                self._step(self._scheduler.schedule())
                self._scheduler.reap()
        except Exception as error:  # whatever it was, every stream must hear of it
            self._die(EngineDead(f"the engine failed: {error}; restart vlmchat"), error)
        with self._wake:
            reason = self._dead or EngineDead("the engine was closed")
            for sequence in self._inbox:
                sequence.fail(reason)
        self._scheduler.abandon(reason)

    def _die(self, reason: EngineDead, cause: Exception | None = None) -> None:
        reason.__cause__ = cause
        with self._wake:
            self._dead = self._dead or reason
            self._wake.notify()

    def _admit(self) -> bool:
        """Take in new sequences; with nothing to do, warm up or wait. False: stop."""
        while True:
            with self._wake:
                while self._idle and self._warming is None:
                    self._wake.wait()
                if not self._idle:
                    self._warming = None  # the slots are for sequences from now on
                    self._warm.set()
                    for sequence in self._inbox:
                        self._scheduler.add(sequence)
                    self._inbox.clear()
                    return self._dead is None
                parts = self._warming
            if parts is not None and next(parts, _OVER) is _OVER:
                self._warming = None
                self._warm.set()

    @property
    def _idle(self) -> bool:
        return self._dead is None and not self._inbox and self._scheduler.idle

    def _warm_parts(self) -> Iterator[None]:
        """See `warm_up`; between its parts somebody may ask. Whatever fails, fails again there."""
        vision = self._vision
        spans: tuple[ImageSpan, ...] = ()
        try:
            prompt = self._processor.encode(_nothing_to_see())
            if len(prompt.ids) > self._status.context_length:
                return
            spans = prompt.images
            for span in spans:
                yield
                if vision is not None:
                    vision.features(span)
            start, length = 0, self._part_length
            while start < len(prompt.ids):
                yield
                split = self._runner.splits_pictures
                stop = prompt.part(start, length, splits_pictures=split)
                self._runner.prefill(0, prompt, start, stop)
                start = stop
            yield
            self._runner.decode([Row(0, len(prompt.ids) - 1, prompt.ids[-1:])])
        except Exception:
            _log.debug("warming up failed", exc_info=True)
        finally:
            if vision is not None:
                for span in spans:
                    vision.forget(span)

    def _step(self, step: Step) -> None:
        if step.prefill is not None:
            self._prefill(step.prefill)
        if step.decode:
            self._decode(step.decode)

    def _prefill(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        try:
            if chunk.copy is not None:
                source, length = chunk.copy
                self._runner.copy_prefix(source, sequence.slot, length)
            if chunk.picture is not None:
                self._encode(chunk.picture)
                return
            logits = self._runner.prefill(sequence.slot, sequence.prefix, chunk.start, chunk.stop)
        except VlmchatError as error:
            self._scheduler.drop(sequence, error)
            return
        self._scheduler.computed(sequence, chunk.stop)
        if logits is not None and not sequence.pending:
            self._draw([sequence], [logits])

    def _encode(self, picture: ImageSpan) -> None:
        if self._vision is not None:
            before = self._vision.num_encoded
            self._vision.features(picture)
            self._encoded += self._vision.num_encoded - before

    def _decode(self, sequences: tuple[Sequence, ...]) -> None:
        """The next token of each; of one that is alone, perhaps several, guessed ahead."""
        draft = self._draft(sequences[0]) if len(sequences) == 1 else ()
        rows = [Row(s.slot, s.num_computed, s.pending + draft) for s in sequences]
        started = time.perf_counter()
        try:
            found = self._runner.decode(rows)
        except OutOfMemory as error:
            if len(sequences) == 1:
                self._scheduler.drop(sequences[0], error)
            else:  # what was computed of them is overwritten
                for sequence in sequences:
                    self._decode((sequence,))
            return
        last = []
        for sequence, row, logits in zip(sequences, rows, found, strict=True):
            num_known = len(row.tokens) - len(draft)
            self._scheduler.computed(sequence, row.start + num_known)
            last.append(logits[num_known - 1])
        self._draw(sequences, last)
        if len(rows) == 1:
            self._row_cost.note(len(rows[0].tokens), time.perf_counter() - started)
        if draft:
            self._verify(sequences[0], draft, found[0][-len(draft) :])

    def _draft(self, sequence: Sequence) -> tuple[int, ...]:
        """What is likely to come next, where trying it pays."""
        if not self._speculation or len(sequence.pending) != 1:
            return ()
        if sequence.drafter is None:
            sequence.drafter = PromptLookup((*sequence.prompt.match_ids, *sequence.tokens))
        return sequence.drafter.draft(sequence.num_left - 1, self._row_cost)

    def _verify(self, sequence: Sequence, draft: tuple[int, ...], logits: torch.Tensor) -> None:
        """Go on drawing as long as the draft is what is drawn. logits: [len(draft), vocabulary]."""
        num_right = 0
        for token, after in zip(draft, logits, strict=True):
            if sequence.finished or sequence.tokens[-1] != token:
                break
            num_right += 1
            self._scheduler.computed(sequence, sequence.num_computed + 1)
            self._draw([sequence], [after])
        self._drafted += len(draft)
        self._accepted += num_right
        if sequence.drafter is not None:
            sequence.drafter.judge(draft, num_right)

    def _draw(self, sequences: Tokens[Sequence], logits: Tokens[torch.Tensor]) -> None:
        """One more token for each sequence. logits: [vocabulary] of each."""
        try:
            drawn = self._sampler.draw([s.sampler_state for s in sequences], logits)
        except VlmchatError as error:  # of one of them
            if len(sequences) == 1:
                self._scheduler.drop(sequences[0], error)
            else:
                for sequence, row in zip(sequences, logits, strict=True):
                    self._draw([sequence], [row])
            return
        for sequence, row, token in zip(sequences, logits, drawn, strict=True):
            if token < 0:
                self._scheduler.drop(sequence, UnsupportedModel(_NOT_A_NUMBER))
            else:
                self._append(sequence, row, token)

    def _append(self, sequence: Sequence, logits: torch.Tensor, token: int) -> None:
        self._generated += 1
        if sequence.params.logprobs is not None:
            sequence.rank(self._sampler.rank(sequence.params.logprobs, logits, token))
        state = sequence.sampler_state
        try:
            state.advance(token)
        except VlmchatError as error:  # a grammar that its own mask contradicts
            self._scheduler.drop(sequence, error)
            return
        if sequence.drafter is not None:
            sequence.drafter.append(token)
        sequence.append(token)
        if state.grammar is not None and state.grammar.finished:
            sequence.finish(FinishReason.STOP)


def _nothing_to_see() -> Conversation:
    """A question about a black picture."""
    from PIL import Image as PILImage

    name = hashlib.sha256(b"vlmchat's warm-up").hexdigest()
    picture = Image(PILImage.new("RGB", _WARM_UP_SIZE), b"", "warm-up", name, name)
    return Conversation().ask("?", (picture,))
