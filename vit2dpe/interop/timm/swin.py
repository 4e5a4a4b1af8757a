"""A timm Swin becomes ours: `from_timm_swin`.

The model is rebuilt as one of ours and its weights are loaded strictly. Covered: timm's `SwinTransformer` (Swin, S3)
and `SwinTransformerV2`. Other parts are refused by name.

Logits are equal at every size that whole windows fill at every stage. At others timm rolls the grid before it fills it
up, so that its last window mixes both edges of the image, and attends to what it filled up with; ours fills up first
and masks. A timm Swin with `dynamic_img_size` never shifts the windows of a stage that had one window at the training
size; ours shifts where there are several, as timm's does after `set_input_size`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from ...errors import ConfigError
from ...models.spec import Arguments
from ...models.swin.model import Swin
from ...models.swin.stage import Spec
from ...models.timm_api import pretrained_cfg_of

TimmSwin: TypeAlias = SwinTransformer | SwinTransformerV2


def from_timm_swin(theirs: TimmSwin, position: Spec | None = None, **kwargs: Any) -> Swin:
    """Our Swin with the weights of a timm Swin.

    Args:
        theirs: a timm `SwinTransformer` or `SwinTransformerV2`.
        position: another encoding; default: its own, so that logits are equal. The weights that are not position are
            kept either way.
        kwargs: further arguments of `Swin`: `window_policy`, `padding`, drop rates.

    Raises:
        ConfigError: for a family or a part that is not covered.
    """
    v2 = _refuse(theirs)
    ours = Swin(position or ("logcpb" if v2 else "relative"), **_arguments(theirs, v2) | kwargs)
    state = theirs.state_dict()
    if position is not None:
        # Their tables and networks are left out; the encoding's own parameters are drawn.
        state = {name: value for name, value in state.items() if "bias_table" not in name and "cpb_mlp" not in name}
        state |= {name: value for name, value in ours.state_dict().items() if "position." in name}
    ours.load_state_dict(state)
    ours.pretrained_cfg = pretrained_cfg_of(theirs)
    like = theirs.patch_embed.proj.weight
    return ours.to(like.device, like.dtype).train(theirs.training)


def _arguments(theirs: TimmSwin, v2: bool) -> Arguments:
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
        drop_path_rate=0.0,
    )
    if v2:
        arguments |= dict(qk="cosine", post_norm=True)
        arguments |= dict(pretrained_window_sizes=[tuple(block.attn.pretrained_window_size) for block in first])
    return arguments


def _refuse(theirs: TimmSwin) -> bool:
    """Refuse parts that our Swin cannot have; whether it is a V2."""
    name = type(theirs).__name__
    if type(theirs) not in (SwinTransformer, SwinTransformerV2):
        raise ConfigError(f"{name} is not covered; covered: timm's SwinTransformer and SwinTransformerV2")
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
        raise ConfigError(f"this {name} has {', '.join(reasons)}, which is not covered")
    return type(theirs) is SwinTransformerV2


def _gelu(act: nn.Module) -> bool:
    return type(act).__name__ == "GELU" and getattr(act, "approximate", "none") == "none"
