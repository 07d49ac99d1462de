"""What a process that answers a question imports, seen from outside."""

from __future__ import annotations

import subprocess
import sys

ANSWER = """
import sys
from vlmchat.config import ModelConfig, sampling_params
from vlmchat.conversation import Conversation
from vlmchat.engine.engine import Engine

engine = Engine.load(ModelConfig("random:tiny", device="cpu"))
params = sampling_params(temperature=0, max_new_tokens=4)
assert list(engine.stream(Conversation().ask("1 2 3"), params))
engine.close()
"""


def _run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answer_imports_no_compiler_and_no_sympy() -> None:
    printed = _run(
        ANSWER + "print([n for n in ('sympy', 'torch._dynamo.eval_frame', 'torch._export', "
        "'torch.distributed.tensor') if n in sys.modules])"
    )
    assert printed.strip() == "[]"


def test_compiler_is_whole_when_it_is_used_after_all() -> None:
    used = "import torch; print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)))"
    assert _run(ANSWER + used).strip() == "tensor([2.])"


def test_exporter_is_whole_when_it_is_used_after_all() -> None:
    used = "from torch.export import Dim, dynamic_shapes; print(Dim is dynamic_shapes.Dim)"
    assert _run(ANSWER + used).strip() == "True"


def test_operators_are_told_what_they_do_on_the_meta_device_when_a_model_wants_it() -> None:
    used = """
import sys, torch
from vlmchat.engine.spare import on_meta
assert type(sys.modules["torch._meta_registrations"]).__name__ == "_Later"
with on_meta():
    print(torch.nn.LayerNorm(4)(torch.empty(2, 4)).shape, torch.roll(torch.empty(3), 1).device)
"""
    assert _run(ANSWER + used).strip() == "torch.Size([2, 4]) meta"


def test_numbers_are_drawn_by_a_generator_as_ever() -> None:
    drawn = "import torch; print(torch.rand(3, generator=torch.Generator().manual_seed(1)))"
    assert _run(ANSWER + drawn) == _run(drawn)


def test_masks_by_rules_are_computed() -> None:
    used = """
import torch
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    print(torch.vmap(lambda i: torch.arange(5)[i])(torch.arange(3)).tolist())
"""
    assert _run(ANSWER + used).strip() == "[0, 1, 2]"


def test_torch_still_has_its_distributed_part() -> None:
    there = "import torch; print(torch.distributed.is_available())"
    assert _run(there) == _run(ANSWER + there)
