"""The fast runner: fixed slots, prompts in parts, all sequences' new tokens in one step.

Stands behind the protocol of `runner.py` for models whose language model is known to be plain
(`unsupported`), and is held to the reference token for token. Called from the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from vlmchat.engine.cuda_graphs import CudaGraphs
from vlmchat.engine.fused import fuse
from vlmchat.engine.kv_cache import KVCache, QuantizedKVCache
from vlmchat.engine.lean import Abreast, Added, LeanModel, Span
from vlmchat.engine.memory import memory_errors
from vlmchat.engine.native_library import NoNativeStep
from vlmchat.engine.native_operators import NativeOperators
from vlmchat.engine.native_step import NativeStep
from vlmchat.engine.operators import Operators
from vlmchat.engine.packed import Int4Linear, Int8Linear, can_prepack, int8_linear
from vlmchat.engine.runner import Row, grid_positions
from vlmchat.engine.sequence import Prompt
from vlmchat.engine.spec import BothWays, ModelSpec
from vlmchat.engine.vision import VisionCache

# By config.model_type: models that put features in place of placeholders' embeddings and leave the
# rest to their language model. One belongs here once its tests pass.
_PROVEN = (
    *("idefics3", "internvl", "llava", "llava_next", "llava_onevision", "smolvlm"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)
# Classes of transformers whose layers are those of `lean.py`, named, as importing them takes time.
_LANGUAGE_MODELS = (
    *("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"),
    *("Qwen2VLTextModel", "Qwen2_5_VLTextModel", "Qwen3VLTextModel"),
)
# Whose frequencies are the same whatever the length of a prompt.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_GATHERING = 3  # times the traffic of reading keys and values in place: read, write, read
_ADVICE = (
    "out of memory during the answer; start a shorter conversation (/clear), "
    "or use --context-length, --load-4bit or a smaller model"
)


def unsupported(model: Any, spec: ModelSpec) -> str | None:
    """Why this model is not run here, in a few words; None if it is.

    Everything that is not known to be the same as in the reference is a reason.
    """
    if spec.both_ways is not BothWays.NOWHERE:
        return f"in a {spec.family} prompt tokens attend to later ones"
    if model.config.model_type not in _PROVEN:
        return f"{spec.family} is not known to be plain"
    kind = type(model.get_decoder())
    if kind.__name__ not in _LANGUAGE_MODELS or not kind.__module__.startswith("transformers."):
        return f"its language model is a {kind.__name__}"
    config = model.get_decoder().config
    window = getattr(config, "sliding_window", None)
    if window is not None and window < spec.context_length:
        return f"it attends to the last {window} tokens only"
    if (rope := config.rope_parameters.get("rope_type")) not in _ROPE_TYPES:
        return f"its positions are of type {rope!r}"
    return None


@dataclass(frozen=True, slots=True)
class StepShape:
    """All of a fixed step that is not in tensors.

    first: its rows are the slots from there on, in order; None: they are any slots.
    length: of the keys and values that it reads in each slot.
    """

    first: int | None
    num_rows: int
    length: int


def step_shape(slots: Sequence[int], num_slots: int, longest: int, context: int) -> StepShape:
    """The shape in which one token for each of these slots is computed; there are few of them.

    The rows are the smallest block of 1, 2, 4, … slots with all of these in it, for it is read
    where it lies; or these alone, copied first, where a block would make more traffic than that.
    longest: positions in the longest slot, the new one included.
    """
    low, high, size = min(slots), max(slots), 1
    while low // size != high // size:
        size *= 2
    first = low // size * size
    size = min(size, num_slots - first)
    length = next(each for each in _lengths() if each >= min(longest, context))
    gathered = 1 << (len(slots) - 1).bit_length()
    if _GATHERING * gathered < size:
        return StepShape(None, gathered, min(length, context))
    return StepShape(first, size, min(length, context))


def _lengths() -> Iterator[int]:
    """256, 384, 512, 768, 1024, …: at most half as much again is read as is there."""
    length = 256
    while True:
        yield length
        yield length * 3 // 2
        length *= 2


class StaticRunner:
    """See `Runner`. Slots are rows of one cache, each of `context_length` positions.

    Decoding goes one of two ways. On a CPU each row's attention reads its own slot, no more. A GPU
    takes longer to be told than to compute, so there all rows attend at once, in one of few shapes
    (`step_shape`), and what changes from step to step is in tensors: such a step is recorded once
    and played back. It reads past the end of a slot and gives that no weight, so what lies there is
    kept at zero (0 times not-a-number is not 0); rows that stand for no sequence write to a
    position behind the last one.
    """

    splits_pictures = True

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        vision: VisionCache,
        num_slots: int,
        context_length: int,
        kv_dtype: torch.dtype | None = None,
        fixed: bool | None = None,
        native: bool = True,
    ) -> None:
        """model: one for which `unsupported` has no reason; its layers' weights are joined.

        kv_dtype: int8 for keys and values in 8 bits; else the model's.  fixed: decode in fixed
        shapes; None: on CUDA.  native: steps in C, where that can be.
        """
        self._model, self._spec = model, spec
        self._vision = vision
        self._embedding = model.get_input_embeddings()
        self._device, self._dtype = model.device, self._embedding.weight.dtype
        self.num_slots = num_slots
        # What a slot's next position is, less the number of its tokens (see `grid_positions`).
        self._position_deltas = [0] * num_slots
        with torch.no_grad(), memory_errors(_ADVICE):
            self._head = _head(model)
            decoder = model.get_decoder()
            self._lean = LeanModel(decoder, context_length, _operators(decoder, native))
            cache = QuantizedKVCache if kv_dtype is torch.int8 else KVCache
            self._fixed = self._device.type == "cuda" if fixed is None else fixed
            self._context = context_length
            self._cache = cache(
                self._lean.shape,
                num_slots,
                context_length + self._fixed,
                self._dtype,
                self._device,
            )
        self._native, self._why_not_native = _native(self._lean, self._head, self._cache, native)
        self._reached = [0] * num_slots  # positions that hold more than zeros, where fixed
        self._graphs = CudaGraphs(self._step, self._device)
        if self._fixed:
            for slot in range(num_slots):
                self._cache.clear(slot, 0, context_length + 1)
            self.decode([Row(0, 0, (0,))])  # tells whether it can be recorded

    @property
    def how(self) -> str:
        """How it decodes, in a few words, for people; and why not in a faster way."""
        if self._device.type == "cuda":
            return f"no CUDA graphs: {why}" if (why := self._graphs.failure) else "CUDA graphs"
        missing = self._why_not_native
        return f"no native steps: {missing}" if missing else "native steps"

    @torch.inference_mode()
    def prefill(self, slot: int, prompt: Prompt, start: int, stop: int) -> torch.Tensor | None:
        """See `Runner.prefill`."""
        with memory_errors(_ADVICE):
            self._reach(slot, stop)
            x, added = self._embed(prompt, start, stop)
            if self._spec.grid_positions:
                grid, self._position_deltas[slot] = grid_positions(self._model, self._spec, prompt)
                rotation = self._lean.grid_rotation(grid[1:, 0, start:stop])
            else:
                rotation = self._lean.rotation(torch.arange(start, stop, device=self._device))
            if self._native and not added and stop - start <= self._native.max_rows:
                slots, wanted = [slot] * (stop - start), int(stop == len(prompt.ids))
                found = self._native.run(x, rotation, slots, range(start, stop), wanted)
                return found[0] if wanted else None
            spans = [self._span(0, slot, start, stop)]
            x = self._lean.forward(x, rotation, spans, added, only_last=True)
            return self._logits(x[-1:])[0] if stop == len(prompt.ids) else None

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """See `Runner.decode`."""
        with memory_errors(_ADVICE):
            for row in rows:
                self._reach(row.slot, row.start + len(row.tokens))
            if self._fixed and all(len(row.tokens) == 1 for row in rows):
                return self._decode_fixed(rows)
            sizes = [len(row.tokens) for row in rows]
            ids = [token for row in rows for token in row.tokens]
            starts = [row.start + self._position_deltas[row.slot] for row in rows]
            positions = [
                first + i for first, n in zip(starts, sizes, strict=True) for i in range(n)
            ]
            rotation, x = (
                self._lean.rotation(self._tensor(positions)),
                self._embedding(self._tensor(ids)),
            )
            if self._native and len(ids) <= self._native.max_rows:
                slots = [row.slot for row in rows for _ in row.tokens]
                places = [row.start + i for row in rows for i in range(len(row.tokens))]
                logits = self._native.run(x, rotation, slots, places, len(ids))
            else:
                lasts = accumulate(sizes)
                spans = [
                    self._span(last - n, row.slot, row.start, row.start + n)
                    for row, n, last in zip(rows, sizes, lasts, strict=True)
                ]
                logits = self._logits(self._lean.forward(x, rotation, spans))
            return list(torch.split(logits, sizes))

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `Runner.copy_prefix`."""
        self._reach(target, length)
        self._cache.copy_prefix(source, target, length)
        self._position_deltas[target] = self._position_deltas[source]

    def _decode_fixed(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """One token for each row."""
        slots = [row.slot for row in rows]
        longest = max(row.start for row in rows) + 1
        shape = step_shape(slots, self.num_slots, longest, self._context)
        first = shape.first or 0
        # By row: token, slot, position in the slot, position for the model. Unused: the spare one.
        inputs = [[0, first, self._context, 0] for _ in range(shape.num_rows)]
        if shape.first is not None:
            places = [slot - first for slot in slots]
            for index, values in enumerate(inputs):
                values[1] = first + index
        else:
            places = list(range(len(slots)))
        for place, row in zip(places, rows, strict=True):
            position = row.start + self._position_deltas[row.slot]
            inputs[place] = [*row.tokens, row.slot, row.start, position]
        logits = self._graphs.run(torch.tensor(inputs), shape)
        return [logits[place][None] for place in places]

    def _step(self, inputs: torch.Tensor, shape: StepShape) -> torch.Tensor:
        """[rows, 4] of tokens, slots, positions in them and positions -> logits [rows, V]."""
        ids, slots, positions, rotary = inputs.unbind(1)
        table = self._cache.table(slots, positions, shape.first, shape.length)
        seen = torch.arange(shape.length, device=inputs.device) <= positions[:, None]
        abreast = Abreast(table, seen[:, None, None])
        x = self._lean.forward(self._embedding(ids), self._lean.rotation(rotary), abreast)
        return self._logits(x)

    def _reach(self, slot: int, stop: int) -> None:
        """The slot is to hold `stop` positions: what lies behind them is no longer wanted."""
        if self._fixed and self._reached[slot] > stop:
            self._cache.clear(slot, stop, self._reached[slot])
        self._reached[slot] = stop

    def _span(self, first: int, slot: int, start: int, stop: int) -> Span:
        """The rows of a step's input from `first` on as positions start..stop-1 of the slot."""
        last, window = first + stop - start, self._cache.window(slot, start, stop)
        if start == 0 or stop - start == 1:
            return Span(first, last, window, causal=stop - start > 1)
        later = torch.full((stop - start, stop), -torch.inf, dtype=self._dtype, device=self._device)
        return Span(first, last, window, mask=later.triu_(start + 1))

    def _embed(self, prompt: Prompt, start: int, stop: int) -> tuple[torch.Tensor, list[Added]]:
        """[stop - start, hidden]: the model's embeddings, pictures' features in their places.

        The second value: their features for inner layers, where the model has such.
        """
        x: torch.Tensor = self._embedding(self._tensor(prompt.ids[start:stop]))
        added = []
        for span in prompt.images:
            if span.start < stop and start < span.stop:
                token, ids = self._spec.image_token_id, prompt.ids
                skipped = sum(ids[i] == token for i in range(span.start, max(start, span.start)))
                part = range(max(start, span.start), min(stop, span.stop))
                places = [i - start for i in part if ids[i] == token]
                here = slice(skipped, skipped + len(places))
                features, rows = self._vision.features(span), self._tensor(places)
                x[rows] = features.pooled[here].to(x)
                if features.deepstack:
                    added.append(Added(rows, [layer[here] for layer in features.deepstack]))
        return x, added

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(self._lean.final_norm(x))
        return logits

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        """Integers [T] on the device, which is not waited for."""
        host = torch.tensor(values, dtype=torch.long)
        return host.to(self._device, non_blocking=self._device.type == "cuda")


def _head(model: Any) -> Any:
    """The output embeddings; in 8 bits where the layers are quantised to be read fast.

    They are a tenth to a third of what a step reads, and lose nothing that shows in 8 bits.
    """
    head = model.get_output_embeddings()
    layer = model.get_decoder().layers[0].self_attn.o_proj
    if type(layer) in (Int4Linear, Int8Linear) and can_prepack(head.weight):
        return int8_linear(head.weight, head.weight.dtype, head.bias)
    return fuse([head])


def _operators(model: Any, native: bool) -> Operators:
    """Between the products of a language model; native: in C, where that can be."""
    config, weight, layer = model.config, model.embed_tokens.weight, model.layers[0]
    parts = (config.rms_norm_eps, layer.mlp.act_fn, weight.dtype, weight.device)
    sizes = (config.hidden_size, config.intermediate_size, layer.self_attn.head_dim // 2)
    if native:
        with suppress(NoNativeStep):
            return NativeOperators(*parts, sizes)
    return Operators(*parts)


def _native(
    lean: LeanModel, head: Any, cache: KVCache, wanted: bool
) -> tuple[NativeStep | None, str]:
    """The native step, or why there is none."""
    if not wanted:
        return None, "asked for"
    try:
        return NativeStep(lean, head, cache), ""
    except NoNativeStep as error:
        return None, str(error)
