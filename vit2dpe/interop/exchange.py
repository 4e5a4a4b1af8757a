"""Another encoding in a model of ours that is trained: how such a model is built, and the weights that go into it.

Source of the idea: DroPE, arXiv 2512.12167, which drops the rotary encoding of language models. How ours differs: any
encoding for any other one, and what all places have in common of a table or a formula that is added to tokens is kept:
it is a bias of the patch embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..encodings import named_encodings
from ..encodings.registry import parse
from ..errors import ConfigError
from ..models.spec import ModelSpec
from ..models.swin.model import Swin
from ..models.vit import ViT
from ..resolution.sweep import train_size_of
from .own_encoding import own_weights, with_own_options
from .timm.record import is_rate


def encoding_word(model: ViT | Swin, spec: ModelSpec) -> str:
    """The word of a model's encoding, from what it is built of; a class where an instance was given."""
    word = spec.arguments.get("position")
    if word is None:
        word = "relative" if isinstance(model, Swin) else "learned"
    return str(word)


def with_encoding(model: ViT | Swin, spec: ModelSpec, to: str) -> ModelSpec:
    """How the model is built with another encoding, at the size it has at present, without dropout.

    Args:
        spec: of the model as it is.
        to: a word or a sum; of terms that the model has already the options stay, where it does not say otherwise.

    Raises:
        ConfigError: for the encoding that it has, and one that it cannot take.
    """
    now = encoding_word(model, spec)
    to = with_own_options(to, now)
    if parse(to) == parse(now):
        raise ConfigError(f"the encoding of this model is {now} already: give another one, --to rope")
    rates = {name: 0.0 for name in spec.arguments if is_rate(name)}
    arguments = spec.arguments | rates | {"position": to, "img_size": list(train_size_of(model))}
    found = ModelSpec(spec.kind, arguments)
    with torch.device("meta"):
        found.build()
    return found


@torch.no_grad()
def move_weights(old: ViT | Swin, new: nn.Module) -> None:
    """Put the weights of `old` into `new`, a model of `with_encoding`, in place.

    All but those of encodings; of encodings those of the terms that both have. Of what `old` adds to tokens and `new`
    does not, the mean over all places goes into the bias behind the patches, which is exact: every token of the first
    block has it as before. With a `new` of no such bias it is lost.
    """
    if not isinstance(new, ViT | Swin):
        raise ConfigError(f"encodings are exchanged in a ViT or a Swin, got a {type(new).__name__}")
    state = dict(old.state_dict())
    inside = tuple(f"{name}." for name in named_encodings(old))
    kept = {name: value for name, value in state.items() if not name.startswith(inside)}
    missing, unexpected = new.load_state_dict(kept | own_weights(old, new, state), strict=False)
    inside = tuple(f"{name}." for name in named_encodings(new))
    lost = [name for name in missing if not name.startswith(inside)] + list(unexpected)
    if lost:
        raise ConfigError(f"weights without a counterpart: {', '.join(lost[:5])}")
    embed = new.patch_embed
    bias = embed.norm.bias if isinstance(embed.norm, nn.LayerNorm) else embed.proj.bias
    mean = _mean_token(old) - _mean_token(new).to(next(old.parameters()).device)
    if bias is not None:
        bias += mean.to(bias)


def _mean_token(model: ViT | Swin) -> Tensor:
    """(D,) the mean over all places of what a model adds to its tokens in front of the first block."""
    like = model.patch_embed.proj.weight
    token = model.position(model.positions(*train_size_of(model), device=like.device).with_prefix(0)).token
    return like.new_zeros(len(like)) if token is None else token.mean((0, 1))
