"""The contract of an encoding: a pure function from where tokens are to what attention should do about it.

An author overrides one or more of three hooks and declares four facts; `forward` is final. It asks the hooks,
applies the rule for prefix tokens in one place (no token row, identity rotation, no bias), takes cosine and
sine once in float64 and casts once. Nothing is cached: a second call computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import reduce
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..positions import Positions
from ..signal import Bias, Dense, LinearAngles, Rotation, Signal


class Policy(Protocol):
    """What a change of resolution does to an encoding; the policies live in `vit2dpe.resolution.policies`."""

    @property
    def name(self) -> str: ...

    def place(self, at: Positions) -> Positions:
        """The places that the encoding shall see instead of `at`."""
        ...

    def rescale(self, frequencies: Tensor, extent: tuple[int, ...]) -> Tensor:
        """The rotary frequencies (d, 1|H, Dh/2) that serve a grid of this extent."""
        ...


class Temperature(Protocol):
    """A factor on the logits that depends on how many keys there are; a 0-d tensor while a graph is traced."""

    def __call__(self, extent: tuple[int, ...]) -> float | Tensor: ...


class Keeper(Protocol):
    """Keeps the Signals of an encoding for as long as it is frozen; see `vit2dpe.frozen`."""

    def signal(self, encoding: PositionEncoding, q: Positions, k: Positions) -> Signal: ...


class PositionEncoding(nn.Module):
    """Base class: override `token`, `angle` or `bias`; declare the facts; never override `forward`.

    Facts, each proved by `vit2dpe.testing.check_encoding`:
        relative: moving all tokens that have a place together changes no logit between them.
        continuous: fractional coordinates are accepted.
        per_block: every block of a model owns an instance (learned per layer) instead of sharing one.
        gives: which fields of the Signal it fills, of "token", "rotation", "bias".
        policies: what it can do at another resolution, the default first.
    """

    relative: bool = False
    continuous: bool = True
    per_block: bool = False
    gives: frozenset[str] = frozenset()
    policies: tuple[str, ...] = ("extrapolate",)

    def __init__(self) -> None:
        super().__init__()
        self.policy: Policy | None = None  # set for a while by vit2dpe.use_policy, for good by set_policy
        self.own_policy: Policy | None = None  # what "default" means, set by set_policy
        self.temperature: Temperature | None = None  # likewise, on one encoding of a model
        self.kept: Keeper | None = None  # set for a while by vit2dpe.frozen
        self.dtype = torch.float32  # of the tables; float64 after .double()

    def token(self, at: Positions) -> Tensor | None:
        """(B|1, N, D) to be added to tokens that have a place."""
        return None

    def angle(self, at: Positions) -> Tensor | LinearAngles | None:
        """(B|1, 1|H, N, Dh/2) radians, float64 for a formula, for tokens that have a place; or LinearAngles, whose
        `dense()` is that."""
        return None

    def bias(self, q: Positions, k: Positions) -> Tensor | Bias | None:
        """(B|1, H, Nq, Nk), finite or -inf, to be added to the logits between tokens that have a place, or a Bias
        term."""
        return None

    def perturb(self, at: Positions) -> Callable[[Positions], Positions] | None:
        """In training, a random map of places, drawn once a forward from the global generator; else None."""
        return None

    def reset_parameters(self) -> None:
        """Draw learned parameters anew. Formulas have none."""

    def set_grid(self, grid: tuple[int, ...]) -> None:
        """Make another grid the one that tables are learned on. Formulas have nothing to change."""

    @final  # type: ignore[misc]
    def forward(self, q: Positions, k: Positions | None = None) -> Signal:
        """The Signal for queries at q and keys at k (default: the same places)."""
        k = q if k is None else k
        with _full_precision(q.coords.device.type):
            if self.kept is not None and not (
                self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
            ):
                return self.kept.signal(self, q, k)
            return self._signal(q, k)

    def _signal(self, q: Positions, k: Positions) -> Signal:
        same, temperature = q is k, self._temperature(k)
        moves: list[Callable[[Positions], Positions]] = [] if self.policy is None else [self.policy.place]
        if self.training and (perturb := self.perturb(q)) is not None:
            moves.append(perturb)
        for move in moves:
            q, k = move(q), k if same else move(k)
        k = q if same else k
        q_rotation = self._rotation(q)
        return Signal(
            token=self._token(q),
            q_rotation=q_rotation,
            k_rotation=q_rotation if same else self._rotation(k),
            bias=self._bias(q, k),
            temperature=temperature,
        )

    def _temperature(self, k: Positions) -> float | Tensor | None:
        return None if self.temperature is None else self.temperature(k.extent)

    def _token(self, at: Positions) -> Tensor | None:
        token = self.token(at)
        if token is None:
            return None
        return F.pad(token.to(at.coords.device, self.dtype), (0, 0, at.prefix, 0))

    def _rotation(self, at: Positions) -> Rotation | None:
        angle = self.angle(at)
        return None if angle is None else Rotation.of(angle, self.dtype, at.coords.device, at.prefix)

    def _bias(self, q: Positions, k: Positions) -> tuple[Bias, ...]:
        bias = self.bias(q, k)
        if bias is None:
            return ()
        if not isinstance(bias, Tensor):
            return (bias,)  # a term that applies the rule for the prefix itself
        return (Dense(F.pad(bias.to(q.coords.device, self.dtype), (k.prefix, 0, q.prefix, 0))),)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # A formula has nothing that .double() could cast, so it asks what would have happened to a table.
        probe = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        self.dtype = torch.float64 if probe.dtype == torch.float64 else torch.float32
        return self

    def __add__(self, other: PositionEncoding) -> PositionEncoding:
        if not isinstance(other, PositionEncoding):
            return NotImplemented
        return Sum([*terms(self), *terms(other)])


class Sum(PositionEncoding):
    """Several encodings at once; its Signal is the sum of theirs."""

    def __init__(self, encodings: Iterable[PositionEncoding]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(encodings)
        parts: list[PositionEncoding] = list(self.terms)  # type: ignore[arg-type]
        if not parts:
            raise ConfigError("a sum needs at least one encoding; no position is `none`")
        self.gives = frozenset().union(*(part.gives for part in parts))
        active = [part for part in parts if part.gives] or parts[:1]
        common = tuple(p for p in active[0].policies if all(p in part.policies for part in active))
        self.policies = common or ("default",)  # each part does what it does by itself
        self.relative = all(part.relative for part in parts)
        self.continuous = all(part.continuous for part in parts)
        self.per_block = all(part.per_block for part in parts)

    def reset_parameters(self) -> None:
        for part in self.terms:
            part.reset_parameters()  # type: ignore[operator]

    def _signal(self, q: Positions, k: Positions) -> Signal:
        start = Signal(temperature=self._temperature(k))
        return reduce(Signal.plus, (part(q, k) for part in self.terms), start)


class OnGrid(PositionEncoding):
    """An encoding whose formula has a constant of the grid it is trained on; `set_grid` leaves it alone.

    The grid is in the state_dict (`_extra_state`, (d,) integers), as that of a table is in its shape: another size, or
    a model built for another one, does not change the function that was trained. (docs/decisions/0007)
    """

    grid: tuple[int, ...]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.grid, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        if len(state) != len(self.grid):
            raise CheckpointError(
                f"{type(self).__name__} was trained on a grid of {len(state)} axes, this one is for {len(self.grid)}"
            )
        self.grid = tuple(int(size) for size in state)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Weights of others do not say it: then what the model was built for stands.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)


class NoPosition(PositionEncoding):
    """`none`: the empty Signal. Attention then sees a set: permuting tokens permutes outputs."""

    relative = True


def terms(encoding: PositionEncoding) -> list[PositionEncoding]:
    """The encodings a sum is made of, or the one encoding."""
    return list(encoding.terms) if isinstance(encoding, Sum) else [encoding]  # type: ignore[arg-type]


def _full_precision(device: str):
    """Geometry is never computed in half precision, autocast or not."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
