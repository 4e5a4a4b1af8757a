"""What a GPU must give, for every encoding: the numbers of the CPU in float64, steps without a stall, steps to capture.

    python -m benchmarks.gpu_checks --out runs/gpu/checks.jsonl [--device cuda] [--seconds 150] [--small]

One row a check: `right`, and what was seen. Rows that the file holds are not checked again.
"""

from __future__ import annotations

import argparse
import copy
import platform
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import ways
from benchmarks.resumable import Fact, Rows
from vit2dpe import ENCODINGS, ViT
from vit2dpe.attention import explain
from vit2dpe.attention.kernels import rotary
from vit2dpe.training.graphs import GraphedModel

SIZE = 32
WORDS = (*ENCODINGS, "alibi(distance=squared)", "relative(prefix=true)", "sincos+rope", "relative+rope_mixed")
# How far loss and gradients may be from float64's, relative to the gradient.
FAR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def about(device: str) -> dict[str, Fact]:
    """Versions and hardware."""
    facts: dict[str, Fact] = dict(
        torch=torch.__version__, timm=timm.__version__, python=platform.python_version(), machine=platform.machine()
    )
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        facts |= dict(card=card.name, GiB=round(card.total_memory / 2**30, 1), capability=f"{card.major}.{card.minor}")
        facts |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    return facts


def model_of(encoding: str, class_token: bool = False) -> nn.Module:
    """Two blocks on 8 x 8 patches, every parameter away from its start; 64 tokens, or 65."""
    torch.manual_seed(0)
    model = ViT(
        encoding, img_size=SIZE, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=10,
        class_token=class_token, global_pool="token" if class_token else "avg",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch(repeats: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return images.repeat(repeats, 1, 1, 1), torch.arange(4).repeat(repeats)


def loss_of(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.bfloat16, cached: bool = True
) -> Tensor:
    """Cross-entropy, with autocast to half precisions; a graph is captured without its cache of cast weights."""
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(images.device.type, dtype if half else None, enabled=half, cache_enabled=cached):
        logits = model(images)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def gradients(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
    """(loss, all gradients in a row, float64 on the CPU)"""
    model.zero_grad()
    loss = loss_of(model, images, labels, dtype)
    loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return float(loss.detach()), torch.cat([part.detach().double().flatten().cpu() for part in parts])


def numbers(encoding: str, class_token: bool, device: str, triton: bool = True) -> dict[str, Fact]:
    """Loss and gradients in float32 and in autocast to both half precisions, against float64 on the CPU.

    Args:
        triton: whether rotations may take their Triton kernel; they do on CUDA, where Triton is installed.
    """
    with mock.patch.object(rotary, "TRITON", rotary.TRITON and triton), ways.exact_products(device):
        return _numbers(encoding, class_token, device)


def _numbers(encoding: str, class_token: bool, device: str) -> dict[str, Fact]:
    model = model_of(encoding, class_token).eval()
    images, labels = batch()
    loss, gradient = gradients(copy.deepcopy(model).double(), images, labels, torch.float64)
    model.to(device)
    facts: dict[str, Fact] = {}
    right = True
    for dtype, far in FAR.items():
        ours, moved = gradients(model, images.float().to(device), labels.to(device), dtype)
        apart = float((moved - gradient).norm() / gradient.norm())
        facts[str(dtype).removeprefix("torch.")] = dict(loss=abs(ours - loss), gradient=apart)
        right &= bool(moved.isfinite().all()) and abs(ours - loss) <= far and apart <= far
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        facts["training"], facts["inference"] = (str(explain(model, SIZE, training=mode)[0]) for mode in (True, False))
    return dict(right=right) | facts


def stalls(encoding: str, device: str) -> dict[str, Fact]:
    """Forward and backward, once warm, with every wait of the host an error."""
    model = model_of(encoding).to(device).train()
    images, labels = (x.to(device) for x in batch())
    images = images.float()
    gradients(model, images, labels, torch.bfloat16)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model, images, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return dict(right=True)


def same_bits(encoding: str, device: str) -> dict[str, Fact]:
    """Whether two backward passes over 64 images give the same bits; nothing promises it."""
    model = model_of(encoding).to(device).eval()
    images, labels = (x.to(device) for x in batch(16))
    first, second = (gradients(model, images.float(), labels, torch.bfloat16)[1] for _ in range(2))
    return dict(equal=torch.equal(first, second))


def captured(encoding: str, device: str) -> dict[str, Fact]:
    """A step as a CUDA graph, replayed: the loss of the step that was captured."""
    model = model_of(encoding).to(device).eval()
    images, labels = (x.to(device) for x in batch())
    images = images.float()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, images, labels, cached=False)
        loss.backward()
        return loss.detach()

    replay, loss = ways.captured(step)
    replay()
    torch.cuda.synchronize()
    eager = loss_of(model, images, labels)
    return dict(right=abs(float(loss) - float(eager)) <= 1e-2, loss=float(loss), eager=float(eager))


def graphed(encoding: str, device: str) -> dict[str, Fact]:
    """`run.graph`: gradients of a second batch, replayed, against those of eager mode, which differ by no rounding."""
    model = model_of(encoding).to(device).eval()
    images, labels = (x.to(device) for x in batch())
    images = images.float()
    found = []
    for module in (model, GraphedModel(model)):
        for given in (images, images.flip(0)):
            model.zero_grad()
            loss = loss_of(module, given, labels, cached=False)
            loss.backward()
        parts = [p.grad.detach().double().flatten().cpu() for p in model.parameters() if p.grad is not None]
        found.append((float(loss), torch.cat(parts)))
    (eager, gradient), (loss_, replayed) = found
    apart = float((replayed - gradient).norm() / gradient.norm())
    return dict(right=abs(loss_ - eager) <= 1e-3 and apart <= 1e-2, loss=loss_, eager=eager, gradient=apart)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_checks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no check after so many")
    parser.add_argument("--small", action="store_true", help="two encodings")
    config = parser.parse_args(args)
    warnings.simplefilter("ignore")
    rows = Rows(config.out, config.seconds)
    words = ("rope", "relative") if config.small else WORDS
    rows.once("about", partial(about, config.device))
    for word in words:
        for tokens in (64, 65):
            rows.once(f"numbers {word} {tokens}", partial(numbers, word, tokens == 65, config.device))
            if "rope" in word:
                plain = partial(numbers, word, tokens == 65, config.device, triton=False)
                rows.once(f"numbers {word} {tokens} without triton", plain)
    if config.device.startswith("cuda"):
        for name, check in {"stalls": stalls, "captured": captured, "graphed": graphed, "same bits": same_bits}.items():
            for word in words:
                rows.once(f"{name} {word}", partial(check, word, config.device))
    wrong = [name for name, row in rows.rows.items() if row.get("failed") or row.get("right") is False]
    print(f"{len(rows.rows)} checks, {len(wrong)} wrong: {wrong}; {len(rows.left_out)} for another run")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
