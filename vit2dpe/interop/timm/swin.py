"""A timm Swin becomes ours: `from_timm_swin`; and back: `to_timm_swin`.

The model is rebuilt as one of ours and its weights are loaded strictly. Covered: timm's `SwinTransformer` (Swin, S3)
and `SwinTransformerV2`. Other parts are refused by name.

Logits are equal at every size, also where windows do not fill the grid (`padding="timm"`): at another size than the
training size as in a timm Swin with `dynamic_img_size`, and after `set_input_size` with the same windows as after
timm's. timm attends to what it filled up with, rolls before it fills up, so that a last window mixes both edges of the
image, and shifts the windows of a stage only if there were several at the training size. `padding="mask"`, the default
of a `Swin` of ours, does none of this.

Three differences stay. A `set_input_size` without windows keeps them, timm's scales them. The network of a Swin V2 then
goes on measuring in the window it was trained on; timm's does so where `pretrained_window_sizes` are given, and else in
the new one. A window that grows along one axis alone keeps its table along the other; timm stretches that one too.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from ...encodings import LogCPB, RelativeBias, named_encodings
from ...errors import ConfigError
from ...models.mae_names import State
from ...models.spec import Arguments
from ...models.swin.model import Swin
from ...models.swin.stage import Spec, SwinBlock, WindowAttention
from ...models.swin.weights import TABLE
from .read import SWINS, refusal
from .record import remember
from .steps import Rename, keep_training

TheirSwin: TypeAlias = SwinTransformer | SwinTransformerV2
OWN_WORDS = {SwinTransformer: "relative(resize=geometric)", SwinTransformerV2: "logcpb"}  # as timm resizes a table


def from_timm_swin(theirs: TheirSwin, position: Spec | None = None, **kwargs: Any) -> Swin:
    """Our Swin with the weights of a timm Swin.

    Args:
        theirs: a timm `SwinTransformer` or `SwinTransformerV2`.
        position: another encoding; default: its own, so that logits are equal. The weights that are not position are
            kept either way, and those of its own encoding where a word names it.
        kwargs: further arguments of `Swin`: `window_policy`, `padding`, drop rates.

    Raises:
        ConfigError: for a family or a part that is not covered.
    """
    v2 = _refuse(theirs)
    built, arguments = position or OWN_WORDS[type(theirs)], _arguments(theirs, v2) | kwargs
    like = theirs.patch_embed.proj.weight
    with torch.device("meta") if like.is_meta else nullcontext():
        ours = Swin(built, **arguments)
    state = theirs.state_dict()
    if position is not None:
        # Their tables and networks are left out where another encoding's parameters are drawn.
        own = _own_weights(ours, state, LogCPB if v2 else RelativeBias) if isinstance(position, str) else {}
        state = {name: value for name, value in state.items() if "bias_table" not in name and "cpb_mlp" not in name}
        state |= {name: value for name, value in ours.state_dict().items() if "position." in name} | own
    ours.load_state_dict(state)
    remember(ours, theirs, built, arguments)
    keep_training(ours, theirs, [Rename(f"attn.{name}", f"attn.position.{name}") for name in ("cpb_mlp", TABLE)])
    return ours.to(like.device, like.dtype)


def _own_weights(ours: Swin, state: State, kind: type[RelativeBias] | type[LogCPB]) -> State:
    """Of the encodings of their kind that a block of ours has, alone or in a sum, their tables and networks."""
    found: State = {}
    for owner, part in named_encodings(ours).items():
        attention, inside, _ = owner.partition(".attn.position")
        for name, value in part.named_parameters() if inside and isinstance(part, kind) else ():
            stored = state.get(f"{attention}.attn.{name}")
            if stored is not None and stored.numel() == value.numel():  # an option may ask for another network
                found[f"{owner}.{name}"] = stored.t().reshape(value.shape) if name == TABLE else stored
    return found


def _arguments(theirs: TheirSwin, v2: bool) -> Arguments:
    """Constructor arguments of a Swin of these sizes and parts."""
    first = [stage.blocks[0] for stage in theirs.layers]
    widths = [block.mlp.fc1.in_features for block in first]
    if widths != [theirs.embed_dim * 2**i for i in range(len(widths))]:
        raise ConfigError(f"the width must double from stage to stage, got {widths}")
    arguments: Arguments = dict(
        img_size=tuple(theirs.patch_embed.img_size),
        patch_size=tuple(theirs.patch_embed.patch_size),
        in_chans=theirs.patch_embed.proj.in_channels,
        num_classes=theirs.num_classes,
        global_pool=theirs.global_pool,
        embed_dim=theirs.embed_dim,
        depths=[len(stage.blocks) for stage in theirs.layers],
        num_heads=[block.attn.num_heads for block in first],
        window_size=[tuple(block.window_size) for block in first],
        mlp_ratio=[block.mlp.fc1.out_features / width for block, width in zip(first, widths, strict=True)],
        qkv_bias=(first[0].attn.q_bias if v2 else first[0].attn.qkv.bias) is not None,
        drop_rate=theirs.head.drop.p,
        proj_drop_rate=first[0].attn.proj_drop.p,
        attn_drop_rate=first[0].attn.attn_drop.p,
        drop_path_rate=getattr(theirs.layers[-1].blocks[-1].drop_path1, "drop_prob", 0.0) or 0.0,
        padding="timm",
    )
    if v2:
        arguments |= dict(qk="cosine", post_norm=True)
        arguments |= dict(pretrained_window_sizes=[tuple(block.attn.pretrained_window_size) for block in first])
    return arguments


def _refuse(theirs: TheirSwin) -> bool:
    """Refuse parts that our Swin cannot have; whether it is a V2."""
    name = type(theirs).__name__
    if type(theirs) not in (SwinTransformer, SwinTransformerV2):
        raise refusal(theirs, f"{name} is not covered; covered: timm's {' and '.join(SWINS)}")
    blocks = [block for stage in theirs.layers for block in stage.blocks]
    norms = [theirs.norm, theirs.patch_embed.norm, *(block.norm1 for block in blocks)]
    refused = {
        "windows of a stage's whole grid that are shifted (always_partition)": any(b.always_partition for b in blocks),
        "heads of another width than dim / heads": any(b.attn.qkv.out_features != 3 * b.dim for b in blocks),
        "a norm that is not LayerNorm with eps 1e-5": any(type(n) is not nn.LayerNorm or n.eps != 1e-5 for n in norms),
        "an activation that is not GELU": not all(_gelu(block.mlp.act) for block in blocks),
        "no classifier head": not hasattr(theirs, "head"),
    }
    reasons = [part for part, present in refused.items() if present]
    if reasons:
        raise refusal(theirs, f"this {name} has {', '.join(reasons)}, which is not covered")
    return type(theirs) is SwinTransformerV2


def _gelu(act: nn.Module) -> bool:
    return type(act).__name__ == "GELU" and getattr(act, "approximate", "none") == "none"


def to_timm_swin(model: Swin) -> State:
    """The state of a Swin under timm's names, for `SwinTransformer` or `SwinTransformerV2` of the same sizes.

    A `logcpb` that was trained on other windows than the model's needs timm's `pretrained_window_sizes`.

    Raises:
        ConfigError: for encodings that timm's Swin has not: it has `relative` (V1) or `logcpb` (V2) in each block.
    """
    state: State = {n: v for n, v in model.state_dict().items() if not n.endswith("_extra_state")}
    for owner, part in named_encodings(model).items():
        if not part.gives:
            continue
        if not (owner.endswith(".attn.position") and isinstance(part, RelativeBias | LogCPB)):
            raise _no_such_swin(f"{owner} is a {type(part).__name__}")
        _check_kind(model, owner, part)
        for name in [name for name in state if name.startswith(f"{owner}.")]:
            value = state.pop(name)
            value = value.flatten(1).t().contiguous() if name.endswith(TABLE) else value
            state[name.replace(".attn.position.", ".attn.")] = value
    for owner, attention in model.named_modules():
        if isinstance(attention, WindowAttention) and attention.position is None:
            raise _no_such_swin(f"{owner} has no encoding of its own")
    return state


def _check_kind(model: Swin, owner: str, part: RelativeBias | LogCPB) -> None:
    """timm's V1 is a table and q·k, its V2 a network of 512 hidden units, cosine attention and norms behind."""
    block = model.get_submodule(owner.removesuffix(".attn.position"))
    if not isinstance(block, SwinBlock):
        raise _no_such_swin(f"{owner} is not in a block of a Swin")
    v2 = block.attn.logit_scale is not None
    if block.post_norm != v2 or isinstance(part, LogCPB) != v2:
        came = f"{'logcpb' if isinstance(part, LogCPB) else 'relative'} with qk={'cosine' if v2 else 'dot'}"
        raise _no_such_swin(f"{owner} is {came}{' and norms behind' * block.post_norm}")
    if isinstance(part, LogCPB) and (part.form != "swin" or part.cpb_mlp[0].out_features != 512):
        raise _no_such_swin(
            f"{owner} is a network of form {part.form} with {part.cpb_mlp[0].out_features} hidden units, timm's is one "
            "of form swin with 512"
        )
    if isinstance(part, RelativeBias) and part.prefix_bias is not None:
        raise _no_such_swin(f"{owner} has entries for prefix tokens, of which a Swin has none")
    if isinstance(part, RelativeBias) and part.attention_biases is not None:
        raise _no_such_swin(f"{owner} is symmetric, and has entries for offsets without their sign")


def _no_such_swin(why: str) -> ConfigError:
    return ConfigError(
        f"{why}; timm's Swin is V1 (relative in each block, qk='dot', norms before) or V2 (logcpb in each block, "
        "qk='cosine', post_norm=True): keep such a model in its own names (state_dict), which vit2dpe loads"
    )
