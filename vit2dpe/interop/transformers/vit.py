"""ViTs of `transformers`: ViT, DeiT, BEiT, DINOv2, I-JEPA, the towers of CLIP and SigLIP.

They are one architecture, under several spellings of names, those of transformers 5 and of files before it; what
differs otherwise is read off the config and off the weights that are there. Tables are resized as theirs are with
`interpolate_pos_encoding` (bicubic, no antialias). How ours differs: rows of a table for leading tokens are added to
the tokens; the norm behind CLIP's blocks, theirs for the class token alone, is for all tokens. BEiT's tables of offsets
are resized as timm's BEiT does, and not as theirs, which resizes whole matrices too.
"""

from __future__ import annotations

import math
import re

import torch

from ...errors import ConfigError
from ...models.deit import DistilledViT
from ...models.mae_names import State
from ...models.parts import ACTS
from ...models.timm_api import pair
from ...models.vit import ViT
from ..timm.arguments import exact_ratio
from ..timm.steps import BiasTable
from .weights import Config, Converted, Weights, demand, renamed

# Theirs -> ours: the part of a block, or the whole name, without .weight and .bias.
BLOCK = {
    r"layernorm_before|layer_norm1|norm1": "norm1",
    r"layernorm_after|layer_norm2|norm2": "norm2",
    r"attention\.o_proj|attention\.output\.dense|self_attn\.out_proj": "attn.proj",
    r"mlp\.fc1|intermediate\.dense|mlp\.weights_in": "mlp.fc1",
    r"mlp\.fc2|output\.dense|mlp\.weights_out|mlp\.down_proj": "mlp.fc2",
    r"mlp\.gate_proj": "mlp.fc1_g",
    r"mlp\.up_proj": "mlp.fc1_x",
    r"layer_scale([12])\.lambda1|lambda_([12])": r"ls\1\2.gamma",
    r"(?:attention\.attention\.)?relative_position_bias\.(relative_position_bias_table)": r"attn.\1",
    r"(?:attention\.|self_attn\.)([qkv])_proj": r"\1",
    r"attention\.attention\.([qkv])(?:uery|ey|alue)": r"\1",
}
REST = {
    r"embeddings\.(?:cls_token|class_embedding)": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.position_embeddings?": "table",
    r"embeddings\.patch_embeddings?(?:\.projection)?": "patch_embed.proj",
    r"pre_layrnorm": "norm_pre",
    r"layernorm|post_layernorm": "norm",
    r"pooler\.layernorm": "fc_norm",
    r"classifier|cls_classifier|visual_projection": "head",
    r"distillation_classifier": "head_dist",
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.in_proj_(weight|bias)": r"attn_pool.qkv.\1",
    r"head\.attention\.out_proj": "attn_pool.proj",
    r"head\.layernorm": "attn_pool.norm",
    r"head\.mlp\.(fc[12])": r"attn_pool.mlp.\1",
}
FAMILIES = (
    "vit",
    "deit",
    "beit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "clip_vision_model",
    "siglip_vision_model",
)
PREFIXES = ("vision_model.", "vit.", "deit.", "beit.", "dinov2.", "dinov2_with_registers.", "ijepa.")
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def vit(config: Config, w: Weights) -> Converted:
    """`ViTForImageClassification` and its kin: logits are equal, or `forward` is their `pooler_output`.

    Of a model without classifier `forward_features` is their `last_hidden_state` (of CLIP behind the last norm).
    """
    demand(config, hidden_dropout_prob=0.0)
    # A head over tanh, a token for hidden patches, and places by number: no part of the function.
    w.without(*PREFIXES).drop("pooler.dense", "embeddings.mask_token", "embeddings.position_ids")
    w.left = {_ours(name): value for name, value in w.left.items()}
    kind, width, depth = config["model_type"], config["hidden_size"], config["num_hidden_layers"]
    size, patch = pair(config["image_size"]), pair(config["patch_size"])
    if "dist_token" in w.left and "head_dist.weight" not in w.left:  # a leading token that nothing reads
        w.left["reg_token"] = w.left.pop("dist_token")
    grid = [side // p for side, p in zip(size, patch, strict=True)]
    tokens: list[str] = [
        name for name in ("cls_token", "dist_token" if "dist_token" in w.left else "reg_token") if name in w.left
    ]
    if "table" in w.left:
        tokens = tokens[: len(w.left["table"].reshape(-1, width)) - math.prod(grid)]  # DINOv2's registers have no row
    pooled = "attn_pool.latent" in w.left
    head = w.left.get("head.weight")
    if head is not None and head.shape[1] != width:
        raise ConfigError(
            f"the classifier of this {kind} reads {head.shape[1]} channels, class token and mean of the patches side "
            f"by side, and ours {width}: give its encoder (model.{kind})"
        )
    if kind.startswith("siglip") and head is not None:  # theirs, which has no pooling by attention
        w.drop("attn_pool.")
        pooled = False
    mean = "fc_norm.weight" in w.left
    pool = "map" if pooled else "token" if tokens and not mean else "avg"
    gated = bool(config.get("use_swiglu_ffn"))
    state = _state(w, depth, tokens, grid, gated)
    act = config.get("hidden_act", "gelu")
    act = ACTIVATIONS.get(act, act)
    if not gated and act not in ACTS:
        raise ConfigError(f"a {kind} with hidden_act={act!r} is not covered, only {', '.join(ACTS)}")
    position = f"learned(resize={'antialias' if kind == 'dinov2_with_registers' else 'plain'})"
    if kind == "beit":
        demand(config, use_absolute_position_embeddings=False, use_shared_relative_position_bias=False)
        demand(config, use_relative_position_bias=True)
        position = "relative(prefix=true, resize=geometric)"
    arguments = dict(
        position=position,
        img_size=list(size),
        patch_size=list(patch),
        in_chans=config.get("num_channels", 3),
        num_classes=0 if head is None else head.shape[0],
        global_pool=pool,
        embed_dim=width,
        depth=depth,
        num_heads=config["num_attention_heads"],
        class_token="cls_token" in tokens,
        reg_tokens=state["reg_token"].shape[1] if "reg_token" in state else 0,
        norm_eps=config["layer_norm_eps"],
        mlp_ratio=exact_ratio(state["blocks.0.mlp.fc2.weight"].shape[1], width),
        mlp_layer="swiglu" if gated else "mlp",
        act_layer="gelu" if gated else act,
        qkv_bias="qv" if "blocks.0.attn.q_bias" in state else "blocks.0.attn.qkv.bias" in state,
        pre_norm="norm_pre.weight" in state,
        fc_norm=mean,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
    )
    if head is not None and "head.bias" not in state:  # CLIP's projection
        state["head.bias"] = head.new_zeros(head.shape[0])
    w.finish()
    return Converted(DistilledViT if "dist_token" in tokens else ViT, arguments, state)


def tower(config: Config, w: Weights) -> Converted:
    """The images' half of `CLIPModel` and `SiglipModel`: `get_image_features`; or `SiglipForImageClassification`."""
    w.drop("text_model.", "text_projection.", "logit_scale", "logit_bias")
    return vit(config["vision_config"] | {"model_type": f"{config['model_type']}_vision_model"}, w)


def _state(w: Weights, depth: int, tokens: list[str], grid: list[int], gated: bool) -> State:
    """Our state dict of weights under our names, but for those of `table`, q, k and v."""
    state: State = {name: w.take(name).reshape(1, 1, -1) for name in tokens}
    if "table" in w.left:
        table = w.take("table").reshape(1, -1, w.left["patch_embed.proj.weight"].shape[0])
        state["position.pos_embed"] = table[:, len(tokens) :].unflatten(1, grid)
        for row, name in enumerate(tokens):
            state[name] = state[name] + table[:, row : row + 1]
    for i in range(depth):
        attn = f"blocks.{i}.attn."
        for part in ("weight", "bias") if f"blocks.{i}.k.bias" in w.left else ("weight",):
            state[f"{attn}qkv.{part}"] = torch.cat([w.take(f"blocks.{i}.{x}.{part}") for x in "qkv"])
        state |= {f"{attn}{x}_bias": w.take(name) for x in "qv" if (name := f"blocks.{i}.{x}.bias") in w.left}
        for part in ("weight", "bias"):
            if gated and (both := w.left.pop(f"blocks.{i}.mlp.fc1.{part}", None)) is not None:  # before transformers 5
                state[f"blocks.{i}.mlp.fc1_g.{part}"], state[f"blocks.{i}.mlp.fc1_x.{part}"] = both.chunk(2)
    for part in ("weight", "bias"):
        if (joined := w.left.pop(f"attn_pool.qkv.{part}", None)) is not None:
            q, kv = joined.tensor_split([len(joined) // 3])
            state |= {f"attn_pool.q.{part}": q, f"attn_pool.kv.{part}": kv}
    ours = r"blocks\.\d+\.(?:norm|ls|mlp|attn\.(?:proj|rel))|patch_embed\.|(?:fc_)?norm|head|attn_pool\.|reg_token"
    state |= {name: w.take(name) for name in list(w.left) if re.match(ours, name)}
    BiasTable("attn.", "attn.position.", (grid[0], grid[1]), prefix=True).into(state)
    return state


def _ours(name: str) -> str:
    """A name of theirs in our spelling; one that is not known stays, and is refused in the end."""
    if block := re.fullmatch(r"(?:encoder\.)?layers?\.(\d+)\.(.+)", name):
        part = renamed(block[2], BLOCK)
        return name if part is None else f"blocks.{block[1]}.{part}"
    found = renamed(name, REST) or name
    return "table" if found == "table.weight" else found
