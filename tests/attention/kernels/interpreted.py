"""Run with TRITON_INTERPRET=1: the kernels of `rotary_triton` on the CPU, beside the plain path.

Prints a line of JSON for each case: its name, and for q, k, v and the gradients the largest difference, in units of
the last place.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor
from torch.library import Library

from vit2dpe import Dims, Positions, Rotation, Signal, build
from vit2dpe.attention.functional import rotate, split_heads
from vit2dpe.attention.kernels import rotary, rotary_triton
from vit2dpe.attention.kernels.rotary import angle_gradient
from vit2dpe.encodings.base import interleave

B, H, PREFIX = 3, 2, 1
AT = Positions.grid((2, 5)).with_prefix(PREFIX)
SUBSET = AT.take(torch.tensor([7, 0, 3]))
SUBSETS = AT.take(torch.tensor([[7, 0, 3], [1, 2, 9], [4, 5, 6]]))


def drawn(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Rotation:
    angle = torch.randn(batch, heads, tokens, width // 2, dtype=torch.float64)
    return interleave(angle.cos().to(dtype), angle.sin().to(dtype))


def placed(word: str, at: Positions, width: int = 8) -> Rotation:
    with torch.no_grad():
        rotation = build(word, Dims(H * width, H, (2, 5)))(at).q_rotation
    assert rotation is not None
    return rotation


def cases() -> dict[str, tuple[Rotation, int]]:
    """{name: (rotation, head width)}"""
    return {
        "shared": (drawn(1, 1, 11, 8), 8),
        "heads": (drawn(1, H, 11, 8), 8),
        "samples": (drawn(B, 1, 11, 8), 8),
        "both": (drawn(B, H, 11, 8), 8),
        "narrow": (drawn(1, H, 5, 2), 2),
        "odd pairs": (drawn(1, H, 35, 18), 18),
        "several tiles": (drawn(1, 1, 35, 128), 128),
        "not interleaved": (Rotation(*(x.contiguous() for x in drawn(1, H, 7, 12))), 12),
        "prefix": (placed("rope", AT), 8),
        "subset": (placed("rope_mixed", SUBSET), 8),
        "subset of each": (placed("rope_mixed", SUBSETS), 8),
        "many images": (drawn(1, 1, 5, 4), 4),
        "no images": (drawn(1, 1, 5, 4), 4),
    }


def results(path: str, qkv: Tensor, own: Rotation, learned: bool) -> list[Tensor]:
    """q, k, v, the gradient to qkv and, where it is learned, the one to the angle."""
    source = qkv.clone().requires_grad_()
    angle = Rotation(*(x.detach().requires_grad_(learned) for x in own))
    if path == "triton":
        q, k, v = rotary.split_and_rotate(source * 1, angle, H, path)
    else:
        q, k, v, _ = split_heads(source * 1, Signal(), H)
        q, k = rotate(q, angle), rotate(k, angle)
    given = torch.randn(3, *q.mT.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype).mT  # of another layout
    torch.autograd.backward([q, k, v], list(given))
    found = [q.detach(), k.detach(), v.detach(), source.grad]
    if learned:
        along = -own.sin * angle.cos.grad + own.cos * angle.sin.grad  # what an angle behind them receives
        # In half precision it is taken from what was rounded, which the plain path has not kept.
        half = path == "triton" and q.dtype.itemsize == 2
        rounded = angle_gradient(given[0], given[1], found[0], found[1], own.cos) if half else None
        found += [along] if rounded is None else [along, rounded]
    return found


def ulps(found: Tensor, expected: Tensor, of_all: bool = False) -> float:
    """The largest difference, in units of the last place of the largest number of its row, or of all."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not found.numel():
        return 0.0
    size = expected.double().abs().clamp(min=1e-30)
    largest = size.max() if of_all else size.amax(-1, keepdim=True)
    unit = torch.finfo(found.dtype).eps * 2.0 ** largest.log2().floor()
    return float(((found.double() - expected.double()).abs() / unit).max())


def compare(name: str, own: Rotation, width: int, dtype: torch.dtype, learned: bool) -> None:
    if dtype == torch.float64:
        angle = torch.atan2(own.sin.double(), own.cos.double())
        own = interleave(angle.cos(), angle.sin())
    images = {"many images": 20, "no images": 0}.get(name, B)
    rotary_triton.PROGRAMS = 512 if name == "many images" else 4  # else several images share a program
    qkv = torch.randn(images, own.cos.shape[-2], 3 * H * width).to(dtype)
    found, expected = (results(path, qkv, own, learned) for path in ("triton", "plain"))
    if len(found) > len(expected):
        expected[-1] = found.pop()
    names = ("q", "k", "v", "qkv", "angle")[: len(found)]
    parts = {part: ulps(*pair, of_all=part == "angle") for part, *pair in zip(names, found, expected, strict=True)}
    print(json.dumps({"case": name, "dtype": str(dtype)[6:], "learned": learned, "ulps": parts}), flush=True)


def main() -> None:
    library = Library("vit2dpe", "IMPL")
    for name, launch in (
        ("rotate_packed_", rotary_triton.rotate_packed),
        ("rotate_packed_backward", rotary_triton.packed_gradient),
        ("rotate_packed_backward_learned", rotary_triton.learned_gradient),
    ):
        library.impl(name, launch, "CPU", allow_override=True)
    torch.manual_seed(0)
    for name, (own, width) in cases().items():
        for dtype in (torch.float32, torch.bfloat16):
            compare(name, own, width, dtype, True)
        if name in ("both", "odd pairs"):
            compare(name, own, width, torch.float16, True)
            compare(name, own, width, torch.float64, True)
        if name in ("shared", "several tiles"):
            compare(name, own, width, torch.float32, False)


if __name__ == "__main__":
    main()
