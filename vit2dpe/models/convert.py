"""A timm checkpoint, kept, run at another size, or with another encoding: `from_timm`.

The model is rebuilt as one of ours and the weights are loaded strictly; nothing is patched. Covered so far: timm's
`VisionTransformer` with plain blocks (ViT, DeiT, DeiT-III, registers, average, token or attention pooling, LayerScale,
qk-norm). What is not covered is refused by name, with what it has that ours has not.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from ..encodings import PositionEncoding
from ..errors import ConfigError
from .vit import ViT


def from_timm(
    model: str | nn.Module, position: str | PositionEncoding | None = None, *, pretrained: bool = False, **kwargs: Any
) -> ViT:
    """Our ViT with the weights of a timm model.

    Args:
        model: a timm name, or a timm model.
        position: another encoding; default: its own, so that logits are equal. The weights that are not position are
            kept either way, and the rows that a table adds to class token and registers stay with them.
        pretrained: for a name: load timm's weights, with timm's loader.
        kwargs: for a name: passed to `timm.create_model`.

    Raises:
        ConfigError: for a family or a part that is not covered.
    """
    theirs: Any = timm.create_model(model, pretrained=pretrained, **kwargs) if isinstance(model, str) else model
    _refuse(theirs, model if isinstance(model, str) else type(theirs).__name__)
    own = "none" if theirs.pos_embed is None else "learned"
    ours = ViT(own, **_shape(theirs, theirs.blocks[0].attn.num_heads))
    ours.load_state_dict(theirs.state_dict())
    ours.pretrained_cfg = theirs.pretrained_cfg
    if position is not None:
        ours = _with_position(ours, position)
    like = theirs.patch_embed.proj.weight
    return ours.to(like.device, like.dtype).train(theirs.training)


def _with_position(model: ViT, position: str | PositionEncoding) -> ViT:
    """The same weights around another encoding."""
    ours = ViT(position, **_shape(model, model.blocks[0].attn.heads))  # type: ignore[union-attr, arg-type]
    kept = {name: value for name, value in model.state_dict().items() if "position." not in name}
    missing, unexpected = ours.load_state_dict(kept, strict=False)
    lost = [name for name in missing if "position." not in name] + list(unexpected)
    if lost:
        raise ConfigError(f"weights without a counterpart: {', '.join(lost[:5])}")
    ours.pretrained_cfg = model.pretrained_cfg
    return ours


def _shape(model: Any, heads: int) -> dict[str, Any]:
    """Constructor arguments of a ViT of these sizes and parts, read off a model, timm's or ours."""
    first = model.blocks[0]
    return dict(
        img_size=tuple(model.patch_embed.img_size),
        patch_size=tuple(model.patch_embed.patch_size),
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        global_pool=model.global_pool,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=heads,
        mlp_ratio=first.mlp.fc1.out_features / model.embed_dim,
        qkv_bias=first.attn.qkv.bias is not None,
        qk_norm=not isinstance(first.attn.q_norm, nn.Identity),
        init_values=1.0 if hasattr(first.ls1, "gamma") else None,
        class_token=model.cls_token is not None,
        reg_tokens=0 if model.reg_token is None else model.reg_token.shape[1],
        fc_norm=not isinstance(model.fc_norm, nn.Identity),
    )


def _refuse(theirs: Any, name: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    if type(theirs) is not VisionTransformer:
        raise ConfigError(
            f"{name} is a {type(theirs).__name__}, which is not covered yet; covered: timm's VisionTransformer "
            "(vit_*, deit_*, deit3_*)"
        )
    block = theirs.blocks[0]
    strange = {
        "a norm before the blocks": not isinstance(theirs.norm_pre, nn.Identity),
        "a patch embedding that is not one convolution": type(theirs.patch_embed.proj) is not nn.Conv2d
        or not isinstance(theirs.patch_embed.norm, nn.Identity),
        "blocks of another kind": type(block).__name__ != "Block" or not hasattr(block.mlp, "fc1"),
        "an MLP that is not fc1, GELU, fc2": not _plain_mlp(block.mlp),
        "a norm that is not LayerNorm with eps 1e-6": not _layer_norm(block.norm1),
        "a classifier of another kind": type(theirs.head) not in (nn.Linear, nn.Identity),
        "a pooling of another kind": theirs.global_pool not in ("token", "avg", "map", ""),
        "attention of another kind": type(block.attn).__name__ != "Attention"
        or not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity),
    }
    found = [what for what, there in strange.items() if there]
    if found:
        raise ConfigError(f"{name} has {', '.join(found)}, which is not covered yet")


def _plain_mlp(mlp: nn.Module) -> bool:
    act, norm = getattr(mlp, "act", None), getattr(mlp, "norm", nn.Identity())
    return type(act) is nn.GELU and act.approximate == "none" and isinstance(norm, nn.Identity)


def _layer_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.eps == 1e-6
