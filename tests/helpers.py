"""What several files of tests use: numbers that are near, tensors and weights from a seed, tables, small processes."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import timm
import torch
from torch import Tensor, nn

from vit2dpe.testing import randomise

Model = TypeVar("Model", bound=nn.Module)
MICRO = dict(depth=2, embed_dim=48, num_heads=3, num_classes=7)


def within(
    tolerance: float,
    *,
    relative: bool = False,
    of_the_largest: bool = False,
    any_dtype: bool = False,
    spread: float = 0.0,
) -> Callable[..., None]:
    """A comparison `close(ours, reference, tolerance=...)`: element-wise, shapes and dtypes equal.

    Args:
        tolerance: the largest absolute difference, unless a call names another.
        relative: of each element, `tolerance` + `tolerance` x |reference|.
        of_the_largest: `tolerance` x max(1, the largest |reference|).
        any_dtype: both are taken to float64 first, so that float32 can be compared with a float64 reference.
        spread: the least standard deviation of the reference: two constants would be near without saying anything.
    """

    def close(ours: Tensor, reference: Tensor, tolerance: float = tolerance) -> None:
        if any_dtype:
            ours, reference = ours.double(), reference.double()
        if spread:
            assert float(reference.detach().std()) > spread, "the reference is nearly constant"
        scale = max(1.0, float(reference.detach().abs().max())) if of_the_largest else 1.0
        torch.testing.assert_close(ours, reference, rtol=tolerance if relative else 0, atol=scale * tolerance)

    return close


def randn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal numbers at every call; the global generator is left alone."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(model: Model, std: float = 0.1, seed: int | None = 1) -> Model:
    """In evaluation mode, N(0, std²) added to every parameter: zeros (biases, heads) and ones (norms) hide mistakes.

    `seed` None goes on with the global generator.
    """
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return model.eval()


def redrawn(model: Model, std: float, gains: Callable[[str], bool], seed: int | None = None) -> Model:
    """In evaluation mode, every parameter from N(0, std²), or N(1, std²) where `gains(name)`: the weights of norms."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * std + gains(name))
    return model.eval()


def micro_vit(position: str = "rope", **changes: object) -> nn.Module:
    """A ViT by its timm name, two blocks of 48 channels, 32 x 32 images, in evaluation mode, all parameters drawn."""
    torch.manual_seed(0)
    return randomise(timm.create_model("vit2dpe_tiny_patch4_32", position=position, **MICRO | changes)).eval()


def seal(meta: dict[str, object]) -> dict[str, object]:
    """The metadata of a checkpoint with the digest that belongs to them."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    return rest | {"check": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def printed(code: str) -> list[str]:
    """The words that a new Python prints which runs this code."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()


def loaded_modules(code: str, names: Collection[str]) -> list[str]:
    """Which of these packages a new Python has imported once it has run this code."""
    return printed(f"import sys\n{code}\nprint(*[name for name in {sorted(names)} if name in sys.modules])")
