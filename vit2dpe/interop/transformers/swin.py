"""Swin and Swin V2 of `transformers`: the grid is filled up with zeros that are attended to, then shifted.

How ours differs: V2 shifts along axes that have several windows at the training size, as timm's does
(`padding="timm"`), and so is equal at sizes that windows divide; at others timm's shifts before it fills up. Where a
window is larger than the grid of a stage at the training size, theirs makes the window smaller when it runs, and keeps
the table of the larger one: refused.
"""

from __future__ import annotations

import re

import torch

from ...errors import ConfigError
from ...models.mae_names import State
from ...models.swin.model import Swin
from ...models.timm_api import pair
from .vit import BLOCK
from .weights import Config, Converted, Weights, demand, renamed

_BLOCK = BLOCK | {
    r"attention\.self\.([qkv])(?:uery|ey|alue)": r"\1",
    r"attention\.(?:self|relative_position_bias)\.(relative_position_bias_table)": r"attn.position.\1",
    r"attention\.self\.continuous_position_bias_mlp\.([02])": r"attn.position.cpb_mlp.\1",
    r"attention\.self\.logit_scale": "attn.logit_scale",
}
_REST = {
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"embeddings\.norm": "patch_embed.norm",
    r"layernorm": "norm",
    r"classifier": "head.fc",
}


def swin(config: Config, w: Weights) -> Converted:
    """`SwinForImageClassification` and `Swinv2ForImageClassification`: logits are equal; of a model without classifier
    `forward` is their `pooler_output`, and `forward_features`, (B, rows, columns, D), their `last_hidden_state`."""
    demand(config, hidden_act="gelu", use_absolute_embeddings=False, layer_norm_eps=1e-5, hidden_dropout_prob=0.0)
    second = config["model_type"] == "swinv2"
    w.without("swin.", "swinv2.", "encoder.").drop("embeddings.mask_token", "relative_position_index")
    w.drop("relative_coords_table")
    w.left = {_ours(name): value for name, value in w.left.items()}
    size, patch, window = pair(config["image_size"]), pair(config["patch_size"]), config["window_size"]
    for stage in range(len(config["depths"])):
        grid = [side // (p * 2**stage) for side, p in zip(size, patch, strict=True)]
        if min(grid) < window:
            raise ConfigError(
                f"stage {stage} of this {config['model_type']} has {grid[0]}x{grid[1]} tokens and windows of {window}, "
                "with tables that its places do not fill: not covered"
            )
    state: State = {}
    for name in [name for name in w.left if name.endswith(".q.weight")]:
        block, parts = name.removesuffix("q.weight"), "qkv"
        state[f"{block}attn.qkv.weight"] = torch.cat([w.take(f"{block}{x}.weight") for x in parts])
        if not config["qkv_bias"]:
            continue
        if second:  # keys have no bias
            state |= {f"{block}attn.{x}_bias": w.take(f"{block}{x}.bias") for x in "qv"}
        else:
            state[f"{block}attn.qkv.bias"] = torch.cat([w.take(f"{block}{x}.bias") for x in parts])
    for name in list(w.left):
        if re.match(r"layers\.\d+\.(?:blocks\.\d+\.(?:attn|norm|mlp)|downsample)|patch_embed|norm\.|head\.", name):
            value = w.take(name)
            if name.endswith("relative_position_bias_table"):  # (offsets, heads) -> (heads, rows, columns)
                value = value.T.unflatten(1, (2 * window - 1, 2 * window - 1)).contiguous()
            state[name] = value
    w.finish()
    arguments = dict(
        position="logcpb" if second else "relative(resize=geometric)",
        padding="timm" if second else "attend",
        img_size=list(size),
        patch_size=list(patch),
        in_chans=config["num_channels"],
        num_classes=len(state["head.fc.weight"]) if "head.fc.weight" in state else 0,
        embed_dim=config["embed_dim"],
        depths=list(config["depths"]),
        num_heads=list(config["num_heads"]),
        window_size=window,
        mlp_ratio=float(config["mlp_ratio"]),
        qkv_bias=config["qkv_bias"],
    )
    if second:
        arguments |= dict(
            qk="cosine",
            post_norm=True,
            pretrained_window_sizes=list(config["pretrained_window_sizes"])[: len(config["depths"])],
        )
    return Converted(Swin, arguments, state)


def _ours(name: str) -> str:
    if merge := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
        return f"layers.{int(merge[1]) + 1}.downsample.{merge[2]}"
    if block := re.fullmatch(r"(layers\.\d+\.blocks\.\d+)\.(.+)", name):
        part = renamed(block[2], _BLOCK)
        return name if part is None else f"{block[1]}.{part}"
    return renamed(name, _REST) or name
