"""Which of several equal paths an attention takes, chosen from sizes and modes alone, and who wants to know.

`vit2dpe.attention` asks here and does what it is told; while `vit2dpe.attention.explain` looks, every answer is written
down where it is given, so that what is told is what is done. Why each path exists: docs/decisions/0005.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ConfigError
from ..signal import Bias, Dense, Signal, Table
from .kernels import table
from .kernels.choice import Selection, plain_only

# What the attention that runs was told, while `explain` looks; else None.
told: dict[str, Selection] | None = None


def tell(what: str, choice: Selection) -> Selection:
    """Write a choice down for who looks; the first of a kind counts."""
    if told is not None:
        told.setdefault(what, choice)
    return choice


def rotation(qkv: Tensor, signal: Signal, private: bool) -> Selection:
    """Of a packed projection (B, N, 3 D): none, in place (`kernels.rotary`) or functional (`attention.rotate`)."""
    turn = signal.q_rotation
    if turn is None and signal.k_rotation is None:
        return Selection("none", "no rotation is asked for")
    if turn is None or turn is not signal.k_rotation:
        return Selection("functional", "queries and keys turn differently")
    if not private:
        return Selection("functional", "somebody else may need the output of qkv: a hook, a norm, a cache, another map")
    plain = plain_only(qkv)
    if plain is not None:
        return Selection("functional", plain)
    if qkv.device.type not in ("cpu", "cuda") or not qkv.is_floating_point():
        return Selection("functional", f"no complex numbers for {qkv.dtype} on {qkv.device.type}")
    if not qkv.is_contiguous():
        return Selection("functional", "the output of qkv is not contiguous")
    if turn.cos.shape[-2] != qkv.shape[1] or torch.promote_types(qkv.dtype, turn.cos.dtype) != turn.cos.dtype:
        return Selection("functional", "the rotation is of another length, or less precise than the output of qkv")
    return Selection("in place", "eager mode, and nobody else holds the output of qkv")


def bias(
    q: Tensor, k: Tensor, terms: Sequence[Bias], mask: Tensor | None, dropout: float, traced: bool, appended: bool
) -> Selection:
    """ "none", "channels", "matrix", or a path of `kernels.table`: "learned", "view", "chunked".

    Args:
        terms: what is left of the bias, once products are channels (`appended`).
        traced: whether scale or temperature are tensors.
    """
    if not terms:
        if appended:
            return Selection("channels", "the bias is a product, and the kernel computes in float32 at least")
        return Selection("none", "no bias is asked for")
    if len(terms) > 1:
        return Selection("matrix", "several terms are added up")
    if isinstance(terms[0], Dense) and terms[0].why:
        return Selection("matrix", terms[0].why)
    if not isinstance(terms[0], Table):
        return Selection("matrix", f"a {type(terms[0]).__name__} term is a matrix, here at least")
    if mask is not None:
        return Selection("matrix", "a mask is merged into it")
    if dropout:
        return Selection("matrix", "the weights have dropout")
    if traced:
        return Selection("matrix", "scale or temperature are traced, and the kernel takes numbers")
    return table.choose(terms[0], q, _trains(terms[0].table, q, k))


def materialize_shared_bias(signal: Signal, x: Tensor) -> Signal:
    """The signal as all blocks are handed it: matrices that each of them would look up are looked up here, once.

    Args:
        x: the tokens, for their dtype and device.
    """
    return signal._replace(bias=tuple(_once(term, x) if isinstance(term, Table) else term for term in signal.bias))


def _once(term: Table, x: Tensor) -> Bias:
    path, why = table.choose(term, x, _trains(term.table, x))
    return Dense(term.dense(), f"{why}; looked up once for all blocks") if path == "matrix" else term


def _trains(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def kernel(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, dropout: float, scale: float) -> Selection:
    """Which implementation of the fused attention torch will take."""
    try:
        found = torch._fused_sdp_choice(q, k, v, added, dropout, False, scale=scale)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return Selection("unknown", f"torch does not say: {str(error).splitlines()[0]}")
    return Selection(SDPBackend(found).name.lower(), "torch's choice for these tensors")


def kernel_dtype(q: Tensor) -> torch.dtype:
    """What the kernel will compute in: q's dtype, or autocast's."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return q.dtype


def allowed_kernels(added: Tensor | None, *inputs: Tensor) -> Any:
    """On CUDA, training with a mask or bias keeps away from cuDNN, whose masked backward gives NaN at 64 tokens.

    pytorch issue 196678: any mask, constant or learned, lengths of 64 modulo 128. Not yet run on such a device.
    """
    if added is None or not added.is_cuda or not _trains(added, *inputs):
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Told(NamedTuple):
    """What one attention does: its name, and the paths of rotation, bias and fused kernel, each with its reason.

    `kernel` is torch's choice, None where the path of the bias calls the kernel in parts.
    """

    name: str
    rotation: Selection
    bias: Selection
    kernel: Selection | None

    def __str__(self) -> str:
        kernel = "" if self.kernel is None else f"; kernel {self.kernel.path}"
        said = (
            f"{what} {choice.path} ({choice.why})" for what, choice in zip(self._fields[1:], self[1:3], strict=False)
        )
        return f"{self.name}: {'; '.join(said)}{kernel}"


def explain(model: nn.Module, *inputs: Any, training: bool = False) -> list[Told]:
    """Which path each attention of a model takes, and why: one forward is run, and every choice noted where it is made.

        for line in explain(model, (1024, 1024)):
            print(line)

    Args:
        model: a model, or an `Attention` alone.
        inputs: what it is called with; or one size in pixels, a side or (height, width), for one black image.
        training: in training mode with gradients, instead of evaluation without. The mode is put back, and no random
            number is drawn from the global generator.

    Raises:
        ConfigError: for a model without an attention of ours, and while another `explain` looks.
    """
    if len(inputs) == 1 and isinstance(inputs[0], int | tuple):
        height, width = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0], inputs[0])
        like = next(model.parameters())
        inputs = (like.new_zeros(1, getattr(model, "in_chans", 3), height, width),)
    global told
    found: list[Told] = []
    none = Selection("none", "no rotation is asked for")

    def start(*_: Any) -> None:
        global told
        told = {}

    def note(name: str) -> Callable[..., None]:
        def end(*_: Any) -> None:
            global told
            noted, told = told or {}, None
            if "bias" in noted:
                found.append(Told(name, noted.get("rotation", none), noted["bias"], noted.get("kernel")))

        return end

    parts = [(name, part) for name, part in model.named_modules() if getattr(part, "attends", False)]
    if not parts or told is not None:
        raise ConfigError(
            "explain takes a model with an Attention of ours, one at a time"
            if not parts
            else "explain is looking already: it cannot be called from within a forward that it watches"
        )
    modes = {part: part.training for part in model.modules()}
    handles = [part.register_forward_pre_hook(start) for _, part in parts]
    handles += [part.register_forward_hook(note(name or type(part).__name__)) for name, part in parts]
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(training):
            model.train(training)(*inputs)
    finally:
        told = None
        for handle in handles:
            handle.remove()
        for part, mode in modes.items():
            part.training = mode
    return found
