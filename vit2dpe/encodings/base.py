"""The contract of an encoding: a pure function from where tokens are to what attention should do about it.

An author overrides one or more of three hooks and declares facts; `forward` is final. It calls the hooks,
applies the resolution policy and the rule for prefix tokens in one place (no token row, identity rotation, no bias),
takes cosine and sine once in float64 and casts once. Nothing is cached: a second call computes again.

What a context sets for a while (`vit2dpe.use_policy`, `vit2dpe.frozen`) is held by the thread or asyncio task that
entered it (`overriding`), never by the encoding: another thread that runs the same model at the same time sees nothing
of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..grids import Extent, Span
from ..packed import joined
from ..positions import Positions, is_tracing
from ..signal import Bias, Dense, Rotation, Signal
from .along import Along


class Policy(Protocol):
    """What an encoding does at another resolution; the policies are in `vit2dpe.resolution.policies`."""

    @property
    def name(self) -> str: ...

    def __hash__(self) -> int: ...

    def place(self, at: Positions) -> Positions:
        """The places that the encoding is evaluated at instead of `at`."""
        ...

    def rescale(self, frequencies: Tensor, span: Span) -> Tensor:
        """The rotary frequencies (d, 1|H, Dh/2) that serve a grid that covers this span; (d, B|1, N|1, 1|H, Dh/2) of
        grids by sample."""
        ...

    def resize(self, table: Tensor, sizes: tuple[int, ...], own: str, axis: int) -> Tensor:
        """A table (C, *old) at other sizes; see `tables.fitted`."""
        ...

    def resized_to(self, grid: Tensor, old: tuple[int, ...], own: str, axis: int) -> tuple[str, Tensor]:
        """How, and to what sizes, it would be resized for grids of sizes (..., d); see `mixed.fit_of`."""
        ...


class Temperature(Protocol):
    """A factor on the logits that depends on how many keys there are; a 0-d tensor while a graph is traced. Of sizes
    (B|1, N|1, d) of each token it is (B|1, N|1)."""

    def __call__(self, extent: Extent) -> float | Tensor: ...


class Cache(Protocol):
    """The Signals of an encoding that is frozen; see `vit2dpe.frozen`."""

    def signal(self, encoding: PositionEncoding, q: Positions, k: Positions) -> Signal: ...


class Angles(Protocol):
    """Angles that are not given as a tensor: `linear.LinearAngles`, `rope.AxialAngles`, `rope.SectionAngles`."""

    def resolve(self, policy: Policy | None, span: Span, prefix: int) -> Tensor | Rotation:
        """Under a policy on a grid that covers this span, behind `prefix` tokens that do not turn.

        Returns:
            angles (B|1, 1|H, P + N, Dh/2), or their rotation where an operation with its own backward makes it.
        """
        ...

    def dense(self) -> Tensor:
        """(B|1, 1|H, N, Dh/2) radians."""
        ...


@dataclass(frozen=True, eq=False)
class Overrides:
    """What one context sets for a while.

    Args:
        policies: of encodings; None: no policy.
        temperatures: of the encodings that lead a part of a model; None: no temperature.
        caches: where frozen encodings keep their Signals.
        window_policies: of the stages of a Swin.
    """

    policies: Mapping[nn.Module, Policy | None] = field(default_factory=dict)
    temperatures: Mapping[nn.Module, Temperature | None] = field(default_factory=dict)
    caches: Mapping[nn.Module, Cache] = field(default_factory=dict)
    window_policies: Mapping[nn.Module, str] = field(default_factory=dict)


class _OfThread(threading.local):
    def __init__(self) -> None:  # no attribute of the class: torch 2.8 would compile that one for every thread
        self.overrides: tuple[Overrides, ...] = ()


# torch before 2.14 cannot trace a ContextVar; there a graph reads the value of the thread.
_TRACEABLE = torch.__version__ >= "2.14"
_OVERRIDES: ContextVar[tuple[Overrides, ...]] = ContextVar("vit2dpe.overrides", default=())
_OF_THREAD = _OfThread()


def overrides() -> tuple[Overrides, ...]:
    """What the contexts of this thread or task set, the innermost first."""
    if torch.compiler.is_compiling() and not _TRACEABLE:
        return _OF_THREAD.overrides
    return _OVERRIDES.get()


@contextmanager
def overriding(settings: Overrides) -> Iterator[None]:
    """Within this context these settings hold, for the thread or asyncio task that entered it.

    Contexts may be left in another order than they were entered. New tasks and `asyncio.to_thread` inherit them,
    threads that a model starts by itself (`DataParallel`) do not.
    """
    _set_overrides((settings, *_OVERRIDES.get()))
    try:
        yield
    finally:
        _set_overrides(tuple(others for others in _OVERRIDES.get() if others is not settings))


def _set_overrides(settings: tuple[Overrides, ...]) -> None:
    _OVERRIDES.set(settings)
    _OF_THREAD.overrides = settings


class PositionEncoding(nn.Module):
    """Base class: override `token`, `angle` or `bias`; declare the facts; never override `forward`.

    Facts; `vit2dpe.testing.check_encoding` proves the first two and `gives`:
        relative: moving all tokens that have a place together changes no logit between them.
        continuous: fractional coordinates are accepted.
        per_block: every block of a model owns an instance (learned per layer); else all share one.
        block_numbers: attributes that are a number of the block's own, each a factor on a tensor; where blocks are
            compiled they are 0-d tensors instead, so that one graph serves all.
        contextual: its bias is contracted with queries or keys (`Contextual`), which `attend` alone can do.
        gives: which fields of the Signal it fills, of "token", "rotation", "bias".
        policies: what it can do at another resolution, the default first.
        resizes: the ways in which its tables can be resized, words of `tables.RESIZES`; () without a table. Where there
            is one, `subtable` serves too, up to its size.
    """

    relative: bool = False
    continuous: bool = True
    per_block: bool = False
    block_numbers: tuple[str, ...] = ()
    contextual: bool = False
    gives: frozenset[str] = frozenset()
    policies: tuple[str, ...] = ("extrapolate",)
    resizes: tuple[str, ...] = ()
    along: Along | None = None  # the axes that it reads, of an instance; None: all

    def __init__(self) -> None:
        super().__init__()
        self.own_policy: Policy | None = None  # set by vit2dpe.set_policy; `policy` is what holds at present
        self.own_temperature: Temperature | None = None
        self.dtype = torch.float32  # of the tables; float64 after .double()

    @property
    def policy(self) -> Policy | None:
        """The resolution policy: that of the innermost `vit2dpe.use_policy`, else this encoding's own."""
        for settings in overrides():
            if self in settings.policies:
                return settings.policies[self]
        return self.own_policy

    @property
    def temperature(self) -> Temperature | None:
        """The length temperature, likewise."""
        for settings in overrides():
            if self in settings.temperatures:
                return settings.temperatures[self]
        return self.own_temperature

    @property
    def cache(self) -> Cache | None:
        """Where Signals are kept: that of the innermost `vit2dpe.frozen`."""
        return next((settings.caches[self] for settings in overrides() if self in settings.caches), None)

    def measures_extent(self) -> bool:
        """Whether the extent of their grid, and not their places alone, decides what tokens get: it resizes a table to
        it, or a policy or a temperature that holds at present scales by it."""
        policy = self.policy
        scaled = policy is not None and policy.name not in ("extrapolate", "resize")
        return scaled or self.temperature is not None or "resize" in self.policies

    def token(self, at: Positions) -> Tensor | None:
        """(B|1, N, D) to be added to tokens that have a place."""
        return None

    def angle(self, at: Positions) -> Tensor | Angles | None:
        """(B|1, 1|H, N, Dh/2) radians, float64 for a formula, for tokens that have a place; or `Angles`, whose
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

    def set_block(self, block: int, depth: int) -> None:
        """Become that of one block, of so many. Most are the same in each."""

    def set_grid(self, grid: tuple[int, ...]) -> None:
        """Make another grid the one that tables are learned on. Formulas have nothing to change.

        A table stays the Parameter that it is (`tables.replace`), so that an optimizer made before trains it.
        """

    @final  # type: ignore[misc]
    def forward(self, q: Positions, k: Positions | None = None) -> Signal:
        """The Signal for queries at q and keys at k (default: the same places)."""
        k = q if k is None else k
        if q.row is not None and k is q:
            return joined(q.row.segments, [self.forward(at) for at in q.row.places])
        with _full_precision(q.coords.device.type):
            if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
                return self._signal(q, k)
            cache = self.cache
            return self._signal(q, k) if cache is None else cache.signal(self, q, k)

    def _signal(self, q: Positions, k: Positions) -> Signal:
        same, policy, temperature = q is k, self.policy, self._temperature(k)
        if self.along is not None:
            q, k = self.along.places(q), k if same else self.along.places(k)
        moves: list[Callable[[Positions], Positions]] = [] if policy is None else [policy.place]
        if self.training and (perturb := self.perturb(q)) is not None:
            moves.append(perturb)
        for move in moves:
            q, k = move(q), k if same else move(k)
        k = q if same else k
        q_rotation = self._rotation(q, policy)
        return Signal(
            token=self._token(q),
            q_rotation=q_rotation,
            k_rotation=q_rotation if same else self._rotation(k, policy),
            bias=self._bias(q, k),
            temperature=temperature,
        )

    def _temperature(self, k: Positions) -> float | Tensor | None:
        if (temperature := self.temperature) is None:
            return None
        factor = temperature(k.sizes() if isinstance(k.extent, Tensor) else k.extent)
        if not isinstance(factor, Tensor) or factor.ndim == 0:
            return factor
        return factor.to(k.coords.device, self.dtype)[:, None, :, None]  # (B|1, 1, N|1, 1)

    def _token(self, at: Positions) -> Tensor | None:
        token = self.token(at)
        if token is None:
            return None
        return F.pad(token.to(at.coords.device, self.dtype), (0, 0, at.prefix, 0))

    def _rotation(self, at: Positions, policy: Policy | None) -> Rotation | None:
        angle = self.angle(at)
        if angle is None:
            return None
        if isinstance(angle, Tensor):
            resolved: Tensor | Rotation = F.pad(angle, (0, 0, at.prefix, 0))
        else:
            one = at.span if at.spacing and not at.by_sample() else at.extent
            span = at.spans(prefix=True) if isinstance(one, Tensor) else one
            resolved = angle.resolve(policy, span, at.prefix)
        return rotation_of(resolved, self.dtype, at.coords.device)

    def _bias(self, q: Positions, k: Positions) -> tuple[Bias, ...]:
        bias = self.bias(q, k)
        if bias is None:
            return ()
        if not isinstance(bias, Tensor):
            return (bias,)  # a term that applies the rule for the prefix itself
        return (Dense(F.pad(bias.to(q.coords.device, self.dtype), (k.prefix, 0, q.prefix, 0))),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionEncoding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no types
        # A formula has nothing that .double() could cast: an empty tensor shows what would happen to a table.
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
        self.policies = common_policies(active)
        self.relative = all(part.relative for part in parts)
        self.continuous = all(part.continuous for part in parts)
        self.per_block = all(part.per_block for part in parts)

    def reset_parameters(self) -> None:
        for part in self.terms:
            part.reset_parameters()  # type: ignore[operator]

    def set_block(self, block: int, depth: int) -> None:
        for part in terms(self):
            part.set_block(block, depth)

    def _signal(self, q: Positions, k: Positions) -> Signal:
        signal = Signal(temperature=self._temperature(k))
        for part in self.terms:
            signal = signal.plus(part(q, k))
        return signal


class NoPosition(PositionEncoding):
    """`none`: the empty Signal. Attention then sees a set: permuting tokens permutes outputs."""

    relative = True


def common_policies(encodings: Sequence[PositionEncoding]) -> tuple[str, ...]:
    """The policies that all encodings can take; "default" first where what they do by themselves differs."""
    first = encodings[0].policies
    common = tuple(p for p in first if all(p in one.policies for one in encodings))
    return common if all(one.policies[0] == first[0] for one in encodings) else ("default", *common)


def terms(encoding: PositionEncoding) -> list[PositionEncoding]:
    """The encodings a sum is made of, or the one encoding."""
    return list(encoding.terms) if isinstance(encoding, Sum) else [encoding]  # type: ignore[arg-type]


def rotation_of(angle: Tensor | Rotation, dtype: torch.dtype, device: torch.device | str) -> Rotation:
    """The rotation by `angle`, in radians.

    Cosine and sine are taken as precise as the angle is, then cast once: the cosine of a float32 angle is off by
    3e-5 at place 1,024.
    """
    if isinstance(angle, Rotation):
        return Rotation(angle.cos.to(device, dtype), angle.sin.to(device, dtype))
    if can_interleave(angle) and angle.device.type == torch.device(device).type:
        turn = torch.complex(angle.cos(), angle.sin()).to(dtype.to_complex())  # both halves in one cast
        cos, sin = torch.view_as_real(turn).unbind(-1)
        return Rotation(cos, sin)
    return interleave(angle.cos().to(device, dtype), angle.sin().to(device, dtype))


def interleave(cos: Tensor, sin: Tensor) -> Rotation:
    """The same numbers side by side in memory, where a kernel reads cos + i sin without a copy."""
    if not can_interleave(cos):
        return Rotation(cos, sin)
    cos, sin = torch.view_as_real(torch.complex(cos, sin)).unbind(-1)
    return Rotation(cos, sin)


def can_interleave(x: Tensor) -> bool:
    """Eager mode, on a device with complex numbers; a traced graph goes on to converters that have none."""
    return not torch.compiler.is_compiling() and not is_tracing() and x.device.type in ("cpu", "cuda")


def _full_precision(device: str) -> AbstractContextManager[None]:
    """Geometry is never computed in half precision, autocast or not."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
