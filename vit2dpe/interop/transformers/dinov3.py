"""DINOv3: rotary over 2-D coordinates in pairs (i, i + Dh/2), registers, biases of q and v alone, LayerScale."""

from __future__ import annotations

import torch

from ...models.vit import ViT
from ..timm.arguments import exact_ratio
from .weights import Config, Converted, Weights, demand, interleaved

# Parts of a block that change their names alone: ours -> theirs.
MAPS = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"}
MLP = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
GATED_MLP = {"mlp.fc1_x": "mlp.up_proj", "mlp.fc1_g": "mlp.gate_proj", "mlp.fc2": "mlp.down_proj"}


def dinov3(config: Config, w: Weights) -> Converted:
    """`DINOv3ViTModel`: the ViT without classifier; `forward_features` is its `last_hidden_state`."""
    gated, width, heads = bool(config.get("use_gated_mlp")), config["hidden_size"], config["num_attention_heads"]
    demand(config, hidden_act="silu" if gated else "gelu", key_bias=False)
    demand(config, query_bias=True, value_bias=True, proj_bias=True, mlp_bias=True)
    w.without("model.").drop("mask_token", "inv_freq")
    embed, registers = "embeddings.", config["num_register_tokens"]
    state = {"cls_token": w.take(embed + "cls_token"), **w.linear("norm", "norm")}
    state |= w.linear("patch_embed.proj", embed + "patch_embeddings")
    table = w.take(embed + "register_tokens")  # (1, R, D)
    if registers:
        state["reg_token"] = table
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"blocks.{i}.", f"layer.{i}."
        q, k, v = (w.take(f"{theirs}attention.{name}_proj.weight") for name in "qkv")
        state[f"{ours}attn.qkv.weight"] = torch.cat([interleaved(q, heads), interleaved(k, heads), v])
        state[f"{ours}attn.q_bias"] = interleaved(w.take(f"{theirs}attention.q_proj.bias"), heads)
        state[f"{ours}attn.v_bias"] = w.take(f"{theirs}attention.v_proj.bias")
        state |= w.linears(ours, theirs, MAPS | (GATED_MLP if gated else MLP))
        for n in (1, 2):
            state[f"{ours}ls{n}.gamma"] = w.take(f"{theirs}layer_scale{n}.lambda1")
    w.finish()
    rescale, jitter = config.get("pos_embed_rescale") or 1.0, config.get("pos_embed_jitter") or 1.0
    base, shift = float(config["rope_theta"]), config.get("pos_embed_shift") or 0.0
    return Converted(
        ViT,
        dict(
            position=f"rope_dinov3(base={base}, rescale={rescale}, jitter={jitter}, shift={shift})",
            img_size=config["image_size"],
            patch_size=config["patch_size"],
            in_chans=config["num_channels"],
            num_classes=0,
            embed_dim=width,
            depth=config["num_hidden_layers"],
            num_heads=heads,
            reg_tokens=registers,
            norm_eps=config["layer_norm_eps"],
            mlp_ratio=exact_ratio(config["intermediate_size"], width),
            mlp_layer="swiglu" if gated else "mlp",
            qkv_bias="qv",
            init_values=1.0,
        ),
        state,
    )
