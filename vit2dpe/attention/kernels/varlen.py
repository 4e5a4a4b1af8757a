"""Segments of packed rows by torch's `varlen_attn`: one call for all lengths, on CUDA, in half precision.

It takes no bias, no mask but causal order, and no dropout; what it does not take goes kind by kind
(`attention/segments`). Not yet run on such a device: proved with a reference on the CPU, and on shapes alone.

Source: torch.nn.attention.varlen (torch 2.14; in others it is not looked for), FlashAttention, arXiv 2307.08691.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ...segments import Segments
from ...signal import Signal

HERE = find_spec("torch.nn.attention.varlen") is not None and torch.__version__ >= "2.14"
DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)


def serves(q: Tensor, v: Tensor, signal: Signal, segments: Segments, dropout: float, plain: str | None) -> bool:
    """Whether it does; `plain`: why nothing but plain operations may run, or None."""
    free = not signal.bias and not isinstance(signal.temperature, Tensor) and not segments.inside and not dropout
    width = q.shape[-1]
    sized = width == v.shape[-1] and width % 8 == 0 and width <= 256 and bool(segments.groups)
    return HERE and free and sized and plain is None and q.device.type in DEVICES and q.dtype == v.dtype in DTYPES


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """(B, H, N, Dh) of queries and keys that are turned, (B, H, N, Dh); 0 for tokens of no segment."""
    from torch.nn.attention.varlen import varlen_attn

    segments = segments.of_rows(q.shape[0])
    sizes, longest = segments.sizes(), max(group.length for group in segments.groups)

    def ordered(x: Tensor) -> Tensor:
        tokens = x.transpose(1, 2).flatten(0, 1)  # (B N, H, Dh)
        tokens = tokens if segments.order is None else tokens.index_select(0, segments.order)
        return tokens[: sum(sizes[:-1])]

    reach, begins = (-1, 0) if segments.causal else (-1, -1), segments.starts
    q, k, v = ordered(q), ordered(k), ordered(v)
    out = varlen_attn(q, k, v, begins, begins, longest, longest, scale=scale, window_size=reach)
    if isinstance(out, tuple):
        raise TypeError("varlen_attn returned more than it was asked for")
    parts = [part.unflatten(0, group) for part, group in zip(out.split(sizes[:-1]), segments.groups, strict=True)]
    row: Tensor = segments.join(parts, v).unflatten(0, segments.numbers.shape)
    return row.transpose(1, 2)
