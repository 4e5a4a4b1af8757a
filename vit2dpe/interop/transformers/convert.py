"""Models of Hugging Face's `transformers` as ours, with their weights: BERT, GPT-2, BLOOM, Llama, SmolLM3, T5; ViT,
DeiT, DINOv2 and v3, I-JEPA, the images' half of CLIP and SigLIP.

A converter, one file for each family, turns a config and a state dict into one of our models, its arguments and its
weights. Parts that ours lacks are refused by name, and so is a weight that would be left over. Nothing of
`transformers` is imported. Masked autoencoders (`mae.py`) need no converter: `MAE.load_state_dict` takes their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

from ...encodings import encodings_of
from ...errors import CheckpointError, ConfigError, unknown
from ...models.mae_names import State
from ...models.spec import Arguments
from ...resolution.apply import set_policy
from ..own_encoding import own_weights, with_own_options
from ..shards import index_of, read_shards
from .bert import bert
from .bloom import bloom
from .dinov3 import dinov3
from .gpt2 import gpt2
from .llama import llama
from .swin import swin
from .t5 import t5
from .vit import FAMILIES as VIT_FAMILIES
from .vit import tower, vit
from .weights import Config, Converted, OurModel, Weights, interleaved

__all__ = ["FAMILIES", "from_transformers", "interleaved"]

FAMILIES: dict[str, Callable[[Config, Weights], Converted]] = {
    "bert": bert,
    "dinov3_vit": dinov3,
    "gpt2": gpt2,
    "bloom": bloom,
    "llama": llama,
    "smollm3": llama,
    "t5": t5,
    **dict.fromkeys(VIT_FAMILIES, vit),
    **dict.fromkeys(("swin", "swinv2"), swin),
    **dict.fromkeys(("clip", "siglip"), tower),
}


class TheirConfig(Protocol):
    def to_dict(self) -> Config: ...


class TheirModel(Protocol):
    """The used part of a model of `transformers`."""

    @property
    def config(self) -> TheirConfig: ...

    def state_dict(self) -> State: ...


def from_transformers(
    source: TheirModel | str | Path, position: str | None = None, *, plain_rope: bool = False
) -> OurModel:
    """Our model with the weights of theirs, in evaluation mode.

    Args:
        source: a model of `transformers`, or a folder with `config.json` and `model.safetensors`.
        position: another encoding, of both stacks of a T5; default: its own, so that outputs are equal. A word that
            names the model's own encoding, alone or in a sum, keeps its weights and options too, but for the options
            that it names: "rope" has a Llama's own base, "learned+rope" a GPT-2's table and a rotation.
        plain_rope: load a Llama whose config scales its frequencies as it was before, to run it under
            `use_policy(model, "yarn", temperature="yarn")` or another policy. Not needed for linear, llama3 and yarn,
            which are options of `rope`, nor for longrope, which becomes the model's own policy (rope_scaling.py).

    Returns:
        a `TextEncoder` (BERT, without its pooler; with pool="" and the masked head where it has one), a `TextDecoder`,
        a `Seq2Seq`; or a `ViT` (see `vit.py`), without classifier where theirs has none; of a DeiT with two heads a
        `DistilledViT`.

    Raises:
        ConfigError: for a family or a setting that is not covered.
        CheckpointError: for weights that are missing or left over.
    """
    if isinstance(source, str | Path):
        config, state = read_folder(Path(source).expanduser())
    elif hasattr(source, "config") and hasattr(source.config, "to_dict"):
        config, state = source.config.to_dict(), dict(source.state_dict())
    else:
        raise ConfigError(
            f"from_transformers takes a model of transformers, or a folder that it saved, got {type(source).__name__}; "
            "from_torch takes torch's own Transformer, from_timm the models of timm"
        )
    converted = convert(config, state, plain_rope=plain_rope)
    arguments, weights = converted.arguments, converted.state
    if position is not None:
        own = dict(arguments)
        for stack in ("position", "decoder_position"):
            if stack in own:
                arguments[stack] = with_own_options(position, own[stack])
        weights = _of_the_encoding(converted.model, own, arguments, weights)
    model = converted.model(**arguments).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if position is None or "position." not in name] + list(unexpected)
    if wrong:
        raise CheckpointError(f"weights without a counterpart: {', '.join(wrong[:5])}")
    if converted.policy is not None and any("yarn" in encoding.policies for encoding in encodings_of(model)):
        set_policy(model, converted.policy)
    return model


def convert(config: Config, state: State, *, plain_rope: bool = False) -> Converted:
    """Our model of the same function: its class, its arguments with its own encoding, its weights.

    Raises:
        ConfigError, CheckpointError: as `from_transformers`.
    """
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise unknown("family", str(family), FAMILIES)
    if FAMILIES[family] is llama:
        config = config | {"plain_rope": plain_rope}
    return FAMILIES[family](config, Weights(state))


def _of_the_encoding(model: type[OurModel], own: Arguments, arguments: Arguments, weights: State) -> State:
    """The weights without those of encodings, but for encodings that the model has under both arguments."""
    kept = {name: value for name, value in weights.items() if "position." not in name}
    if len(kept) < len(weights):
        with torch.device("meta"):
            kept |= own_weights(model(**own), model(**arguments), weights)
    return kept


def read_folder(folder: Path) -> tuple[Config, State]:
    index = None if (folder / "model.safetensors").is_file() else index_of(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file() and (index is None or name == "config.json"):
            raise CheckpointError(f"{folder / name} is missing: give a folder that transformers saved")
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors") if index is None else read_shards(index)
