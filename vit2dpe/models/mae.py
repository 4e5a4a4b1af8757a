"""Masked autoencoder: an encoder of one patch in four, a small decoder that reconstructs the others, any encoding.

    keep, removed = a random split of the N patches, each sample its own
    latent        = encoder(patches at keep, at their true places)
    tokens        = W latent at keep, the mask token elsewhere
    prediction    = decoder(tokens, on the whole grid)                      (B, N, p q C)
    loss          = mean over removed patches of mean over pixels of (prediction - target)²

Source: He et al., arXiv 2111.06377. `norm_pix` makes the target (patch - mean) / sqrt(var + 1e-6), var unbiased. With
`tube` one place is hidden in all frames of a video (VideoMAE, arXiv 2203.12602). The
decoder's parameters carry the names of the original (`decoder_embed`, `mask_token`, `decoder_blocks`, `decoder_norm`,
`decoder_pred`), the encoder is a `ViT` under `encoder`.

How ours differs: masking is `Positions.take`, so every encoding serves in both halves, those that rotate or bias the
logits and those a block owns included; any height, width, patch and number of channels; the number of kept patches is
the floor of N (1 - ratio) as written, where the original floors a float (at 20 patches and 0.9 it keeps 1, we keep 2).

Legend: B batch, C channels, N patches, K kept, P prefix tokens, D widths, (p, q) patch rows and columns; of a video
(B, C, T, H, W) the frames of a patch stand before them, and time before rows wherever places are in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import overload

import torch
from einops import rearrange
from torch import Tensor, nn

from ..encodings import Dims, Position, PositionEncoding, modules_outside_encodings, split_shared_and_per_block
from ..encodings.along import extent_of
from ..errors import ConfigError
from ..positions import Positions
from .arguments import check_arguments
from .layers import Block, TokenFilter, block_inputs, keep_tokens, run_block
from .mae_names import State
from .mae_weights import from_original
from .masked import MaskedModel, keep_count
from .mixed import Images, Mixed, Packed, read, whole
from .mixed_mae import Halves, of_sizes
from .unwrap import Rest
from .vit import Spacing, ViT
from .weights import resize_tables

__all__ = ["MAE", "keep_count"]


class MAE(MaskedModel):
    """Masked autoencoder around a `ViT`.

    Args:
        encoder: a ViT without classifier (num_classes=0) whose `norm` comes before pooling. It is not altered.
        decoder_position: the decoder's encoding, a spec or an instance; the original's is "sincos", MAE's layout.
        decoder_block_position: a further encoding that every block of the decoder owns.
        decoder_embed_dim, decoder_depth, decoder_num_heads, decoder_mlp_ratio: sizes of the decoder.
        norm_pix: predict each patch normalised by its own mean and variance.
        tube: hide the same places in all frames of a video, so that none is seen a frame earlier.

    Raises:
        ConfigError: for an encoder with parts that masking leaves without use or gradient, or sizes that do not fit.
    """

    encoder: ViT

    def __init__(
        self,
        encoder: ViT,
        *,
        decoder_position: Position = "sincos",
        decoder_block_position: Position | None = None,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder_mlp_ratio: float = 4.0,
        norm_pix: bool = False,
        tube: bool = False,
    ) -> None:
        check_arguments(locals())
        super().__init__()
        _refuse(encoder, norm_pix)
        if tube and len(encoder.train_grid) != 3:
            raise ConfigError(f"tubes are of videos, three axes, and this encoder has {len(encoder.train_grid)}")
        if decoder_embed_dim % decoder_num_heads:
            came = f"{decoder_embed_dim} and {decoder_num_heads}"
            raise ConfigError(f"decoder_embed_dim must be a multiple of decoder_num_heads: got {came}")
        self.encoder, self.norm_pix, self.tube = encoder, norm_pix, tube
        self.grad_checkpointing = False
        like = encoder.patch_embed.proj.weight
        dims = Dims(decoder_embed_dim, decoder_num_heads, encoder.train_grid, depth=decoder_depth)
        pixels = math.prod(encoder.patch_embed.patch_size) * encoder.in_chans
        with torch.device(like.device):
            self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
            self.decoder_position, own = split_shared_and_per_block(decoder_position, dims, decoder_block_position)
            self.decoder_blocks = nn.ModuleList(
                Block(decoder_embed_dim, decoder_num_heads, mlp_ratio=decoder_mlp_ratio, position=position)
                for position in own
            )
            self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
            self.decoder_pred = nn.Linear(decoder_embed_dim, pixels)
        self.init_weights(encoder=False)
        self.to(dtype=like.dtype)
        nn.Module.register_load_state_dict_pre_hook(self, convert_state_dict)

    def train_extent(self, encoding: PositionEncoding) -> tuple[int, ...]:
        """The grid that a table of either half is learned on: the whole one."""
        return extent_of(encoding, self.train_grid)

    def position_groups(self) -> list[tuple[PositionEncoding, nn.Module, tuple[int, ...]]]:
        """For each half: the encoding that leads it, where its encodings are, the grid they were trained on."""
        decoder = nn.ModuleList([self.decoder_position, self.decoder_blocks])
        return [
            (self.encoder.position, self.encoder, self.train_grid),
            (self.decoder_position, decoder, self.train_grid),
        ]

    @overload
    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        spacing: Spacing = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        images: Mixed,
        mask_ratio: float = 0.75,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        spacing: Spacing = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]: ...
    def forward(
        self,
        images: Images,
        mask_ratio: float = 0.75,
        noise: Tensor | Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        spacing: Spacing = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, list[Tensor], list[Tensor]]:
        """The loss of predicting hidden patches.

        Args:
            images: (B, C, H, W), or (B, C, T, H, W), sides multiples of the patch; or of different sizes, see
                `mixed.py`: noise, prediction and mask are then lists, of each (N_i,), (N_i, p q C) and (N_i,).
            mask_ratio: the part that is hidden, above 0 and below 1; at least one patch is kept and one hidden.
            noise: (B, N), the patches with the smallest values are kept; default: uniform, from `generator`. Of tubes
                (B, rows x columns).
            generator: on any device, so that one on the CPU gives the same masks everywhere.
            spacing: as in `ViT`, for both halves.

        Returns:
            loss: a float32 scalar, over the hidden patches.
            prediction: (B, N, p q C), of every patch; normalised with `norm_pix`.
            mask: (B, N), 0 kept, 1 hidden.
        """
        if not isinstance(images, Tensor):
            batch = whole(read(images, self.encoder.patch_embed), self.encoder.patch_embed.patch_size)
            own = None if noise is None else [*noise]
            return of_sizes(self._halves(mask_ratio, generator, spacing), batch, own)
        if not isinstance(noise, Tensor | None):
            raise ConfigError(f"noise of images of one size is one tensor (B, N), got {type(noise).__name__}")
        keep, mask = self.choose(images, mask_ratio, noise, generator)
        kept = partial(keep_tokens, index=keep)
        latent = self.encoder.forward_features(images, token_filter=kept, spacing=spacing)
        prediction = self.decode(latent, keep, images, spacing)
        loss = (prediction.float() - self.target(images)).square().mean(dim=-1)  # (B, N)
        return (loss * mask).sum() / mask.sum(), prediction, mask

    def mask_grid(self, *size: int) -> tuple[int, ...]:
        """Patches along the axes of an image; tubes of a video along rows and columns."""
        return self.encoder.patch_embed.grid(*size)[self.tube :]

    def choose(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        keep, mask = super().choose(images, mask_ratio, noise, generator)
        if not self.tube:
            return keep, mask
        frames = self.encoder.patch_embed.grid(*images.shape[2:])[0]
        first = torch.arange(frames, device=keep.device)[:, None] * mask.shape[1]  # (t, 1)
        return (keep[:, None] + first).flatten(1), mask.repeat(1, frames)

    def decode(self, latent: Tensor, keep: Tensor, images: Tensor, spacing: Spacing = None) -> Tensor:
        """Encoder outputs (B, P + K, D) of the patches at `keep` -> prediction (B, N, p q C) of all of `images`."""
        tokens = self._decoded(*self._filled(latent, keep, images, spacing))  # (B, P + N, p q C)
        return tokens[:, self.encoder.num_prefix_tokens :]

    def _filled(self, latent: Tensor, keep: Tensor, images: Tensor, spacing: Spacing) -> tuple[Tensor, Positions]:
        """Tokens of the decoder (B, P + N, D), the mask token where nothing was kept, and where they are."""
        prefix, extent = self.encoder.num_prefix_tokens, self.encoder.patch_embed.grid(*images.shape[2:])
        x = self.decoder_embed(latent).to(self.mask_token.dtype)  # (B, P + K, D)
        tokens = self.mask_token.expand(x.shape[0], math.prod(extent), -1)  # (B, N, D)
        tokens = tokens.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), x[:, prefix:])
        at = Positions.grid(extent, images.device, spacing=spacing).with_prefix(prefix)
        return torch.cat([x[:, :prefix], tokens], dim=1), at

    def _decoded(self, x: Tensor, at: Positions) -> Tensor:
        """Tokens (B, P + N, D), or a row of those of several sizes -> (B, P + N, p q C)."""
        x, signal = block_inputs(x, self.decoder_position(at))
        mask = () if at.row is None else (at.row.segments,)
        for i, block in enumerate(self.decoder_blocks):
            x = run_block(block, x, signal, at, *mask, index=i, recompute=self.grad_checkpointing)
        pixels: Tensor = self.decoder_pred(self.decoder_norm(x))
        return pixels

    def _halves(self, ratio: float, generator: torch.Generator | None, spacing: Spacing) -> Halves:
        """What `of_sizes` runs."""

        def encode(images: Packed, kept: TokenFilter) -> list[Tensor]:
            latent = self.encoder.forward_features(images, token_filter=kept, spacing=spacing)
            return latent if isinstance(latent, list) else [*latent]

        return Halves(
            choose=lambda images, noise: self.choose(images, ratio, noise, generator),
            encode=encode,
            fill=partial(self._filled, spacing=spacing),
            decode=self._decoded,
            target=self.target,
            prefix=self.encoder.num_prefix_tokens,
        )

    def target(self, images: Tensor) -> Tensor:
        """(B, N, p q C) float32 pixels that the prediction is compared with."""
        pixels = self.patchify(images.float())
        if self.norm_pix:
            mean, std = _statistics(pixels)
            pixels = (pixels - mean) / std
        return pixels

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, p q C), channels fastest."""
        image, patches, sides = _pattern(self.encoder.patch_embed.patch_size)
        return rearrange(images, f"{image} -> {patches}", **sides)

    def unpatchify(self, pixels: Tensor, *size: int) -> Tensor:
        """(B, N, p q C) -> (B, C, height, width)."""
        image, patches, sides = _pattern(self.encoder.patch_embed.patch_size)
        grid = {f"n{axis}": n for axis, n in enumerate(self.encoder.patch_embed.grid(*size))}
        return rearrange(pixels, f"{patches} -> {image}", **grid, **sides)

    def picture(self, prediction: Tensor, mask: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        size = images.shape[2:]
        if self.norm_pix:
            mean, std = _statistics(self.patchify(images.float()))
            prediction = prediction * std + mean
        hidden = mask.bool().unflatten(1, self.encoder.patch_embed.grid(*size))[:, None]  # (B, 1, *grid)
        for axis, side in enumerate(self.encoder.patch_embed.patch_size, start=2):
            hidden = hidden.repeat_interleave(side, axis)
        return self.unpatchify(prediction, *size), hidden

    def init_weights(self, encoder: bool = True) -> None:
        """Draw as the original does: Xavier for linear maps and patches, zero biases, tokens from N(0, 0.02²).

        Encodings keep their initialisation. `encoder=False` draws the decoder alone.
        """
        for name, module in modules_outside_encodings(self):
            if isinstance(module, nn.Linear) and (encoder or not name.startswith("encoder.")):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)
        if encoder:
            nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.view(self.encoder.embed_dim, -1))
            for token in (self.encoder.cls_token, self.encoder.reg_token):
                if token is not None:
                    nn.init.normal_(token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        super().set_grad_checkpointing(enable)


def convert_state_dict(module: MAE, state_dict: State, prefix: str, *_: Rest) -> None:
    """Load pre-hook of MAE, in place: other people's files and names, and tables of another grid."""
    from_original(state_dict, prefix, module.decoder_position, module.train_grid)
    resize_tables(module, module.train_extent, state_dict, prefix)


def _pattern(patch: tuple[int, ...]) -> tuple[str, str, dict[str, int]]:
    """einops' patterns of images and of their patches, (n0 p0) pixels along the first axis, and the sides p0, ..."""
    axes = range(len(patch))
    n, p = (" ".join(f"{letter}{axis}" for axis in axes) for letter in "np")
    image = "b c " + " ".join(f"(n{axis} p{axis})" for axis in axes)
    return image, f"b ({n}) ({p} c)", {f"p{axis}": side for axis, side in enumerate(patch)}


def _statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + 1e-6) of each patch, (B, N, 1)."""
    return pixels.mean(dim=-1, keepdim=True), (pixels.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def _refuse(encoder: ViT, norm_pix: bool) -> None:
    if not isinstance(encoder, ViT):
        raise ConfigError(
            f"MAE needs an encoder that can leave patches out, a vit2dpe.ViT, got {type(encoder).__name__}; windows "
            "cannot: use SimMIM for Swin, from_timm for a timm model"
        )
    refused = {
        "a classifier gets no gradient (build it with num_classes=0)": encoder.num_classes > 0,
        "attention pooling gets no gradient (global_pool='map')": encoder.attn_pool is not None,
        "the decoder reads normalised tokens (build it with fc_norm=False)": isinstance(encoder.norm, nn.Identity),
        "masking already leaves patches out (patch_drop_rate must be 0)": encoder.patch_drop.rate > 0,
        "filled pixels would count in the loss (dynamic_img_pad must be off)": encoder.patch_embed.pad,
        "norm_pix needs more than one value in a patch": norm_pix
        and math.prod(encoder.patch_embed.patch_size) * encoder.in_chans < 2,
    }
    reasons = [reason for reason, applies in refused.items() if applies]
    if reasons:
        raise ConfigError(f"this encoder cannot be pretrained by MAE: {'; '.join(reasons)}")
