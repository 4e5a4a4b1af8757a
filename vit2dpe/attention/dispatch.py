"""Which implementation an attention uses, chosen from sizes and modes alone, and why.

The kernels state when they serve (`kernels.rotary.select`, `kernels.table.select`); here a bias, and the fused kernels
of torch, are decided. `vit2dpe.explain` reports the selections of one forward pass as they are made. Why each
implementation exists: docs/decisions/0005.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode  # documented, and has no other name

from ..segments import Segments
from ..signal import Bias, Dense, Table
from .kernels import Selection, table, trains

T = TypeVar("T")


def select_bias(
    q: Tensor,
    k: Tensor,
    terms: Sequence[Bias],
    mask: Tensor | None,
    dropout: float,
    traced: bool,
    appended: bool,
    plain: str | None,
) -> Selection:
    """ "channels", "matrix", or a path of `kernels.table`: "learned", "view", "chunked".

    Args:
        terms: what is left of the bias, once products are channels (`appended`).
        traced: whether scale or temperature are tensors.
        plain: why nothing but plain operations may run, or None.
    """
    if not terms and appended:
        return Selection("channels", "the bias is a product, and the kernel computes in float32 at least")
    if len(terms) > 1:
        return Selection("matrix", "several terms are added up")
    term = terms[0]
    if isinstance(term, Dense) and term.why:
        return Selection("matrix", term.why)
    if not isinstance(term, Table):
        return Selection("matrix", f"a {type(term).__name__} term is a matrix, here at least")
    if mask is not None:
        return Selection("matrix", "a mask is merged into it")
    if dropout:
        return Selection("matrix", "the weights have dropout")
    if traced:
        return Selection("matrix", "scale or temperature are traced, and the kernel takes numbers")
    return table.select(term, q, trains(term.table, q, k), plain)


def select_mask(causal: bool, mask: Tensor | None) -> Selection:
    """ "causal", "matrix" or "none"."""
    if causal:
        return Selection("causal", "tokens see those before them, which the kernel needs no matrix for")
    if mask is None:
        return Selection("none", "every query may attend to every key")
    return Selection("matrix", "where queries may attend is given to the kernel as a tensor, with the bias if any")


def select_segments(segments: Segments) -> Selection:
    """ "segments": packed rows."""
    count, kinds = sum(group.size for group in segments.groups), len(segments.groups)
    return Selection("segments", f"{count} segments of packed rows, of {kinds} kinds, those of one as a batch")


def select_kernel(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, dropout: float, scale: float, causal: bool
) -> Selection:
    """Which implementation of the fused attention torch takes: it is called once more, and its operations are read.

    torch's order differs between cards and versions, and no public function tells it.
    """
    allowed = nullcontext() if added is None else allowed_kernels(added, q, k, v)
    with allowed, _Operations() as seen:
        F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout, is_causal=causal, scale=scale)
    fused = [name for name in _FUSED if any(f"_scaled_dot_product_{name}" in operation for operation in seen.names)]
    return Selection(fused[0] if fused else "math", "torch's choice for these tensors")


_FUSED = ("flash_attention", "efficient_attention", "cudnn_attention")


class _Operations(TorchDispatchMode):
    """The names of the operations that are dispatched."""

    def __init__(self) -> None:
        begin: Callable[[], None] = super().__init__  # torch's has no types
        begin()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., T],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> T:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def allowed_kernels(added: Tensor, *inputs: Tensor) -> AbstractContextManager[None]:
    """On CUDA, training with a mask or bias keeps away from cuDNN, whose masked backward gives NaN at 64 tokens.

    pytorch issue 196678: any mask, constant or learned, lengths of 64 modulo 128. Not yet run on such a device.
    """
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(added).tangent is not None:
        return sdpa_kernel(SDPBackend.MATH)  # the others have no forward-mode derivative by what is added
    if not added.is_cuda or not trains(added, *inputs):
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
