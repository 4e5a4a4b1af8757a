"""What code asks of a GPU, seen on a machine without one: kernels, copies between host and device, reads by the host.

    python -m benchmarks.devtrace                   a forward and a training step of a rotary ViT
    python -m benchmarks.devtrace relative --rows 20

The code itself runs, on fake CUDA tensors: shapes, dtypes and devices without numbers. Every operation that is no view
is one kernel; fused attention is the one that a Hopper card would take. A read (`.item()`, `.tolist()`, `bool()`) makes
the host wait for the device; a copy from memory that is not pinned does too. An operation of our own is one kernel.
Times are for `benchmarks/gpu.sh`, on a card.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vit2dpe
from vit2dpe import ViT
from vit2dpe.attention import functional
from vit2dpe.attention.kernels import flex
from vit2dpe.data.datasets import Images
from vit2dpe.data.rand_augment import SORTED
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.data.splits import Split
from vit2dpe.signal import Signal
from vit2dpe.spec import parse_term
from vit2dpe.training.distributed import ALONE
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.task import B, Task
from vit2dpe.training.tasks.classification import ImageTask
from vit2dpe.training.update import Updater

from .backward import backward

PACKAGE = f"{Path(vit2dpe.__file__).parent}{os.sep}"
LIBRARIES = ("timm", "torch/optim", "torch/nn/utils", "torch/amp")  # named where no line of the package is on the stack
# Operations that launch nothing on a device: of shapes, of memory, of autograd.
IDLE = (
    "prim.device",
    "aten.empty",
    "_unsafe_view",
    "detach",
    "promote_types",
    "sym_size",
    "is_pinned",
    "_has_compatible",
)

# Operations that read a number inside, before they go on.
READING = ("multinomial",)

LIGHT = AugmentConfig(4, True, label_smoothing=0.1)  # shift and flip

Model = TypeVar("Model", bound=nn.Module)
R = TypeVar("R")


@dataclass
class Traffic:
    """Counts of what ran while it was recorded, by operation or by the line that asked for it.

    Args:
        kernels: operations on the device, by name.
        lines: the same, by file:line.
        to_device, to_host: copies, by file:line.
        blocking: those to the device for which the host waits, by file:line: of memory that is not pinned.
        reads: numbers that the host waited for, by kind and file:line.
        late: copies to the host for which it does not wait, by file:line.
        host: operations on the CPU, by name.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    to_device: Counter[str] = field(default_factory=Counter)
    blocking: Counter[str] = field(default_factory=Counter)
    to_host: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)

    @property
    def stalls(self) -> int:
        """Times that the host waited for the device."""
        return self.to_host.total() + self.reads.total() + self.blocking.total()

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()

    def report(self, title: str, rows: int = 12) -> str:
        """Totals, and the most frequent lines of each kind."""
        lines = [
            f"{title}: {self.kernels.total()} kernels, {self.to_device.total()} copies to the device, "
            f"{self.to_host.total()} to the host, {self.reads.total()} reads, {self.host.total()} host operations"
        ]
        kinds = {"kernels": self.lines, "to device": self.to_device, "blocking": self.blocking, "to host": self.to_host}
        kinds["read"] = self.reads
        for kind, counter in kinds.items():
            lines += [f"    {kind:9} {count:4} {line}" for line, count in counter.most_common(rows)]
        return "\n".join(lines)


def calling_line() -> str:
    """file:line of the innermost frame in the package, or in the libraries that it calls."""
    library, frame = "elsewhere", inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name.removeprefix(PACKAGE)}:{frame.f_lineno}"
        inside = name.partition("site-packages/")[2]
        if library == "elsewhere" and inside.startswith(LIBRARIES):
            library = f"{inside}:{frame.f_lineno}"
        frame = frame.f_back
    return library


class Recorder(TorchDispatchMode):
    """Writes every operation that does work into `traffic`."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = str(function).removeprefix("aten.")
        if function.is_view or any(word in str(function) for word in IDLE):
            return result
        into = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        if name.startswith("copy_") and "cuda" in into and args[0].device.type == "cpu" and True in args[2:]:
            self.traffic.late[calling_line()] += 1  # into pinned memory
        elif "cuda" in out and "cpu" in into and "copy" in name:
            self.traffic.to_device[calling_line()] += 1
            if not kwargs.get("non_blocking", True in args[2:]):
                self.traffic.blocking[calling_line()] += 1
        elif "cuda" in into and "cpu" in out:
            self.traffic.to_host[calling_line()] += 1
        elif "cuda" in out | into:
            self.traffic.kernels[name] += 1
            self.traffic.lines[calling_line()] += 1
            if name.startswith(READING):
                self.traffic.reads[f"{name} {calling_line()}"] += 1
        elif "cpu" in out:
            self.traffic.host[name] += 1
        return result


@contextmanager
def fake_cuda() -> Iterator[Callable[[], Recorder]]:
    """Within, tensors on "cuda" are fake, and `with recorder() as recorded` fills `recorded.traffic`.

    Fake tensors have no numbers: a read gives 1, or ones; truth is False; `torch.equal` is True.
    """
    traffic = Traffic()
    with ExitStack() as stack:
        for patch in (*_device_patches(), *_read_patches(traffic)):
            stack.enter_context(patch)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield lambda: Recorder(traffic)


def on_fake_cuda(model: Model) -> Model:
    """The model with fake parameters and buffers in place of its own, inside `fake_cuda`."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
    return model


def _device_patches() -> list[mock._patch]:
    """A CUDA device with bfloat16, on which eager mode runs as it does on real tensors."""

    def why_plain(x: Tensor) -> str | None:
        return "compiling or exporting" if torch.compiler.is_compiling() else None

    users = [module for name, module in sys.modules.items() if name.startswith("vit2dpe.attention.")]
    users = [module for module in users if vars(module).get("why_plain") is functional.why_plain]
    patches: list[mock._patch] = [mock.patch.object(module, "why_plain", why_plain) for module in users]
    patches += [
        mock.patch("vit2dpe.data.rand_augment.counted", _even),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention),
        mock.patch.object(flex, "attend", _beside_logits),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self),  # `on_fake_cuda` has done it
    ]
    return patches


def _even(rank: Tensor) -> list[int]:
    """Draws have no numbers either: every operation of augmentation has as many samples as any other, up to one."""
    return [len(part) for part in np.array_split(range(len(rank)), len(SORTED))]


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The operations that torch dispatches on a Hopper card: flash in half precision, memory-efficient with a bias."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
        keys = attn_mask.shape[-1]
        if keys % 16:  # rows must start at multiples of 16
            attn_mask = nn.functional.pad(attn_mask, (0, -keys % 16))[..., :keys]
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], -1, -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _beside_logits(
    q: Tensor, k: Tensor, v: Tensor, signal: Signal, mask: Tensor | None = None, scale: float | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """FlexAttention as a kernel of its own, and what it is handed."""
    flex.score_mod(signal)
    return _fused_attention(q, k, v, scale=scale)


def _read_patches(traffic: Traffic) -> list[mock._patch]:
    """What makes the host wait is written down, and answered with a number that is finite."""

    def reading(kind: str, answer: Callable[..., object]) -> Callable[..., object]:
        def read(x: Tensor, *args: object) -> object:
            if x.device.type == "cuda":
                traffic.reads[f"{kind} {calling_line()}"] += 1
            return answer(x, *args)

        return read

    def ones(shape: Sequence[int]) -> float | list:
        return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0

    answers: dict[str, Callable[..., object]] = {
        "item": lambda x: 1.0 if x.is_floating_point() else 1,
        "tolist": lambda x: ones(tuple(x.shape)),
        "__bool__": lambda x: False,
        "__float__": lambda x: 1.0,
        "__int__": lambda x: 1,
        "__index__": lambda x: 1,
        # How many there are is not known.
        "nonzero": lambda x: torch.empty(max(1, x.numel() // 14), x.ndim, dtype=torch.long, device=x.device),
    }
    patches = [
        mock.patch.object(kind, name, reading(name, answer))
        for name, answer in answers.items()
        for kind in (Tensor, FakeTensor)
        if kind is Tensor or name in vars(kind)
    ]
    event = mock.Mock(synchronize=lambda: traffic.reads.update([f"event {calling_line()}"]))
    patches.append(mock.patch("torch.cuda.Event", new=mock.Mock(return_value=event)))
    return [*patches, mock.patch("torch.equal", reading("equal", lambda x, y: True))]


def images(count: int, size: tuple[int, int]) -> Images:
    """Random images of ten classes."""
    pixels = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)
    split = Split(pixels, torch.arange(count) % 10)
    half = (0.5,) * 3
    return Images("random", tuple("0123456789"), split, split, half, half, "", ())


def trace_forward(model: nn.Module, size: tuple[int, int], batch: int = 8, training: bool = False) -> Traffic:
    """A forward pass in bfloat16 autocast, with gradients in `training`."""
    with fake_cuda() as recorder:
        on_fake_cuda(model).train(training)
        x = torch.empty(batch, 3, *size, device="cuda")
        with recorder() as recorded, torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16):
            model(x)
    return recorded.traffic


def trace_launches(model: nn.Module, size: tuple[int, int], batch: int = 8) -> Traffic:
    """Forward, loss and backward in bfloat16 autocast: a training step without the optimizer."""
    with fake_cuda() as recorder:
        on_fake_cuda(model).train()
        x, labels = torch.empty(batch, 3, *size, device="cuda"), torch.empty(batch, dtype=torch.long, device="cuda")
        with recorder() as recorded:
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), labels)
            backward(loss)
    return recorded.traffic


def trace_step(
    model: nn.Module, size: tuple[int, int], batch: int = 8, augment: AugmentConfig = LIGHT
) -> dict[str, Traffic]:
    """A training step in bfloat16 autocast: {"batch": images to the device and augmentation, "update": the rest}.

    `update` holds forward, loss, backward, clipping and optimizer. "numbers": its loss and norm, read afterwards.
    """
    return trace_task(model, ImageTask(images(2 * batch, size), size, batch, device="cuda", augment=augment))


def trace_task(model: nn.Module, task: Task[B]) -> dict[str, Traffic]:
    """`trace_step` of any task whose batches go to "cuda"."""
    found = {}
    with fake_cuda() as recorder:
        on_fake_cuda(model)
        updater = Updater(model, task, OptimConfig(), RunConfig(device="cuda", precision="bfloat16"), ALONE)

        def take(name: str, run: Callable[[], R]) -> R:
            with recorder() as recorded:
                result = run()
            found[name] = Traffic(**{kind: Counter(counts) for kind, counts in vars(recorded.traffic).items()})
            recorded.traffic.clear()
            return result

        tensors = take("batch", lambda: task.batch(0, 0))
        with mock.patch.object(Tensor, "backward", backward):
            result = take("update", lambda: updater.step(tensors, 0, 0, 0))
        take("numbers", lambda: result.finite and (result.numbers, result.norm))
    return found


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.devtrace", description=__doc__.splitlines()[0])
    parser.add_argument("encoding", nargs="?", default="rope", help="an encoding, or a sum of them")
    parser.add_argument("--depth", type=int, default=9, help="blocks")
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--rows", type=int, default=12, help="lines of each kind that are printed")
    parser.add_argument("--policy", default="none", help="augmentation: none, trivial or rand(ops=2, magnitude=9)")
    config = parser.parse_args(args)

    def model() -> ViT:
        return ViT(
            config.encoding, img_size=32, patch_size=4, embed_dim=192, depth=config.depth, num_heads=3, mlp_ratio=2.0,
            num_classes=10, class_token=False, global_pool="avg",
        )  # fmt: skip

    print(trace_forward(model(), (32, 32), config.batch).report("forward", config.rows))
    augment = replace(LIGHT, policy=parse_term(config.policy))
    for name, traffic in trace_step(model(), (32, 32), config.batch, augment).items():
        print(traffic.report(name, config.rows))


if __name__ == "__main__":
    main()
