"""Another encoding in a model of ours that is trained: the weights that go into it.

Source of the idea: DroPE, arXiv 2512.12167, which drops the rotary encoding of language models. How ours differs: any
encoding for any other one, and what all places have in common of a table or a formula that is added to tokens is kept:
it is a bias of the patch embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..encodings import named_encodings
from ..errors import ConfigError
from ..models.swin.model import Swin
from ..models.vit import ViT
from ..resolution.sweep import train_size_of
from .head_basis import choose_bases
from .own_encoding import carried


@torch.no_grad()
def move_weights(old: ViT | Swin, new: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Put the weights of `old` into `new`, the same model with another encoding, in place.

    All but those of encodings; of encodings those of the terms that both have. Of what `old` adds to tokens and `new`
    does not, the mean over all places goes into the bias behind the patches, which is exact: every token of the first
    block has it as before. With a `new` of no such bias it is lost. A training that starts from weights takes the same
    ones without the mean: what is no encoding's stays bit for bit, as in `from_timm`.

    Returns:
        names of what was taken, of what of `new` was left as it was drawn, and of what of `old` was not used.
    """
    if not isinstance(new, ViT | Swin):
        raise ConfigError(f"encodings are exchanged in a ViT or a Swin, got a {type(new).__name__}")
    taken, unused = carried(old, new, dict(old.state_dict()))
    missing, unexpected = new.load_state_dict(taken, strict=False)
    inside = tuple(f"{name}." for name in named_encodings(new))
    lost = [name for name in missing if not name.startswith(inside)] + list(unexpected)
    if lost:
        raise ConfigError(f"weights without a counterpart: {', '.join(lost[:5])}")
    embed = new.patch_embed
    bias = embed.norm.bias if isinstance(embed.norm, nn.LayerNorm) else embed.proj.bias
    mean = _mean_token(old) - _mean_token(new).to(next(old.parameters()).device)
    if bias is not None:
        bias += mean.to(bias)
    choose_bases(old, new)
    return list(taken), list(missing), unused


def _mean_token(model: ViT | Swin) -> Tensor:
    """(D,) the mean over all places of what a model adds to its tokens in front of the first block."""
    like = model.patch_embed.proj.weight
    token = model.position(model.positions(*train_size_of(model), device=like.device).with_prefix(0)).token
    return like.new_zeros(len(like)) if token is None else token.mean((0, 1))
