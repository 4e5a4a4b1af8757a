"""Looking inside attention: the maps of every attention of a model, and the implementations that are used.

    with vit2dpe.attention_maps(model) as maps:
        model(images)
    maps["blocks.0.attn"]  # (B, H, Lq, Lk), rows sum to 1

    for line in vit2dpe.explain(model, 224):
        print(line)  # blocks.0.attn: rotation in place (...); bias none (...); kernel flash_attention

All models call `attend`, so one observer serves both. It belongs to the thread or asyncio task that entered the context
and to the modules of the model it was given: other models, and the same model in other threads, are not observed. It
follows that model by forward hooks, which are gone with the context; outside of one nothing is paid.

Legend: B batch, H heads, Lq, Lk tokens of queries and keys, N tokens, prefix included.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, not_ours
from ..segments import Segments
from ..signal import Signal
from .dispatch import select_kernel, select_mask
from .functional import OBSERVER, rotate_qk
from .kernels import Selection
from .masks import Causal
from .segments import kinds

Maps = dict[str, Tensor]
Given = Tensor | Segments | None  # the mask of an attention


class Report:
    """What is recorded of one model; subclasses override the events that they record."""

    active = True

    def attended(self, name: str, q: Tensor, k: Tensor, signal: Signal, mask: Given, scale: float | None) -> None:
        """The arguments of `attend` within the module of this name."""

    def selected(self, name: str, what: str, selection: Selection) -> None:
        """An implementation that was selected within the module of this name."""

    def fused(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        added: Tensor | None,
        dropout: float,
        scale: float,
        causal: bool,
    ) -> None:
        """The arguments of torch's fused attention within the module of this name."""

    def left(self, name: str) -> None:
        """The module of this name has returned."""


class Running(NamedTuple):
    """The observer that `attend` calls: a report, and the observed modules that are running, the innermost last."""

    report: Report
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str | None:
        return self.names[-1] if self.names and self.report.active else None

    def attended(self, q: Tensor, k: Tensor, signal: Signal, mask: Given, scale: float | None) -> None:
        if self.name is not None:
            self.report.attended(self.name, q, k, signal, mask, scale)

    def selected(self, what: str, selection: Selection) -> None:
        if self.name is not None:
            self.report.selected(self.name, what, selection)

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, dropout: float, scale: float, causal: bool
    ) -> None:
        if self.name is not None:
            self.report.fused(self.name, q, k, v, added, dropout, scale, causal)


class _Hook:
    """A hook of the module that it was given to: copies of the module, and its pickle, have one that does nothing."""

    def __init__(self, act: Callable[..., None] | None = None) -> None:
        self.act = act

    def __call__(self, *arguments: object, **options: object) -> None:
        if self.act is not None:
            self.act(*arguments, **options)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


@contextmanager
def observe(report: Report, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within this context `report` receives what this thread or task does in these modules.

    Raises:
        ConfigError: inside another such context of this thread or task.
    """
    if OBSERVER.get() is not None:
        raise ConfigError("a model is being observed in this thread already: attention_maps and explain do not nest")

    def enter(name: str, *_: object) -> None:
        if (running := _running(report)) is not None:
            OBSERVER.set(running._replace(names=(*running.names, name)))

    def leave(name: str, *_: object) -> None:
        if (running := _running(report)) is not None:
            OBSERVER.set(running._replace(names=running.names[:-1]))
            report.left(name)

    handles: list[RemovableHandle] = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(_Hook(partial(enter, name))))
        handles.append(module.register_forward_hook(_Hook(partial(leave, name)), always_call=True))
    OBSERVER.set(Running(report))
    try:
        with _EAGER:
            yield
    finally:
        report.active = False
        if _running(report) is not None:
            OBSERVER.set(None)
        for handle in handles:
            handle.remove()


def _running(report: Report) -> Running | None:
    """The observer of this thread or task, if it is that of this report."""
    running = OBSERVER.get()
    return running if isinstance(running, Running) and running.report is report else None


class _EagerWhileObserved:
    """Compiled modules run in eager mode while anybody observes.

    torch holds one stance for the whole process: the first to enter sets it, the last to leave puts it back.
    """

    def __init__(self) -> None:
        self.lock, self.observers = threading.Lock(), 0
        self.stance: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        with self.lock:
            self.observers += 1
            if self.observers == 1:
                self.stance = torch.compiler.set_stance("force_eager")

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.observers -= 1
            if self.observers == 0 and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None


_EAGER = _EagerWhileObserved()


class _MapReport(Report):
    def __init__(self, maps: Maps, in_parts: set[str]) -> None:
        self.maps, self.ran = maps, False
        self.in_parts = in_parts  # modules that attend several times in one call, each time for some of their windows
        self.begun: set[str] = set()  # of these, those that are running and have a map of some windows

    def left(self, name: str) -> None:
        self.ran = True
        self.begun.discard(name)

    def attended(self, name: str, q: Tensor, k: Tensor, signal: Signal, mask: Given, scale: float | None) -> None:
        found = weights(q, k, signal, mask, scale)
        self.maps[name] = torch.cat([self.maps[name], found]) if name in self.begun else found
        if name in self.in_parts:
            self.begun.add(name)


@contextmanager
def attention_maps(model: nn.Module) -> Iterator[Maps]:
    """Within this context every call of `model` fills a dict: name of an attention module -> (B, H, Lq, Lk) float32.

    The maps are softmax(temperature · (scale · R(q) R(k)ᵀ + bias)) under the mask, before dropout; rows sum to 1, those
    of a query that may attend to nothing are 0, and maps times values are what the fused kernel gives. They are
    computed beside the kernel, so results do not change, and without gradients. In windows B counts windows, the images
    of a window beside each other; where windows are shifted, first those without a mask, row by row, then the others. A
    module that is called again (a decoding step) leaves its last map. Compiled modules run in eager mode meanwhile.

    Calls by this thread or asyncio task alone are recorded, and those of this model alone.

    Raises:
        ConfigError: inside another such context, or inside `explain`, of this thread or task; when the context is left
            (or entered, for a single layer), for a model in which nothing calls the attention of this package or is
            torch's own.
    """
    maps: Maps = {}
    # A map is named after the innermost running module with children: an attention has at least its projections.
    inside = {name: module for name, module in model.named_modules() if any(True for _ in module.children())}
    report = _MapReport(maps, {name for name, module in inside.items() if getattr(module, "attends_in_parts", False)})
    stock = {name: module for name, module in inside.items() if isinstance(module, nn.MultiheadAttention)}
    lacks = "has no attention of ours, and none of torch's (nn.MultiheadAttention), whose maps can be kept"
    if not inside:
        raise not_ours(model, lacks)
    with observe(report, {name: module for name, module in inside.items() if name not in stock}):
        handles = [
            module.register_forward_hook(_Hook(partial(_stock, report, name)), with_kwargs=True)
            for name, module in stock.items()
        ]
        try:
            yield maps
        finally:
            for handle in handles:
                handle.remove()
    # An author's module may call `attend` without being known as an attention: only what ran can tell.
    known = bool(stock) or any(getattr(module, "attends", False) for module in inside.values())
    if report.ran and not (maps or known):
        raise not_ours(model, lacks)


@torch.no_grad()
def weights(q: Tensor, k: Tensor, signal: Signal, mask: Given = None, scale: float | None = None) -> Tensor:
    """(B, H, Lq, Lk) float32: the weights that `attend` gives to the values, for its arguments."""
    if isinstance(mask, Segments):
        segments = mask.of_rows(q.shape[0])
        row = q.new_zeros(*q.shape[:3], k.shape[2], dtype=torch.float32)
        for (numbers, at), kind in zip(segments.places(), kinds(q, k, k, signal, segments), strict=True):
            own = kind.mask.matrix() if isinstance(kind.mask, Causal) else kind.mask
            found = weights(kind.q, kind.k, kind.signal, own, scale).permute(0, 2, 3, 1)  # (G, L, L, H)
            row[numbers[..., None], :, at[:, :, None], at[:, None, :]] = found
        return row
    q, k = q.to(torch.promote_types(q.dtype, torch.float32)), k.to(torch.promote_types(k.dtype, torch.float32))
    q, k, signal = rotate_qk(q, k, signal)
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        for term in signal.bias:
            logits = logits + term.dense()
        if signal.temperature is not None:
            logits = logits * signal.temperature
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0).float()


def _stock(
    report: _MapReport,
    name: str,
    module: nn.MultiheadAttention,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor | bool | None],
    _: tuple[Tensor, Tensor | None],
) -> None:
    """The map of torch's own attention, which returns its weights on request alone: it is called once more."""
    if _running(report) is None:
        return
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    arguments = dict(zip(names, args, strict=False)) | kwargs
    arguments |= dict(need_weights=True, average_attn_weights=False, is_causal=False)
    training, module.training = module.training, False  # no dropout, and no random number spent
    try:
        with torch.no_grad():
            found = module.forward(**arguments)[1]  # type: ignore[arg-type]
    finally:
        module.training = training
    found = torch.as_tensor(found).nan_to_num(0.0).float()
    report.maps[name] = found if found.ndim == 4 else found[None]  # (B, H, Lq, Lk)


class Explanation(NamedTuple):
    """The implementations that one attention uses: rotation, bias, fused kernel and mask, each with its reason.

    `kernel` is torch's choice, None where the path of the bias calls the kernel in parts. `mask` is "causal" (no
    matrix), "matrix" or "none".
    """

    name: str
    rotation: Selection
    bias: Selection
    kernel: Selection | None
    mask: Selection = select_mask(causal=False, mask=None)

    def __str__(self) -> str:
        rotation, bias = (f"{one.path} ({one.why})" for one in (self.rotation, self.bias))
        mask = "" if self.mask.path == "none" else f"; mask {self.mask.path} ({self.mask.why})"
        kernel = "" if self.kernel is None else f"; kernel {self.kernel.path}"
        return f"{self.name}: rotation {rotation}; bias {bias}{mask}{kernel}"


class _SelectionReport(Report):
    def __init__(self) -> None:
        self.lines: list[Explanation] = []
        self.selections: dict[str, Selection] = {}  # of the attention that is running
        self.ran = False

    def attended(self, name: str, q: Tensor, k: Tensor, signal: Signal, mask: Given, scale: float | None) -> None:
        self.ran = True

    def selected(self, name: str, what: str, selection: Selection) -> None:
        self.selections.setdefault(what, selection)

    def fused(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        added: Tensor | None,
        dropout: float,
        scale: float,
        causal: bool,
    ) -> None:
        self.selections.setdefault("kernel", select_kernel(q, k, v, added, dropout, scale, causal))

    def left(self, name: str) -> None:
        none = {what: Selection("none", f"no {what} is asked for") for what in ("rotation", "bias")}
        found, ran = none | self.selections, self.ran
        self.selections, self.ran = {}, False
        if ran:
            mask = found.get("mask", select_mask(causal=False, mask=None))
            self.lines.append(Explanation(name, found["rotation"], found["bias"], found.get("kernel"), mask))


def explain(model: nn.Module, *inputs: Tensor | int | tuple[int, ...], training: bool = False) -> list[Explanation]:
    """Which implementation each attention of a model uses, and why, as selected in one forward pass.

        for line in explain(model, (1024, 1024)):
            print(line)

    Args:
        model: a model, or an `Attention` alone.
        inputs: what it is called with; or one size in pixels, a side or (height, width), for one black image, or
            (frames, height, width) for a black video.
        training: in training mode with gradients, instead of evaluation without. The mode is put back, and no random
            number is drawn from the global generator.

    Raises:
        ConfigError: for a model without an attention of ours, and while this thread or task observes a model already.
    """
    if len(inputs) == 1 and isinstance(inputs[0], int | tuple):
        size = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0], inputs[0])
        like = next(model.parameters())
        inputs = (like.new_zeros(1, getattr(model, "in_chans", 3), *size),)
    parts = {
        name or type(part).__name__: part for name, part in model.named_modules() if getattr(part, "attends", False)
    }
    if not parts:
        raise not_ours(model, "has no Attention of ours, which `explain` is about")
    report, modes = _SelectionReport(), {part: part.training for part in model.modules()}
    with observe(report, parts):
        try:
            with torch.random.fork_rng(), torch.set_grad_enabled(training):
                model.train(training)(*inputs)
        finally:
            for part, mode in modes.items():
                part.training = mode
    return report.lines
