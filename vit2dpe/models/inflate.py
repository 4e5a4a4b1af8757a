"""A model of videos made of a model of images: kernels are inflated, encodings read rows and columns as before.

    proj(v) = Σ_t K_t v_t,    K_t = K / T for all t ("mean"),    K for the middle frame and 0 for the others ("centre")

Sources: I3D, arXiv 1705.07750 (mean); ViViT, arXiv 2103.15691 ("central frame initialisation"); the learned part of
time that begins at zero is TimeSformer's, arXiv 2102.05095. How ours differs: every encoding goes over as it is, for it
goes on reading rows and columns alone (`axes=(1, 2)`), whatever it is, tables, rotations and biases alike.

What is exact: a video that stands still ("mean"), or of which only the middle frames of tubelets are looked at
("centre"), gives the logits of its image, if time adds nothing yet and

- there is one tubelet along time, or
- the model has no leading tokens (`class_token=False`, no registers). With t tubelets every patch is there t times,
  which a mean over patches does not notice; a class token is there once, and has 1/t of its weight among the keys.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from ..encodings import (
    IRPE,
    Cycle,
    Decomposed,
    Dims,
    Factorized,
    LearnedTable,
    PositionEncoding,
    RelativeBias,
    Shaw,
    T5Bias,
    WindowedTable,
    named_encodings,
    parse_blocks,
    split_shared_and_per_block,
)
from ..encodings.along import Along, read_axes
from ..errors import ConfigError, unknown
from ..resolution.policies import LogTemperature, YaRNTemperature
from ..spec import Term
from .kernels import CONVS, Conv
from .layers import Block
from .vit import ViT

KERNELS = ("mean", "centre")
TABLES = (  # 0 of them is no effect, and learns
    *(LearnedTable, WindowedTable, Factorized, RelativeBias, T5Bias),
    *(Decomposed, Shaw, IRPE),
)


@torch.no_grad()
def inflate(
    model: ViT, *, frames: int = 8, tubelet: int = 2, kernel: str = "mean", time: str | None = "learned"
) -> ViT:
    """A copy of a ViT that takes videos (B, C, T, H, W).

    Args:
        model: of images. It is not altered.
        frames: of the training size, a multiple of `tubelet`; other numbers run too.
        tubelet: frames of a patch.
        kernel: "mean" or "centre"; see above.
        time: an encoding of time beside those that the model has, a word such as "learned", "rope", "t5" or
            "learned(axes=(0, 1, 2))" for one of all places; None: frames have no order. Tables begin at zero; rotations
            begin at the identity, at the first tubelet; other formulas (`alibi`, `fire`, ...) act from the start.

    Raises:
        ConfigError: for a model that is no ViT of images, or has windows or patches that overlap, frames that tubelets
            do not fill, a `time` of several words or no word, and one beside words by block.
    """
    if not isinstance(model, ViT) or len(model.train_grid) != 2:
        raise ConfigError(f"inflate makes a video model of a ViT of images, got a {type(model).__name__}")
    if model.windowing is not None:
        raise ConfigError("inflate takes a model without windows: a window of a video has frames too, build it anew")
    if model.patch_embed.stride is not None:
        raise ConfigError("inflate takes a model of patches that do not overlap: build it without patch_stride first")
    if kernel not in KERNELS:
        raise unknown("kernel of inflate", kernel, KERNELS)
    if tubelet < 1 or frames < tubelet or frames % tubelet:
        raise ConfigError(f"frames must be a multiple of tubelet, got {frames} and {tubelet}")
    if time is not None and isinstance(model.position, Cycle):
        raise ConfigError("blocks of this model follow different words: inflate it with time=None")
    video = copy.deepcopy(model)
    embed, image = video.patch_embed, model.patch_embed
    embed.patch_size, embed.img_size = (tubelet, *image.patch_size), (frames, *image.img_size)
    embed.proj = inflated(image.proj, tubelet, kernel)
    video.train_grid = embed.grid_size
    for encoding in named_encodings(video).values():
        before = (0, 1) if encoding.along is None else encoding.along.axes
        encoding.along = Along(tuple(axis + 1 for axis in before))
        if isinstance(factor := encoding.own_temperature, LogTemperature | YaRNTemperature):
            encoding.own_temperature = replace(factor, train=video.train_grid)
    if time is not None:
        _add(video, time)
    return video


def inflated(conv: Conv, tubelet: int, kernel: str) -> Conv:
    """The convolution of tubelets of one of patches."""
    weight, bias = conv.weight, conv.bias
    made = CONVS[3](
        weight.shape[1],
        weight.shape[0],
        kernel_size=(tubelet, *weight.shape[2:]),
        stride=(tubelet, *weight.shape[2:]),
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    new = torch.zeros_like(made.weight)
    if kernel == "mean":
        new += weight[:, :, None] / tubelet
    else:
        new[:, :, tubelet // 2] = weight
    made.weight.copy_(new)
    made.weight.requires_grad_(weight.requires_grad)
    if bias is not None and made.bias is not None:
        made.bias.copy_(bias)
        made.bias.requires_grad_(bias.requires_grad)
    return made.train(conv.training)


def word_of_video(position: str, time: str | None = "learned") -> str:
    """The word of an inflated model, of that of the image model: with it `ViT(...)` is built to load its weights.

    "learned+rope" becomes "learned(axes=(1, 2))+rope(axes=(1, 2))+learned(axes=0)".
    """
    words = []
    for word in parse_blocks(position):
        shifted = [_shifted(term) for term in word if term.name != "none"]
        words.append("+".join(map(str, [*shifted, *([] if time is None else _of_time(time))])) or "none")
    return "/".join(words)


def _shifted(term: Term) -> Term:
    before = read_axes(term.options.get("axes", (0, 1)), axes=2)
    return Term(term.name, {**term.options, "axes": tuple(axis + 1 for axis in before.axes)})


def _of_time(time: str) -> list[Term]:
    """The terms of a word, those that name no axes of time alone."""
    words = parse_blocks(time) if isinstance(time, str) else []
    if len(words) != 1:
        raise ConfigError(f"time is one word for all blocks, such as 'learned' or 'rope', or None; got {time!r}")
    return [Term(name, {"axes": 0, **options}) for name, options in words[0]]


def _add(video: ViT, time: str) -> None:
    word = "+".join(map(str, _of_time(time)))
    like = video.patch_embed.proj.weight
    dims = Dims(video.embed_dim, video.num_heads, video.train_grid, depth=len(video.blocks))
    shared, own = split_shared_and_per_block(word, dims)
    for part in [shared, *own]:
        for encoding in [] if part is None else part.modules():
            if isinstance(encoding, TABLES):
                for parameter in encoding.parameters(recurse=True):
                    parameter.zero_()
    if shared.gives:
        video.position = _sum(video.position, shared).to(like.device, like.dtype).train(video.training)
    for block, mine in zip(video.blocks, own, strict=True):
        if mine is not None and isinstance(block, Block):
            block.attn.position = _sum(block.attn.position, mine).to(like.device, like.dtype).train(video.training)


def _sum(old: nn.Module | None, new: PositionEncoding) -> PositionEncoding:
    if not isinstance(old, PositionEncoding):
        return new
    made = old + new if old.gives else new
    made.own_temperature, old.own_temperature = old.own_temperature, None  # it is of what leads
    return made
