"""Patches in, tokens and their places out; the transformer block. The rest is `timm.layers`.

Legend: B batch, C channels, D width, N tokens, p patch side.
"""

from __future__ import annotations

from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from .attention import Attention
from .encodings.base import PositionEncoding
from .errors import ConfigError
from .positions import Positions
from .signal import Signal


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map; timm's names (`proj`).

    Args:
        patch: (rows, columns) of a patch in pixels.
        in_chans: C.
        dim: D.
    """

    def __init__(self, patch: tuple[int, int], in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch, stride=patch)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along each axis of an image.

        Raises:
            ConfigError: if the patch does not divide the image.
        """
        p_rows, p_cols = self.patch_size
        if height < p_rows or width < p_cols or height % p_rows or width % p_cols:
            near = f"{max(1, round(height / p_rows)) * p_rows}x{max(1, round(width / p_cols)) * p_cols}"
            raise ConfigError(
                f"the image must be a multiple of the patch {p_rows}x{p_cols}: got {height}x{width}; nearest: {near}"
            )
        return height // p_rows, width // p_cols

    def forward(self, images: Tensor) -> tuple[Tensor, Positions]:
        """(B, C, height, width) -> tokens (B, N, D) in the weights' dtype, and where they are."""
        extent = self.grid(images.shape[-2], images.shape[-1])
        tokens = self.proj(images).flatten(2).transpose(1, 2)
        # The residual stream keeps the precision of the weights under autocast, with any encoding.
        return tokens.to(self.proj.weight.dtype), Positions.grid(extent, images.device)


class Block(nn.Module):
    """Pre-norm transformer block under timm's names (`norm1`, `attn`, `ls1`, `norm2`, `mlp`, `ls2`).

    An encoding of the block's own lives in `attn.position`; its token term is added to the block's input, the rest
    joins the shared signal.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        position: PositionEncoding | None = None,
        init_values: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(
            dim,
            heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            position=position,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, signal: Signal, at: Positions, mask: Tensor | None = None) -> Tensor:
        if self.attn.position is not None:
            own = self.attn.position(at)
            x = add_token(x, own)
            signal = signal.plus(own)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), signal, mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def add_token(x: Tensor, signal: Signal) -> Tensor:
    """x + signal.token in x's dtype; x where there is none."""
    return x if signal.token is None else x + signal.token.to(x.dtype)
