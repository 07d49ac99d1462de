"""A decode step recorded as CUDA graphs, one for each shape, and played back.

Called by the static runner. A step is some hundred small kernels, and starting them one by one
takes longer than running them. Knows nothing of what a step computes. Source: the section on CUDA
graphs in torch's notes on CUDA semantics.

Recording and playing back has not been run on a GPU yet; elsewhere, and in the tests, each step is
computed as it comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

_log = logging.getLogger(__name__)
_Shape = TypeVar("_Shape", bound=Hashable)
_MOST_GRAPHS = 128  # each takes some megabytes; the one recorded first goes first


class CudaGraphs(Generic[_Shape]):
    """step(inputs, shape) -> outputs: a function of tensors that writes nothing but what it would
    write again, makes no choice by their values, and never waits for the device.

    failure: why steps are not recorded any more; None as long as they are.
    """

    def __init__(
        self, step: Callable[[torch.Tensor, _Shape], torch.Tensor], device: torch.device
    ) -> None:
        self._step, self._device = step, device
        self._recorded: dict[_Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self.failure: str | None = None if device.type == "cuda" else f"device {device.type}"
        if self.failure is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, inputs: torch.Tensor, shape: _Shape) -> torch.Tensor:
        """The step's outputs. inputs: in the CPU's memory; alike in size for one shape."""
        if self.failure is None and shape not in self._recorded:
            self._record(inputs, shape)
        if shape not in self._recorded:
            return self._step(inputs.to(self._device), shape)
        graph, here, outputs = self._recorded[shape]
        here.copy_(inputs, non_blocking=True)  # pageable, so it is free to go at once
        graph.replay()
        return outputs.clone()  # the next playback writes over them

    def _record(self, inputs: torch.Tensor, shape: _Shape) -> None:
        """Once for real, on the stream that records: libraries set themselves up at first use."""
        here = inputs.to(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(here, shape)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = self._step(here, shape)
        except RuntimeError as error:
            self.failure = (str(error).splitlines() or [type(error).__name__])[0]
            _log.warning("answers come more slowly, without CUDA graphs: %s", self.failure)
            return
        if len(self._recorded) >= _MOST_GRAPHS:
            del self._recorded[next(iter(self._recorded))]
        self._recorded[shape] = graph, here, outputs
