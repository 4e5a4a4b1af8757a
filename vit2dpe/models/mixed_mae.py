"""A masked autoencoder on images of different sizes: of each image its own share of its own patches is hidden.

Both halves run on one row of tokens (`mixed.laid_out`), a padded batch too. The loss is the mean over all hidden
patches of the batch, as of a batch of one size.

Legend: G images of one size, N patches, K kept, P leading tokens, (p, q) patch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..positions import Positions
from .layers import TokenFilter, keep_tokens
from .mixed import Packed, by_size, in_order, laid_out


class Halves(NamedTuple):
    """The parts of an `MAE` that are run here.

    Args:
        choose: images (G, C, H, W) and noise (G, N) or None -> indices that are kept (G, K), and the mask (G, N).
        encode: images and a filter of tokens -> the outputs of the encoder, of each image.
        fill: latent (G, P + K, D), indices, images -> tokens of the decoder (G, P + N, D), and where they are.
        decode: tokens of a row, and where they are -> predictions, of each token.
        target: images -> (G, N, p q C).
        prefix: P.
    """

    choose: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    encode: Callable[[Packed, TokenFilter], list[Tensor]]
    fill: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Positions]]
    decode: Callable[[Tensor, Positions], Tensor]
    target: Callable[[Tensor], Tensor]
    prefix: int


def of_sizes(
    parts: Halves, images: Packed, noise: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss, and of each image the prediction (N_i, p q C) and the mask (N_i,), see `MAE.forward`.

    Args:
        noise: of each image (N_i,).

    Raises:
        ConfigError: for noise of another number of images, or of patches of one.
    """
    if noise is not None and len(noise) != len(images.order):
        raise ConfigError(f"noise has one tensor for each of {len(images.order)} images, got {len(noise)}")
    of_images = None if noise is None else iter([noise[i] for i in images.order])
    chosen = []
    for one in images.images:
        given = None if of_images is None else [next(of_images) for _ in one]
        if given is not None and len(shapes := {tuple(x.shape) for x in given}) > 1:
            raise ConfigError(f"noise of images of one size has one value for each patch (N_i,), got {sorted(shapes)}")
        chosen.append(parts.choose(one, None if given is None else torch.stack(given)))
    keeps = iter([keep for keep, _ in chosen])  # the filter is called for each size in turn

    def kept(x: Tensor, at: Positions) -> tuple[Tensor, Positions]:
        return keep_tokens(x, at, next(keeps))

    latent = parts.encode(images, kept)
    filled, sizes = [], iter(images.order)
    for one, (keep, _) in zip(images.images, chosen, strict=True):
        own = torch.stack([latent[next(sizes)] for _ in one])
        filled.append(parts.fill(own, keep, one))
    row, at = laid_out(filled)
    predictions = [y[:, parts.prefix :] for y in by_size(parts.decode(row, at), at)]  # (G, N, p q C)
    total, count = row.new_zeros((), dtype=torch.float32), row.new_zeros((), dtype=torch.float32)
    for prediction, one, (_, mask) in zip(predictions, images.images, chosen, strict=True):
        error = (prediction.float() - parts.target(one)).square().mean(dim=-1)  # (G, N)
        total, count = total + (error * mask).sum(), count + mask.sum()
    masks = in_order([mask for _, mask in chosen], images.order)
    return total / count, in_order(predictions, images.order), masks
