"""timm's model families, read: what a model of ours needs to compute the same as one of theirs.

`FAMILIES` is the list of what is covered, by timm's class. A reader takes a timm model and returns a `Recipe`, or
refuses with what the model has that ours has not. A new family is a reader and a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.layers import AttentionPoolLatent, GluMlp, Mlp, RmsNorm, RotaryEmbeddingMixed, SwiGLU
from torch import nn

from ..errors import ConfigError
from .deit import DistilledViT
from .translate import BiasTable, FlatTable, Frequencies, Fuse, Rename, Reorder, Step, columns_first, halves
from .vit import ViT


@dataclass(frozen=True)
class Recipe:
    """How a timm model is built as one of ours.

    Args:
        model: our class.
        position: the word of its encoding.
        arguments: of the constructor, beside the position.
        steps: from their parameters to ours, in order.
        policy: what it does at other sizes, where that is not what its encodings do by themselves.
        grid: (h, w) of its patches, which the policy scales to.
    """

    model: Callable[..., ViT]
    position: str
    arguments: dict[str, Any]
    steps: tuple[Step, ...]
    grid: tuple[int, int]
    policy: str | None = None


def vision_transformer(theirs: Any) -> Recipe:
    """`VisionTransformer`: ViT, DeiT, CLIP, SigLIP, DINOv2, FlexiViT, BEiT-3, MAE."""
    arguments = _arguments(theirs)
    tokens = () if theirs.no_embed_class else _tokens(theirs)
    grid = theirs.patch_embed.grid_size
    if theirs.pos_embed is None:
        return Recipe(ViT, "none", arguments, (), grid)
    return Recipe(ViT, "learned", arguments, (FlatTable("position.pos_embed", grid, tokens),), grid)


def distilled(theirs: Any) -> Recipe:
    """`VisionTransformerDistilled`: DeiT with a distillation token."""
    arguments, grid = _arguments(theirs), theirs.patch_embed.grid_size
    del arguments["reg_tokens"]
    table = FlatTable("position.pos_embed", grid, (("cls_token", 1), ("dist_token", 1)))
    return Recipe(DistilledViT, "learned", arguments, (table,), grid)


def eva(theirs: Any) -> Recipe:
    """`Eva`: EVA, EVA-02, rope-vit, DINOv3, Perception Encoder, timm's own ViTs with rotary encodings."""
    arguments, grid = _arguments(theirs), theirs.patch_embed.grid_size
    width = theirs.embed_dim // arguments["num_heads"]
    word, order, policy = ("none", None, None) if theirs.rope is None else _rotary(theirs, grid, width)
    steps: list[Step] = [Rename("gamma_1", "ls1.gamma"), Rename("gamma_2", "ls2.gamma")]
    if theirs.blocks[0].attn.qkv is None:
        steps.append(Fuse())
    if order is not None:
        steps.append(Reorder(arguments["num_heads"], order))
    shared = word != "none" and not isinstance(theirs.rope, RotaryEmbeddingMixed)
    if theirs.pos_embed is not None:
        owner = "position.terms.0.pos_embed" if shared else "position.pos_embed"
        steps.append(FlatTable(owner, grid, () if theirs.no_embed_class else _tokens(theirs)))
        word = "learned" if word == "none" else f"learned+{word}"
    if isinstance(theirs.rope, RotaryEmbeddingMixed):
        steps.append(Frequencies(xy=theirs.rope.grid_indexing == "xy"))
    return Recipe(ViT, word, arguments, tuple(steps), grid, policy)


def _rotary(theirs: Any, grid: tuple[int, int], width: int) -> tuple[str, tuple[int, ...] | None, str | None]:
    """The word of a rotary encoding, the order of channels that makes it ours, and its policy."""
    rope, kind = theirs.rope, type(theirs.rope).__name__
    xy = rope.grid_indexing == "xy"
    if kind == "RotaryEmbeddingMixed":
        return f"rope_mixed(base={rope.temperature})", None, None
    half = theirs.blocks[0].attn.rotate_half
    if half and xy:
        raise ConfigError("half-split pairs with columns first are not covered")
    order = halves(width) if half else columns_first(width) if xy else None
    if kind == "RotaryEmbeddingDinoV3":
        if rope.normalize_coords != "separate" or rope.grid_offset or rope.min_period or rope.max_period:
            raise ConfigError("a DINOv3 rotary encoding with coordinates or periods of another kind is not covered")
        rescale, jitter, shift = rope.rescale_coords or 1.0, rope.jitter_coords or 1.0, rope.shift_coords or 0.0
        word = f"rope_dinov3(base={rope.temperature}, rescale={rescale}, jitter={jitter}, shift={shift})"
        return word, order, None
    if kind != "RotaryEmbeddingCat" or rope.in_pixels or rope.aug_active or rope.grid_type != "index":
        raise ConfigError(f"a rotary encoding of another kind ({kind}) is not covered")
    options = [f"base={rope.temperature}"]
    if rope.grid_offset:
        options.append(f"start={rope.grid_offset}")
    if rope.ref_feat_shape is None:
        return f"rope({', '.join(options)})", order, None
    if rope.grid_offset not in (0, 1):
        raise ConfigError(f"a rotary encoding that counts places from {rope.grid_offset} is not covered")
    steps = tuple(ref / now for ref, now in zip(rope.ref_feat_shape, grid, strict=True))
    if steps != (1.0, 1.0):
        options.append(f"step={steps[0] if steps[0] == steps[1] else steps}")
    return f"rope({', '.join(options)})", order, f"interpolate(align={'one' if rope.grid_offset else 'corner'})"


def beit(theirs: Any) -> Recipe:
    """`Beit`: BEiT, BEiT v2; a bias table of each block or of all, which class tokens have entries in."""
    arguments, grid = _arguments(theirs), theirs.patch_embed.grid_size
    steps: list[Step] = [Rename("gamma_1", "ls1.gamma"), Rename("gamma_2", "ls2.gamma")]
    own = theirs.blocks[0].attn.relative_position_bias_table is not None
    if own and theirs.rel_pos_bias is not None:
        raise ConfigError("bias tables of each block beside one of all blocks are not covered")
    words = []
    if theirs.pos_embed is not None:
        words.append("learned")
    if own or theirs.rel_pos_bias is not None:
        words.append(f"relative(prefix=true, resize=geometric{'' if own else ', shared=true'})")
    if theirs.rel_pos_bias is not None:
        ours = "position.terms.1." if theirs.pos_embed is not None else "position."
        steps.append(BiasTable("rel_pos_bias.", ours, grid, True))
    elif own:
        steps.append(BiasTable("attn.", "attn.position.", grid, True))
    if theirs.pos_embed is not None:
        owner = "position.terms.0.pos_embed" if theirs.rel_pos_bias is not None else "position.pos_embed"
        steps.append(FlatTable(owner, grid, _tokens(theirs)))
    return Recipe(ViT, "+".join(words) or "none", arguments, tuple(steps), grid)


def relpos(theirs: Any) -> Recipe:
    """`VisionTransformerRelPos`: a table over offsets or a network of their logarithms, of each block or of all."""
    arguments, grid = _arguments(theirs), theirs.patch_embed.grid_size
    shared = theirs.shared_rel_pos is not None
    bias = theirs.shared_rel_pos if shared else theirs.blocks[0].attn.rel_pos
    source, target = ("shared_rel_pos", "position") if shared else ("attn.rel_pos", "attn.position")
    options = ["shared=true"] if shared else []
    if type(bias).__name__ == "RelPosBias":
        prefix = bias.prefix_tokens > 0
        options += ["resize=geometric", *(["prefix=true"] if prefix else [])]
        steps: tuple[Step, ...] = (BiasTable(f"{source}.", f"{target}.", grid, prefix),)
        return Recipe(ViT, f"relative({', '.join(options)})", arguments, steps, grid)
    if type(bias).__name__ != "RelPosMlp" or bias.mode not in ("swin", "cr"):
        raise ConfigError(f"a relative bias of another kind ({type(bias).__name__}) is not covered")
    if bias.mode == "swin" and tuple(bias.pretrained_window_size) not in ((0, 0), tuple(grid)):
        raise ConfigError("a bias network pretrained on another window is not covered")
    options += [f"hidden={bias.mlp.fc1.out_features}", f"form={bias.mode}"]
    steps = (Rename(f"{source}.mlp.fc1", f"{target}.cpb_mlp.0"), Rename(f"{source}.mlp.fc2", f"{target}.cpb_mlp.2"))
    return Recipe(ViT, f"logcpb({', '.join(options)})", arguments, steps, grid)


FAMILIES: dict[str, Callable[[Any], Recipe]] = {
    "VisionTransformer": vision_transformer,
    "VisionTransformerDistilled": distilled,
    "Eva": eva,
    "Beit": beit,
    "VisionTransformerRelPos": relpos,
}


def read(theirs: Any) -> Recipe:
    """The recipe of a timm model.

    Raises:
        ConfigError: for a family or a part that is not covered, by name.
    """
    family = type(theirs).__name__
    if family not in FAMILIES or not type(theirs).__module__.startswith("timm."):
        raise ConfigError(f"{family} is not covered; covered are timm's {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](theirs)
    except ConfigError as error:
        name = (getattr(theirs, "pretrained_cfg", None) or {}).get("architecture") or family
        raise ConfigError(f"{name}: {error}") from None


def _arguments(theirs: Any) -> dict[str, Any]:
    """Constructor arguments of a ViT of the same sizes and parts, for families that name their parts alike."""
    _refuse(theirs)
    block, dim = theirs.blocks[0], theirs.embed_dim
    attn, mlp, norm = block.attn, block.mlp, block.norm1
    hidden = (mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1).out_features
    found: dict[str, Any] = dict(
        img_size=tuple(theirs.patch_embed.img_size),
        patch_size=tuple(theirs.patch_embed.patch_size),
        in_chans=theirs.patch_embed.proj.in_channels,
        num_classes=theirs.num_classes,
        global_pool=theirs.global_pool,
        embed_dim=dim,
        depth=len(theirs.blocks),
        num_heads=attn.num_heads,
        class_token=theirs.cls_token is not None,
        reg_tokens=0 if getattr(theirs, "reg_token", None) is None else theirs.reg_token.shape[1],
        norm_layer=_NORMS[type(norm).__name__],
        norm_eps=norm.eps,
        embed_norm=not _is_identity(theirs.patch_embed, "norm"),
        pre_norm=not _is_identity(theirs, "norm_pre"),
        post_norm="Post" in type(block).__name__,
        final_norm=not (_is_identity(theirs, "norm") and _is_identity(theirs, "fc_norm")),
        fc_norm=not _is_identity(theirs, "fc_norm"),
        mlp_ratio=_ratio(hidden, dim),
        mlp_layer=_mlp(mlp),
        act_layer=_ACTS.get(_act(mlp), "gelu"),
        qkv_bias="qv" if _qv(attn) else attn.qkv.bias is not None,
        qk_norm=not _is_identity(attn, "q_norm"),
        proj_bias=attn.proj.bias is not None,
        scale_attn_norm=not _is_identity(attn, "norm"),
        scale_mlp_norm=not _is_identity(mlp, "norm"),
        init_values=1.0 if hasattr(getattr(block, "ls1", None), "gamma") or _gamma(block) else None,
        drop_rate=theirs.head_drop.p,
        pos_drop_rate=theirs.pos_drop.p if hasattr(theirs, "pos_drop") else 0.0,
        patch_drop_rate=getattr(getattr(theirs, "patch_drop", None), "prob", 0.0),
        attn_drop_rate=attn.attn_drop.p,
        proj_drop_rate=attn.proj_drop.p,
        drop_path_rate=getattr(theirs.blocks[-1].drop_path1, "drop_prob", 0.0) or 0.0,
        # Eva's pooling sees all tokens, ViT's only patches unless it says so.
        pool_include_prefix=getattr(theirs, "pool_include_prefix", theirs.global_pool == "map"),
    )
    if theirs.global_pool == "map":
        pool = theirs.attn_pool
        found |= dict(attn_pool_num_heads=pool.num_heads, attn_pool_mlp_ratio=_ratio(pool.mlp.fc1.out_features, dim))
    return found


_NORMS = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm"}
_ACTS = {"GELU": "gelu", "GELU tanh": "gelu_tanh", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


def _refuse(theirs: Any) -> None:
    """Refuse what a model of ours cannot be told to have."""
    block = theirs.blocks[0]
    kinds = {type(part).__name__ for part in theirs.blocks}
    if len(kinds) > 1 or not hasattr(block, "attn") or not hasattr(block, "mlp"):
        raise ConfigError(f"blocks of another kind ({', '.join(sorted(kinds))}), which are not covered")
    attn, mlp, embed = block.attn, block.mlp, theirs.patch_embed
    norms = [m for m in theirs.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm | RmsNorm)]
    strange = {
        "a patch embedding that is not one convolution": type(embed).__name__ != "PatchEmbed",
        "an image padded to the patch": getattr(embed, "dynamic_img_pad", False),
        f"blocks of another kind ({type(block).__name__})": type(block).__name__ not in _BLOCKS,
        f"attention of another kind ({type(attn).__name__})": type(attn).__name__ not in _ATTENTIONS,
        "fewer heads of keys than of queries": getattr(attn, "num_kv_groups", 1) != 1,
        "a gate on the output of attention": getattr(attn, "gate", None) is not None,
        "heads that do not make up the width": attn.proj.in_features != theirs.embed_dim,
        "a bias of q, k and v in maps of their own": getattr(attn, "k_proj", None) is not None
        and attn.k_proj.bias is not None,
        f"an MLP of another kind ({type(mlp).__name__})": _mlp(mlp) == "",
        f"an activation of another kind ({_act(mlp)})": _mlp(mlp) == "mlp" and _act(mlp) not in _ACTS,
        "biases in the attention but not in the MLP": (attn.proj.bias is None) != (mlp.fc2.bias is None),
        "LayerScale on attention alone": _gamma(block) and block.gamma_2 is None,
        "norms of several kinds": len({(type(m).__name__, m.eps) for m in norms}) != 1,
        "norms both before and after pooling": not (_is_identity(theirs, "norm") or _is_identity(theirs, "fc_norm")),
        f"a pooling of another kind ({theirs.global_pool})": theirs.global_pool not in ("token", "avg", "map", ""),
        "attention pooling of another kind": theirs.global_pool == "map"
        and not (type(theirs.attn_pool) is AttentionPoolLatent and theirs.attn_pool.mlp is not None),
        "a classifier of another kind": type(theirs.head) not in (nn.Linear, nn.Identity),
    }
    found = [what for what, there in strange.items() if there]
    if found:
        raise ConfigError(f"it has {'; '.join(found)}, which is not covered")


_BLOCKS = ("Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm", "RelPosBlock", "ResPostRelPosBlock")
_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention", "RelPosAttention")


def _tokens(theirs: Any) -> tuple[tuple[str, int], ...]:
    tokens = [("cls_token", theirs.cls_token), ("reg_token", getattr(theirs, "reg_token", None))]
    return tuple((name, token.shape[1]) for name, token in tokens if token is not None)


def _is_identity(owner: Any, name: str) -> bool:
    return isinstance(getattr(owner, name, nn.Identity()), nn.Identity)


def _gamma(block: Any) -> bool:
    return getattr(block, "gamma_1", None) is not None


def _qv(attn: Any) -> bool:
    if getattr(attn, "qkv", None) is not None:
        return getattr(attn, "q_bias", None) is not None
    return attn.q_proj.bias is not None


def _mlp(mlp: Any) -> str:
    if type(mlp) is Mlp:
        return "mlp"
    if type(mlp) is SwiGLU:
        return "swiglu"
    return "swiglu_packed" if type(mlp) is GluMlp and not mlp.gate_last and _act(mlp) == "SiLU" else ""


def _act(mlp: Any) -> str:
    act = mlp.act
    return type(act).__name__ + (" tanh" if getattr(act, "approximate", "none") == "tanh" else "")


def _ratio(hidden: int, dim: int) -> float:
    """A ratio of which int(dim * ratio) is exactly `hidden`."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim
