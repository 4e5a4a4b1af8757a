"""`with frozen(model):` the encodings of a model keep the Signals they made, for inference at the same places again.

Outside of it nothing is kept. Inside, a Signal is found again by the places themselves (compared, not by a shape), the
policy and the temperature; and at the first encoding of every forward all their parameters are compared with what they
were, so that nothing stale is used: not after an optimizer's step, an assignment to `.data`, `load_state_dict` or
`.to()`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ConfigError, not_ours
from ..grids import Extent
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
    kept = Frozen(encodings)
    with overriding(Overrides(caches={encoding: SignalCache(kept) for encoding in encodings})), kept.watching(model):
        yield model


class _Forward(threading.local):
    """Of this thread: whether parameters were compared since a forward of the model began; None: outside of one."""

    compared: bool | None = None


class Frozen:
    """What the encodings of one context have in common: their parameters as they were, and the places seen.

    On a GPU a comparison makes the host wait. All parameters are compared at once at the first encoding of a forward of
    the model, and places once for all encodings that are handed them. An encoding that is called outside of a forward
    has its own parameters compared each time.
    """

    def __init__(self, encodings: Iterable[PositionEncoding]) -> None:
        self.parameters = {
            encoding: {name: p.detach().clone() for name, p in encoding.named_parameters()} for encoding in encodings
        }
        self.places: list[Positions] = []
        self.forward = _Forward()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within it, `forward` follows the forwards of the model."""

        begin, end = partial(_follow, self, False), partial(_follow, self, None)
        hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __reduce__(self) -> tuple[type[Frozen], tuple[tuple[()]]]:
        """A model that is pickled or copied inside of the context has its hooks, and nothing that was kept."""
        return Frozen, ((),)

    def check(self, encoding: PositionEncoding) -> None:
        """Refuse parameters that have changed."""
        if self.forward.compared:
            return
        inside = self.forward.compared is not None
        pairs = {
            (one, name): (then.get(name), now)
            for one, then in self.parameters.items()
            if inside or one is encoding
            for name, now in one.named_parameters()
        }
        if not _all_equal(pairs.values()):
            owner, name = next(key for key, pair in pairs.items() if not _all_equal([pair]))
            raise ConfigError(
                f"{name} of {type(owner).__name__} changed inside `with frozen(model):`, what is kept would be "
                "stale; leave the context before changing parameters"
            )
        if inside:
            self.forward.compared = True

    def known(self, at: Positions) -> Positions:
        """The first Positions that were seen with these places."""
        return at.memoize(("frozen", self), lambda: self._find(at))

    def _find(self, at: Positions) -> Positions:
        found = next((old for old in self.places if _same(at, old)), None)
        if found is None:
            self.places.append(found := at)
        return found


def _follow(kept: Frozen, compared: bool | None, *_: object) -> None:
    """Around a forward of the model: a hook."""
    if not torch.compiler.is_compiling():
        kept.forward.compared = compared


class SignalCache:
    """The Signals of one encoding, with what they were made from."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = frozen
        self.signals: list[tuple[Positions, Positions, bool, State, Signal]] = []

    def signal(self, encoding: PositionEncoding, q: Positions, k: Positions) -> Signal:
        """The Signal for these places, made at the first call."""
        self.frozen.check(encoding)
        grid: tuple[int, ...] | None = getattr(encoding, "grid", None)
        inference = torch.is_inference_mode_enabled()
        state: State = (encoding.policy, encoding.temperature, encoding.dtype, grid, inference)
        of_q, of_k = self.frozen.known(q), self.frozen.known(k)
        for old_q, old_k, same, old_state, signal in self.signals:
            if old_q is of_q and old_k is of_k and same == (q is k) and old_state == state:
                return signal
        signal = encoding._signal(q, k)
        signal = signal.with_bias(tuple(_settle(term) for term in signal.bias))
        self.signals.append((of_q, of_k, q is k, state, signal))
        return signal


def _all_equal(pairs: Collection[tuple[Tensor | None, Tensor]]) -> bool:
    """Whether all tensors are what they were, bit for bit; on a GPU by one read for each dtype and device."""
    together: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for then, now in pairs:
        if then is None or then.dtype != now.dtype or then.device != now.device or then.shape != now.shape:
            return False
        together.setdefault((now.dtype, now.device), []).append((then, now.detach()))
    for (_, device), group in together.items():
        if device.type != "cpu" and len(group) > 1:
            sides = zip(*group, strict=True)
            flat, flat_now = (torch.cat([one.flatten() for one in side]) for side in sides)
            group = [(flat, flat_now)]
        if not all(torch.equal(then, now) for then, now in group):
            return False
    return True


def _same(a: Positions, b: Positions) -> bool:
    """Whether places are the same; those that share their coordinates are not compared."""
    x, y = a.coords, b.coords
    one_kind = x.device == y.device and x.dtype == y.dtype and x.shape == y.shape
    return (
        _equal(a.extent, b.extent)
        and _equal(a.valid, b.valid)
        and _equal(a.segment, b.segment)
        and (a.box, a.spacing) == (b.box, b.spacing)
        and a.prefix == b.prefix
        and one_kind
        and (x is y or torch.equal(x, y))
    )


def _equal(a: Extent | None, b: Extent | None) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device == b.device and torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)


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
