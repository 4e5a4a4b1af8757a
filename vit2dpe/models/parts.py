"""What a transformer block is made of, by name: norms, activations, MLPs, LayerScale. `layers.py` runs it.

Legend: D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypedDict

import torch
from timm.layers import DropPath, Mlp, SwiGLU, SwiGLUPacked
from timm.layers import LayerScale as ScaleOnly
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from ..attention.modules import Attention
from ..encodings.base import PositionEncoding
from ..errors import ConfigError, unknown

NORMS: dict[str, Callable[..., nn.Module]] = {  # arXiv 1607.06450, 1910.07467; each by a short name too
    "layernorm": nn.LayerNorm,
    "rmsnorm": nn.RMSNorm,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
}
ACTS: dict[str, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
}
MLPS: dict[str, Callable[..., nn.Module]] = {  # the gated ones: arXiv 2002.05202
    "mlp": Mlp,
    "swiglu": SwiGLU,
    "swiglu_packed": SwiGLUPacked,
    "geglu": partial(SwiGLU, act_layer=nn.GELU),
    "geglu_tanh": partial(SwiGLU, act_layer=ACTS["gelu_tanh"]),
}


def norm_factory(name: str, eps: float) -> Callable[[int], nn.Module]:
    """Returns a factory `width -> norm layer`."""
    if name not in NORMS:
        raise unknown("norm_layer", name, NORMS)
    return partial(NORMS[name], eps=eps)


def mlp_factory(name: str, act: str = "gelu") -> Callable[..., nn.Module]:
    """Returns a factory `(width, hidden width, bias=, drop=) -> MLP`; the gated ones have their own activation.

    The name of an activation is the plain MLP with it.
    """
    if name in ACTS:
        name, act = "mlp", name
    if name not in MLPS:
        raise unknown("mlp_layer", name, [*MLPS, *ACTS])
    if act not in ACTS:
        raise unknown("act_layer", act, ACTS)
    return partial(Mlp, act_layer=ACTS[act]) if name == "mlp" else MLPS[name]


class LayerScale(ScaleOnly):  # type: ignore[misc]  # timm's types are not read, so its classes are Any
    """γ · x for a factor γ (D,) of each channel (arXiv 2103.17239), and y + γ · x in one operation.

    `add_branch` uses the sum where no path is dropped; a forward hook then receives the sum.
    """

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        out: Tensor = super().forward(x) if onto is None else torch.addcmul(onto, x, self.gamma)
        return out


class BlockArguments(TypedDict, total=False):
    """Arguments of `Block` that models pass through, under timm's names."""

    mlp_ratio: float
    mlp_layer: str
    act_layer: str
    qkv_bias: bool | str
    qk_norm: bool
    proj_bias: bool
    scale_attn_norm: bool
    scale_mlp_norm: bool
    init_values: float | None


class BlockParts(nn.Module):
    """The parts of a transformer block under timm's names (`norm1`, `attn`, `ls1`, `norm2`, `mlp`, `ls2`).

    An encoding of the block's own lives in `attn.position`. `Block` and its variants put the parts together.

    Args:
        dim, heads: width D and number of heads H.
        mlp_ratio: hidden width of the MLP over D.
        mlp_layer: "mlp" (fc1, act, fc2), "swiglu" (silu(fc1_g) · fc1_x, fc2) or "swiglu_packed" (one fc1 for both); or
            a factory, called as (D, hidden, bias=, drop=).
        act_layer: "gelu", "gelu_tanh" or "quick_gelu" (x σ(1.702 x)), of "mlp".
        norm_layer, norm_eps: "layernorm" or "rmsnorm", and its epsilon; or a factory
            `width -> norm layer`.
        qkv_bias, qk_norm, proj_bias, kv_heads, qk, scale: see `Attention`; `proj_bias` is the MLP's too.
        scale_attn_norm, scale_mlp_norm: a norm inside attention and MLP, before their last map (EVA-02, BEiT-3).
        position: an encoding of the block's own.
        init_values: initial value of LayerScale; None: no LayerScale.
        attn_drop, proj_drop, drop_path: rates in training.
    """

    attention: type[Attention] = Attention

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        mlp_layer: str | Callable[..., nn.Module] = "mlp",
        act_layer: str = "gelu",
        norm_layer: str | Callable[[int], nn.Module] = "layernorm",
        norm_eps: float = 1e-6,
        qkv_bias: bool | str = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        kv_heads: int | None = None,
        qk: str = "dot",
        scale: float | None = None,
        position: PositionEncoding | None = None,
        init_values: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        norm = norm_layer if callable(norm_layer) else norm_factory(norm_layer, norm_eps)
        self.norm1 = norm(dim)
        self.attn = self.attention(
            dim,
            heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            norm=norm,
            position=position,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            kv_heads=kv_heads,
            qk=qk,
            scale=scale,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm(dim)
        inner_norm = dict(norm_layer=norm) if scale_mlp_norm else {}
        if int(dim * mlp_ratio) < 1:
            raise ConfigError(f"mlp_ratio must leave hidden channels: got {mlp_ratio} of {dim}")
        make_mlp = mlp_layer if callable(mlp_layer) else mlp_factory(mlp_layer, act_layer)
        self.mlp = make_mlp(dim, int(dim * mlp_ratio), bias=proj_bias, drop=proj_drop, **inner_norm)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
