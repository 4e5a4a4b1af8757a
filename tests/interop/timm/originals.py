"""Original files, made of a timm model by inverting timm's own conversion (`timm/models/*.py`)."""

from __future__ import annotations

import numpy as np
import torch

Swaps = list[tuple[str, str]]
CLIP: Swaps = [
    ("patch_embed.proj", "conv1"),
    ("pos_embed", "positional_embedding"),
    ("blocks.", "transformer.resblocks."),
    ("norm_pre", "ln_pre"),
    (".norm1", ".ln_1"),
    (".norm2", ".ln_2"),
    ("qkv.", "in_proj_"),
    ("attn.proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
]


def renamed(state, swaps):
    names = {}
    for name, value in state.items():
        for theirs, original in swaps:
            name = name.replace(theirs, original)
        names[name] = value
    return names


def clip(model):
    """OpenAI's and OpenCLIP's: tokens and table without a batch, the projection transposed, beside a text tower."""
    state = dict(model.state_dict())
    state = {name.replace("norm.", "ln_post.") if name.startswith("norm.") else name: v for name, v in state.items()}
    out = {"class_embedding": state.pop("cls_token")[0, 0]}
    state["pos_embed"] = state["pos_embed"][0]
    if "head.weight" in state:
        out["proj"] = state["head.weight"].t()
    out |= {n: v for n, v in renamed(state, CLIP).items() if not n.startswith("head.")}
    text = {"token_embedding.weight": torch.zeros(4, 8), "logit_scale": torch.zeros(())}
    return {f"visual.{name}": value for name, value in out.items()} | text


def perception_encoder(model):
    """PE: as CLIP, with scales of branches and attention pooling of other names."""
    state = dict(model.state_dict())
    pool = {name: state.pop(name) for name in list(state) if name.startswith("attn_pool.")}
    state = {name.replace("norm.", "ln_post.") if name.startswith("norm.") else name: v for name, v in state.items()}
    state = {f"{name}.gamma".replace("gamma_", "ls_") if "gamma_" in name else name: v for name, v in state.items()}
    out = {}
    if "cls_token" in state:
        out["class_embedding"] = state.pop("cls_token")[0, 0]
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][0]
    if "head.weight" in state:
        out["proj"] = state.pop("head.weight").t()
        state.pop("head.bias", None)
    out |= renamed(state, CLIP)
    if pool:
        for part in ("weight", "bias"):
            out[f"attn_pool.attn.in_proj_{part}"] = torch.cat([pool.pop(f"attn_pool.{x}.{part}") for x in ("q", "kv")])
        out["attn_pool.probe"] = pool.pop("attn_pool.latent")
        names = [
            ("attn_pool.proj", "attn_pool.attn.out_proj"),
            ("attn_pool.norm", "attn_pool.layernorm"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ]
        out |= renamed(pool, names)
    return {f"visual.{name}": value for name, value in out.items()}


def dinov2(model):
    """A row of the table for the class token alone, its registers, its gated MLP, its mask token."""
    state = dict(model.state_dict())
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        row = torch.randn_like(state["cls_token"])
        state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - row
    if hasattr(model.blocks[0].mlp, "gate_last"):
        state = renamed(state, [("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")])
    return state | {"mask_token": torch.randn(1, model.embed_dim)}


def tips(model):
    """TIPSv2: DINOv2's names beside a text tower."""
    vision = {f"vision_encoder.{name}": value for name, value in dinov2(model).items()}
    return vision | {"text_encoder.ln_final.weight": torch.zeros(4)}


def open_clip(prefix="visual.trunk."):
    """OpenCLIP around a ViT of timm's (SigLIP, ...)."""

    def original(model):
        state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
        return state | {"logit_scale": torch.zeros(()), "text.transformer.weight": torch.zeros(3, 3)}

    return original


def aimv2(model):
    names = [
        ("norm1", "norm_1"),
        ("norm2", "norm_2"),
        ("patch_embed.", "preprocessor.patchifier."),
        ("mlp.fc1_g", "mlp.fc1"),
        ("mlp.fc1_x", "mlp.fc3"),
    ]
    state = renamed(model.state_dict(), names)
    state["preprocessor.pos_embed"] = state.pop("pos_embed")
    last = {name: state.pop(name) for name in list(state) if name.startswith("norm.")}
    state = {f"trunk.{name}" if name.startswith("blocks.") else name: value for name, value in state.items()}
    return state | {f"trunk.post_trunk_{name}": value for name, value in last.items()}


def beit3(model):
    """Maps of q, k and v, names of torchscale, a branch B for text, two rows of the table that serve padding."""
    state = dict(model.state_dict())
    out = {"beit3.vision_embed.cls_token": state.pop("cls_token")}
    out["beit3.encoder.embed_positions.A.weight"] = torch.cat(
        [torch.zeros(2, model.embed_dim), state.pop("pos_embed")[0]]
    )
    for part in ("weight", "bias"):
        out[f"beit3.vision_embed.proj.{part}"] = state.pop(f"patch_embed.proj.{part}")
    names = [
        ("attn.norm.", "self_attn.inner_attn_ln.A."),
        ("mlp.norm.", "ffn.A.ffn_layernorm."),
        ("attn.proj.", "self_attn.out_proj.A."),
        ("mlp.fc", "ffn.A.fc"),
        ("norm1.", "self_attn_layer_norm.A."),
        ("norm2.", "final_layer_norm.A."),
    ]
    for name, value in state.items():
        if name.startswith("blocks."):
            block, part = name.removeprefix("blocks.").split(".", 1)
            if part.startswith("attn.qkv."):
                for letter, piece in zip("qkv", value.chunk(3), strict=True):
                    last = part.removeprefix("attn.qkv.")
                    out[f"beit3.encoder.layers.{block}.self_attn.{letter}_proj.A.{last}"] = piece
            else:
                ((original, _),) = renamed({part: value}, names).items()
                out[f"beit3.encoder.layers.{block}.{original}"] = value
                out[f"beit3.encoder.layers.{block}.{original}".replace(".A.", ".B.")] = value + 1
        else:
            out[name] = value
    return {"model": out | {"beit3.text_embed.weight": torch.zeros(2, 2)}}


def i_jepa(model):
    encoder = {f"module.{name}": value for name, value in model.state_dict().items()}
    return {"encoder": encoder, "predictor": {"module.mask_token": torch.zeros(1, 1, 4)}, "epoch": 300}


def radio(model, side=12):
    """RADIO: patches by a linear map, a class token for each teacher and registers, a table of a larger grid."""
    state = dict(model.state_dict())
    out = {"patch_generator.embedder.weight": state.pop("patch_embed.proj.weight").flatten(1)}
    del state["patch_embed.proj.bias"]
    out["patch_generator.cls_token.token"] = torch.cat([state.pop("cls_token"), state.pop("reg_token")], dim=1)[0]
    del state["pos_embed"]
    out["patch_generator.pos_embed"] = torch.randn(1, side * side, model.embed_dim)
    out |= {name: value for name, value in state.items() if name.startswith("blocks.")}
    out = {f"radio_model.model.{name}": value for name, value in out.items()}
    return out | {"radio_model.summary_idxs": torch.zeros(2), "input_conditioner.norm_mean": torch.zeros(3)}


def dinov3(model):
    state = renamed(
        model.state_dict(), [("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens")]
    )
    return state | {"mask_token": torch.randn(1, model.embed_dim), "rope_embed.periods": torch.ones(4)}


def pretrained(model):
    """BEiT's and EVA's: a mask token."""
    return model.state_dict() | {"mask_token": torch.randn(1, 1, model.embed_dim)}


def deit(model):
    """DeiT III names its scales otherwise; all are kept under "model"."""
    return {"model": renamed(model.state_dict(), [("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")])}


def swin(model):
    """The patches are merged behind a stage instead of before the next, tables of indices and masks are stored."""
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts).replace("head.fc.", "head.")] = value
    index, mask = torch.zeros(4, 4), torch.zeros(2, 4, 4)
    return {
        "model": state | {"layers.0.blocks.0.attn.relative_position_index": index, "layers.0.blocks.1.attn_mask": mask}
    }


def eva_clip(model):
    """EVA-CLIP's tower beside its text, with tables of rotations."""
    state = {f"visual.{name}": value for name, value in model.state_dict().items()}
    return {"module": state | {"visual.rope.freqs_cos": torch.zeros(4, 4), "logit_scale": torch.zeros(())}}


def google_npz(model, path, big_vision=False, prefix=""):
    """ViT's and AugReg's, or big_vision's, with its attention pooling. Flax keeps maps as (in, out)."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    heads, dim = model.blocks[0].attn.num_heads, model.embed_dim
    out = {f"{prefix}embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)}
    out[f"{prefix}embedding/bias"] = state["patch_embed.proj.bias"]
    table = f"{prefix}pos_embedding" if big_vision else f"{prefix}Transformer/posembed_input/pos_embedding"
    out[table] = state["pos_embed"]
    if "cls_token" in state:
        out[f"{prefix}cls"] = state["cls_token"]
    if "head.weight" in state:
        out[f"{prefix}head/kernel"], out[f"{prefix}head/bias"] = state["head.weight"].T, state["head.bias"]
    attention, mlp, second = (0, 0, 1) if big_vision else (1, 3, 2)

    def dense(theirs, name):
        out[f"{theirs}/kernel"], out[f"{theirs}/bias"] = state[f"{name}.weight"].T, state[f"{name}.bias"]

    def norm(theirs, name):
        out[f"{theirs}/scale"], out[f"{theirs}/bias"] = state[f"{name}.weight"], state[f"{name}.bias"]

    def projection(theirs, weight, bias):  # (out, in) -> (in, heads, width)
        out[f"{theirs}/kernel"] = weight.T.reshape(dim, heads, -1)
        out[f"{theirs}/bias"] = bias.reshape(heads, -1)

    def last(theirs, name):  # (D, D) -> (heads, width, D)
        out[f"{theirs}/kernel"] = state[f"{name}.weight"].T.reshape(heads, -1, dim)
        out[f"{theirs}/bias"] = state[f"{name}.bias"]

    norm(f"{prefix}Transformer/encoder_norm", "norm")
    for i in range(len(model.blocks)):
        owner, block = f"{prefix}Transformer/encoderblock_{i}", f"blocks.{i}"
        inside = f"{owner}/MultiHeadDotProductAttention_{attention}"
        weights, biases = (np.split(state[f"{block}.attn.qkv.{part}"], 3) for part in ("weight", "bias"))
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            projection(f"{inside}/{name}", weight, bias)
        last(f"{inside}/out", f"{block}.attn.proj")
        norm(f"{owner}/LayerNorm_0", f"{block}.norm1")
        norm(f"{owner}/LayerNorm_{second}", f"{block}.norm2")
        for r in range(2):
            dense(f"{owner}/MlpBlock_{mlp}/Dense_{r}", f"{block}.mlp.fc{r + 1}")
    if "attn_pool.latent" in state:
        owner = f"{prefix}MAPHead_0"
        inside = f"{owner}/MultiHeadDotProductAttention_0"
        out[f"{owner}/probe"] = state["attn_pool.latent"]
        projection(f"{inside}/query", state["attn_pool.q.weight"], state["attn_pool.q.bias"])
        weights, biases = (np.split(state[f"attn_pool.kv.{part}"], 2) for part in ("weight", "bias"))
        for name, weight, bias in zip(("key", "value"), weights, biases, strict=True):
            projection(f"{inside}/{name}", weight, bias)
        last(f"{inside}/out", "attn_pool.proj")
        norm(f"{owner}/LayerNorm_0", "attn_pool.norm")
        for r in range(2):
            dense(f"{owner}/MlpBlock_0/Dense_{r}", f"attn_pool.mlp.fc{r + 1}")
    np.savez(path, **out)
    return path
