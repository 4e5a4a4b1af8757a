"""`with frozen(model):` the encodings of a model keep the Signals they made, for inference at the same places again.

Outside of it nothing is kept. Inside, a Signal is found again by the places themselves (compared, not by a shape), the
policy and the temperature; and before it is handed out every parameter of the encoding is compared with what it was, so
that nothing stale is ever used: not after an optimizer's step, an assignment to `.data`, `load_state_dict` or `.to()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ConfigError, not_ours
from ..positions import Positions
from ..signal import Bias, Dense, Distance, Signal, Table
from .base import Overrides, Policy, PositionEncoding, Temperature, overriding
from .find import named_encodings

# What a Signal depends on beside places: policy, temperature, dtype, grid, inference mode.
State = tuple[Policy | None, Temperature | None, torch.dtype, tuple[int, ...] | None, bool]
BUDGET = 32 * 2**20  # bytes of a bias that is kept as a matrix; above it the table is kept


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Keep what the encodings of `model` make, until the context is left, for the thread or task that entered it.

    In effect where gradients are off, the encoding is in evaluation mode, and nothing is being compiled; elsewhere the
    encodings compute as ever. Memory: one Signal for each block that owns an encoding and each set of places seen.

    Raises:
        ConfigError: for a model without encodings; inside, if a parameter of an encoding has changed since the context
            was entered.
    """
    encodings = named_encodings(model).values()
    if not encodings:
        raise not_ours(model, "has no encoding of ours, whose Signals could be kept")
    with overriding(Overrides(caches={encoding: SignalCache(encoding) for encoding in encodings})):
        yield model


class SignalCache:
    """The Signals of one encoding, with what they were made from."""

    def __init__(self, encoding: PositionEncoding) -> None:
        self.parameters = {name: p.detach().clone() for name, p in encoding.named_parameters()}
        self.signals: list[tuple[Positions, Positions, State, Signal]] = []

    def signal(self, encoding: PositionEncoding, q: Positions, k: Positions) -> Signal:
        """The Signal for these places, made at the first call."""
        self._check(encoding)
        grid: tuple[int, ...] | None = getattr(encoding, "grid", None)
        inference = torch.is_inference_mode_enabled()
        state: State = (encoding.policy, encoding.temperature, encoding.dtype, grid, inference)
        for old_q, old_k, old_state, signal in self.signals:
            if (old_q is old_k) == (q is k) and old_state == state and _same(q, old_q) and (q is k or _same(k, old_k)):
                return signal
        signal = encoding._signal(q, k)
        signal = signal.with_bias(tuple(_settle(term) for term in signal.bias))
        self.signals.append((q, k, state, signal))
        return signal

    def _check(self, encoding: PositionEncoding) -> None:
        for name, now in encoding.named_parameters():
            then = self.parameters.get(name)
            if then is None or then.dtype != now.dtype or then.device != now.device or not torch.equal(then, now):
                raise ConfigError(
                    f"{name} of {type(encoding).__name__} changed inside `with frozen(model):`, what is kept would be "
                    "stale; leave the context before changing parameters"
                )


def _same(a: Positions, b: Positions) -> bool:
    one_kind = a.coords.device == b.coords.device and a.coords.dtype == b.coords.dtype
    return a.extent == b.extent and a.prefix == b.prefix and one_kind and torch.equal(a.coords, b.coords)


def _settle(term: Bias) -> Bias:
    """A table as the matrix it stands for, where that is small; a formula too, and on the CPU at any size."""
    if not isinstance(term, Table | Distance):
        return term
    if isinstance(term, Distance) and term.q.coords.device.type != "cuda":
        return Dense(term.dense())
    pairs = (term.q.prefix + term.q.coords.shape[1]) * (term.k.prefix + term.k.coords.shape[1])
    heads = len(term.slopes) if isinstance(term, Distance) else term.table.shape[0]
    dtype = term.dtype if isinstance(term, Distance) else term.table.dtype
    size = max(term.q.coords.shape[0], term.k.coords.shape[0]) * heads * pairs * dtype.itemsize
    return Dense(term.dense()) if size <= BUDGET else term
