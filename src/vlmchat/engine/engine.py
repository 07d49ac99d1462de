"""The engine: requests in, streams of text out, one thread that owns the model.

`Engine` is the `Backend` of this process. Callers' threads render and encode; the engine's thread
schedules, runs and samples. Imports torch only inside `Engine.load`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vlmchat.config import ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine.detokenizer import Detokenizer
from vlmchat.engine.prefix_cache import PrefixCache
from vlmchat.engine.scheduler import Scheduler, Step
from vlmchat.engine.sequence import Sequence
from vlmchat.errors import EngineDead, OutOfMemory, PromptTooLong, VlmchatError
from vlmchat.request import Delta, PromptSize, SamplingParams, Status

if TYPE_CHECKING:
    import torch

    from vlmchat.engine.processor import Processor
    from vlmchat.engine.runner import Runner
    from vlmchat.engine.sampler import Sampler


TOKENS_BEFORE = 8  # of an answer's given beginning: enough to tell how the next one is written


class EngineStream:
    """One answer on its way out of the engine. Once nobody holds it any more, it is cancelled."""

    def __init__(self, sequence: Sequence, items: queue.SimpleQueue[Delta | Exception]) -> None:
        self.sequence = sequence
        self._items = items
        self._over = False

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        if self._over:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, Exception):
            self._over = True
            raise item
        self._over = item.finish_reason is not None
        return item

    def __del__(self) -> None:
        # Ctrl-C can land between any two lines of whoever asked, also before their `with`.
        self.cancel()

    def cancel(self) -> None:
        """See `Stream.cancel`."""
        self.sequence.cancelled = True


class Engine:
    """A model in this process, answering any number of streams."""

    def __init__(
        self,
        runner: Runner,
        processor: Processor,
        make_sampler: Callable[[SamplingParams], Sampler],
        eos_token_ids: frozenset[int],
        status: Status,
        num_slots: int = 1,
    ) -> None:
        self._runner = runner
        self._processor = processor
        self._make_sampler = make_sampler
        self._eos_token_ids = eos_token_ids
        self._status = status
        self._scheduler = Scheduler(PrefixCache(num_slots))
        # Inbox and `_dead` change under one lock, so that no stream is queued for a dead engine.
        self._wake = threading.Condition()
        self._inbox: list[Sequence] = []
        self._dead: EngineDead | None = None
        self._thread = threading.Thread(target=self._run, name="vlmchat-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, config: ModelConfig, progress: Callable[[str], None] = lambda stage: None
    ) -> Engine:
        """Load a model. `progress` is told each stage in words, and what to heed as `note: …`.

        Raises ConfigError, ModelNotFound, NetworkError, UnsupportedModel, CheckpointError and
        OutOfMemory (before any weight is read).
        """
        from vlmchat.engine.loader import load_model
        from vlmchat.engine.processor import Processor
        from vlmchat.engine.runner import EagerRunner
        from vlmchat.engine.sampler import Sampler
        from vlmchat.engine.vision import VisionCache

        loaded = load_model(config, progress)
        vision = VisionCache(loaded.model)
        runner = EagerRunner(loaded.model, loaded.spec, vision, num_slots=1)
        processor = Processor(loaded.processor, loaded.spec, loaded.template)
        return cls(runner, processor, Sampler, loaded.spec.eos_token_ids, loaded.status)

    def stream(self, conversation: Conversation, params: SamplingParams) -> EngineStream:
        """See `Backend.stream`."""
        prompt = self._processor.encode(conversation)
        limit = self._status.context_length - params.max_new_tokens
        if len(prompt.ids) > limit:
            raise PromptTooLong(len(prompt.ids), limit, prompt.num_image_tokens)
        stop = params.stop + self._processor.stop
        begun = prompt.ids[-TOKENS_BEFORE:] if conversation.begun else ()
        detokenizer = Detokenizer(self._processor.tokenizer, stop, begun)
        # The sequence knows the queue, not the stream: only the caller holds that.
        items: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        sequence = Sequence(prompt, params, detokenizer, self._eos_token_ids, items.put)
        sequence.sampler_state = self._make_sampler(params)
        stream = EngineStream(sequence, items)
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
        return self._status

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
        """Take in new sequences, waiting while there is nothing to do. False: stop."""
        with self._wake:
            while self._dead is None and not self._inbox and self._scheduler.idle:
                self._wake.wait()
            for sequence in self._inbox:
                self._scheduler.add(sequence)
            self._inbox.clear()
            return self._dead is None

    def _step(self, step: Step) -> None:
        if step.prefill is not None:
            self._prefill(step.prefill)
        if step.decode:
            self._decode(step.decode)

    def _prefill(self, sequence: Sequence) -> None:
        try:
            logits = self._runner.prefill(sequence.slot, sequence.prompt, sequence.num_cached)
        except VlmchatError as error:
            self._scheduler.drop(sequence, error)
        else:
            self._append(sequence, logits)

    def _decode(self, sequences: tuple[Sequence, ...]) -> None:
        slots = [sequence.slot for sequence in sequences]
        tokens = [sequence.tokens[-1] for sequence in sequences]
        try:
            rows = self._runner.decode(slots, tokens)
        except OutOfMemory as error:
            for sequence in sequences:
                self._scheduler.drop(sequence, error)
        else:
            for sequence, logits in zip(sequences, rows, strict=True):
                self._append(sequence, logits)

    def _append(self, sequence: Sequence, logits: torch.Tensor) -> None:
        try:
            token = sequence.sampler_state.draw(logits)
        except VlmchatError as error:
            self._scheduler.drop(sequence, error)
            return
        if sequence.params.logprobs is not None:
            sequence.rank(sequence.sampler_state.rank(logits, token))
        sequence.append(token)
