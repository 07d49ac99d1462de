"""PEFT adapters on checkpoints in transformers' layout: their base, and their layers by name.

Called by the loader, which reads the base and passes its weights through `Lora.merged`; nothing of
PEFT is needed. LoRA checkpoints as LLaVA's own code writes them are read elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlmchat.engine.hub import read_json
from vlmchat.engine.lora import Lora
from vlmchat.errors import CheckpointError, UnsupportedModel

ADAPTER_CONFIG = "adapter_config.json"
# Parts of a name that come and go between versions of transformers and PEFT.
_WRAPPINGS = {"base_model", "model", "language_model", "vision_model", "default", "modules_to_save"}
# Settings of PEFT with which a weight is no longer W + scale · B A.
_OTHER_METHODS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
)
# Ways to begin a training that change the base's weights too.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def base_of(directory: Path) -> str:
    """The hub id or path of the base that the adapter was made from, as its config has it.

    Raises CheckpointError if it names none.
    """
    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{directory} does not name its base; give it by --model-base")
    return str(base)


def read_adapter(directory: Path, model_names: Iterable[str]) -> Lora:
    """The adapter's layers under the names that the base's model has for them.

    Raises UnsupportedModel if it holds anything else than LoRA, by name, and CheckpointError if
    a layer is not among `model_names`.
    """
    _check_config(directory)
    own = {_bare(name): name for name in model_names}

    def rename(name: str) -> str:
        if _bare(name) not in own:
            raise CheckpointError(
                f"the adapter {directory} holds {name}, which the base lacks; "
                "is --model-base the model that it was made from?"
            )
        return own[_bare(name)]

    lora = Lora(directory, rename)
    if lora.replacements:
        names = sorted(lora.replacements)
        shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        raise UnsupportedModel(
            f"the adapter {directory} holds more than LoRA: {shown}; "
            "merge it into its base with PEFT (merge_and_unload), then give the result"
        )
    return lora


def _check_config(directory: Path) -> None:
    config = read_json(directory / ADAPTER_CONFIG)
    kind = config.get("peft_type")
    found = [] if kind in ("LORA", None) else [f"peft_type {kind}"]
    found += [name for name in _OTHER_METHODS if config.get(name)]
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASES):
        found.append(f"init_lora_weights {start}")
    if found:
        raise UnsupportedModel(
            f"the adapter {directory} is no plain LoRA ({', '.join(found)}); "
            "merge it into its base with PEFT (merge_and_unload), then give the result"
        )


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPINGS)
