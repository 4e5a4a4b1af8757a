"""The constructor arguments of our ViT for a timm ViT: sizes, norms, MLP, attention; what ours lacks is refused.

Serves all families of `read.py`, which name their parts alike.
"""

from __future__ import annotations

from typing import TypeAlias

from timm.layers import Attention, AttentionPoolLatent, GluMlp, Mlp, RmsNorm, SwiGLU
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from ...errors import ConfigError
from ...models.spec import Arguments
from ...models.timm_api import POOLS

TheirViT: TypeAlias = VisionTransformer | Eva | Beit | VisionTransformerRelPos


def arguments_of(theirs: TheirViT) -> Arguments:
    """Constructor arguments of a ViT of the same sizes and parts, beside the position.

    Raises:
        ConfigError: for a part that is not covered, by name.
    """
    embed = theirs.patch_embed
    parts = parts_of(theirs, type(embed).__name__ == "PatchEmbed")
    padded: bool = getattr(embed, "dynamic_img_pad", False)
    # timm's tables are those of the whole patches of its size, in a model that pads too.
    whole = tuple(n * p for n, p in zip(embed.grid_size, embed.patch_size, strict=True))
    return parts | dict(
        img_size=whole if padded else tuple(embed.img_size),
        patch_size=tuple(embed.patch_size),
        in_chans=embed.proj.in_channels,
        dynamic_img_pad=padded,
        class_token=theirs.cls_token is not None,
        reg_tokens=0 if getattr(theirs, "reg_token", None) is None else theirs.reg_token.shape[1],
        embed_norm=not _is_identity(embed, "norm"),
        pos_drop_rate=theirs.pos_drop.p if hasattr(theirs, "pos_drop") else 0.0,
    )


def parts_of(theirs: TheirViT | NaFlexVit, embeds: bool = True) -> Arguments:
    """Those of all but the embedding of patches, leading tokens and places.

    Args:
        embeds: whether its embedding of patches is one that ours can have.

    Raises:
        ConfigError: for a part that is not covered, by name.
    """
    _refuse(theirs, embeds)
    block, dim = theirs.blocks[0], theirs.embed_dim
    attn, mlp, norm = block.attn, block.mlp, block.norm1
    hidden = (mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1).out_features
    arguments: Arguments = dict(
        num_classes=theirs.num_classes,
        global_pool=theirs.global_pool,
        embed_dim=dim,
        depth=len(theirs.blocks),
        num_heads=attn.num_heads,
        norm_layer=_NORMS[type(norm).__name__],
        norm_eps=norm.eps,
        pre_norm=not _is_identity(theirs, "norm_pre"),
        post_norm="Post" in type(block).__name__,
        final_norm=not (_is_identity(theirs, "norm") and _is_identity(theirs, "fc_norm")),
        fc_norm=not _is_identity(theirs, "fc_norm"),
        mlp_ratio=exact_ratio(hidden, dim),
        mlp_layer=_mlp(mlp),
        act_layer=_ACTS.get(_act(mlp), "gelu"),
        qkv_bias="qv" if _qv(attn) else attn.qkv.bias is not None,
        qk_norm=not _is_identity(attn, "q_norm"),
        proj_bias=attn.proj.bias is not None,
        scale_attn_norm=not _is_identity(attn, "norm"),
        scale_mlp_norm=not _is_identity(mlp, "norm"),
        init_values=1.0 if hasattr(getattr(block, "ls1", None), "gamma") or _gamma(block) else None,
        drop_rate=theirs.head_drop.p,
        patch_drop_rate=getattr(getattr(theirs, "patch_drop", None), "prob", 0.0),
        attn_drop_rate=attn.attn_drop.p,
        proj_drop_rate=attn.proj_drop.p,
        drop_path_rate=getattr(theirs.blocks[-1].drop_path1, "drop_prob", 0.0) or 0.0,
        # Eva pools over all tokens, ViT over patches by default.
        pool_include_prefix=getattr(theirs, "pool_include_prefix", theirs.global_pool == "map"),
    )
    if theirs.global_pool == "map":
        pool = theirs.attn_pool
        arguments |= dict(
            attn_pool_num_heads=pool.num_heads, attn_pool_mlp_ratio=exact_ratio(pool.mlp.fc1.out_features, dim)
        )
    return arguments


_NORMS = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm"}
_ACTS = {"GELU": "gelu", "GELU tanh": "gelu_tanh", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu"}


def _refuse(theirs: TheirViT | NaFlexVit, embeds: bool) -> None:
    """Refuse parts that a model of ours cannot have: those of another kind first, then what is inside the others."""
    block = theirs.blocks[0]
    kinds = {type(part).__name__ for part in theirs.blocks}
    if len(kinds) > 1 or not hasattr(block, "attn") or not hasattr(block, "mlp"):
        raise ConfigError(f"blocks of another kind ({', '.join(sorted(kinds))}), which are not covered")
    attn, mlp = block.attn, block.mlp
    _raise(
        {
            "a patch embedding that is not one convolution": not embeds,
            f"blocks of another kind ({type(block).__name__})": type(block).__name__ not in _BLOCKS,
            f"attention of another kind ({type(attn).__name__})": type(attn).__name__ not in _ATTENTIONS,
            f"an MLP of another kind ({type(mlp).__name__})": _mlp(mlp) == "",
        }
    )
    norms = [m for m in theirs.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm | RmsNorm)]
    _raise(
        {
            "fewer heads of keys than of queries": getattr(attn, "num_kv_groups", 1) != 1,
            "a gate on the output of attention": getattr(attn, "gate", None) is not None,
            "heads that do not make up the width": attn.proj.in_features != theirs.embed_dim,
            "a bias of q, k and v in maps of their own": getattr(attn, "k_proj", None) is not None
            and attn.k_proj.bias is not None,
            f"an activation of another kind ({_act(mlp)})": _mlp(mlp) == "mlp" and _act(mlp) not in _ACTS,
            "biases in the attention but not in the MLP": (attn.proj.bias is None) != (mlp.fc2.bias is None),
            "LayerScale on attention alone": _gamma(block) and block.gamma_2 is None,
            "norms of several kinds": len({(type(m).__name__, m.eps) for m in norms}) != 1,
            "norms both before and after pooling": not (
                _is_identity(theirs, "norm") or _is_identity(theirs, "fc_norm")
            ),
            f"a pooling of another kind ({theirs.global_pool})": theirs.global_pool not in POOLS,
            "attention pooling of another kind": theirs.global_pool == "map"
            and not (type(theirs.attn_pool) is AttentionPoolLatent and theirs.attn_pool.mlp is not None),
            "a classifier of another kind": type(theirs.head) not in (nn.Linear, nn.Identity),
        }
    )


def _raise(refused: dict[str, bool]) -> None:
    reasons = [part for part, present in refused.items() if present]
    if reasons:
        raise ConfigError(f"it has {'; '.join(reasons)}, which is not covered")


_BLOCKS = ("Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm", "RelPosBlock", "ResPostRelPosBlock")
_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention", "RelPosAttention")


def tokens_of(theirs: TheirViT) -> tuple[tuple[str, int], ...]:
    """Its leading tokens, in order, each with how many there are."""
    tokens = [("cls_token", theirs.cls_token), ("reg_token", getattr(theirs, "reg_token", None))]
    return tuple((name, token.shape[1]) for name, token in tokens if token is not None)


def _is_identity(owner: nn.Module, name: str) -> bool:
    return isinstance(getattr(owner, name, nn.Identity()), nn.Identity)


def _gamma(block: EvaBlock) -> bool:
    return getattr(block, "gamma_1", None) is not None


def _qv(attn: Attention) -> bool:
    if getattr(attn, "qkv", None) is not None:
        return getattr(attn, "q_bias", None) is not None
    return attn.q_proj.bias is not None


def _mlp(mlp: Mlp | SwiGLU | GluMlp) -> str:
    if type(mlp) is Mlp:
        return "mlp"
    if type(mlp) is SwiGLU:
        return "swiglu"
    return "swiglu_packed" if type(mlp) is GluMlp and not mlp.gate_last and _act(mlp) == "SiLU" else ""


def _act(mlp: Mlp | SwiGLU | GluMlp) -> str:
    act = mlp.act
    return type(act).__name__ + (" tanh" if getattr(act, "approximate", "none") == "tanh" else "")


def exact_ratio(hidden: int, dim: int) -> float:
    """A ratio of which int(dim * ratio) is exactly `hidden`."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim
