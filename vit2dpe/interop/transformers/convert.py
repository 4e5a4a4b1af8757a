"""Text models of Hugging Face's `transformers` as ours, with their weights: BERT, GPT-2, BLOOM, Llama, T5.

A converter, one file for each family, reads a config and a state dict and says which of our models it is, with which
arguments and weights. What a model has that ours has not is refused by name; so is a weight that would be left over.
Nothing of `transformers` is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from ...errors import CheckpointError, unknown
from ...models.text.heads import TextDecoder, TextEncoder
from ...models.text.seq2seq import Seq2Seq
from .bert import bert
from .bloom import bloom
from .gpt2 import gpt2
from .llama import interleaved, llama
from .t5 import t5
from .weights import Config, Converted, State, Weights

__all__ = ["FAMILIES", "from_transformers", "interleaved"]

FAMILIES: dict[str, Callable[[Config, Weights], Converted]] = {
    "bert": bert,
    "gpt2": gpt2,
    "bloom": bloom,
    "llama": llama,
    "t5": t5,
}


def from_transformers(
    source: nn.Module | str | Path, position: str | None = None, *, plain_rope: bool = False
) -> TextEncoder | TextDecoder | Seq2Seq:
    """Our model with the weights of theirs, in evaluation mode.

    Args:
        source: a model of `transformers`, or a folder with `config.json` and `model.safetensors`.
        position: another encoding; default: its own, so that outputs are equal.
        plain_rope: load a Llama whose config scales its frequencies at the length before scaling; run it under
            `use_policy(model, "yarn", temperature="yarn")` or whichever policy it was scaled by.

    Returns:
        a `TextEncoder` (BERT, without its pooler; with pool="" and the masked head where it has one), a `TextDecoder`
        or a `Seq2Seq`.

    Raises:
        ConfigError: for a family or a setting that is not covered.
        CheckpointError: for weights that are missing or left over.
    """
    if isinstance(source, nn.Module):
        config, state = source.config.to_dict(), dict(source.state_dict())  # type: ignore[operator, union-attr]
    else:
        config, state = _read(Path(source).expanduser())
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise unknown("family", str(family), FAMILIES)
    if family == "llama":
        config = config | {"plain_rope": plain_rope}
    kind, arguments, found = FAMILIES[family](config, Weights(state))
    if position is not None:
        arguments["position"] = position
        found = {name: value for name, value in found.items() if "position." not in name}
    model = kind(**arguments).eval()
    missing, unexpected = model.load_state_dict(found, strict=False)
    wrong = [name for name in missing if position is None or "position." not in name] + list(unexpected)
    if wrong:
        raise CheckpointError(f"weights without a counterpart: {', '.join(wrong[:5])}")
    return model


def _read(folder: Path) -> tuple[Config, State]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: give a folder that transformers saved")
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
