"""The public contract: what every encoding must do, so that models work with any of them.

    from vit2dpe.testing import check_encoding
    check_encoding("rope")                                  # a name in ENCODINGS, with options too
    check_encoding(MyEncoding)                              # a class, whose `heads`, `dim`, `grid`, ... are given to it
    check_encoding(lambda dims: MyEncoding(dims.heads))     # or anything that builds one
    check_encoding(MyEncoding(3))                           # or one that is built

Each promise is one function below; a broken one raises `ContractError` that says which, for how many axes, and by how
much. Grids are never square, so rows and columns cannot be exchanged unseen.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # documented, and has no other name

from .attention.contract import contract, probed
from .attention.functional import rotate
from .encodings import Dims, NoPosition, PositionEncoding
from .encodings.base import terms
from .encodings.makers import Encoding, Make, makers
from .positions import Positions
from .signal import Signal

GRIDS: dict[int, tuple[int, ...]] = {1: (7,), 2: (3, 5), 3: (2, 3, 4)}


class ContractError(AssertionError):
    """A promise that an encoding does not keep."""


def check_encoding(encoding: Encoding, axes: Sequence[int] | None = None) -> None:
    """Prove the contract for an encoding on lines, non-square grids and volumes.

    Args:
        encoding: a spec; an encoding, which is copied and not altered; its class, whose arguments are filled in by
            their names (`dims`, or `dim`, `width`, `heads`, `head_dim`, `axes`, `grid`, `block`, `depth`); or a
            function from Dims to an encoding.
        axes: for which numbers of axes its idea exists; by default 1, 2 and 3, of an encoding that is built those
            that it accepts.

    Raises:
        ContractError: for the first promise that is broken.
        ConfigError: for anything else than an encoding or what builds one.
    """
    for make, dims in makers(encoding, {d: GRIDS[d] for d in axes or GRIDS}, skip=axes is None):
        for promise in PROMISES:
            torch.manual_seed(0)
            try:
                promise(make, dims)
            except ContractError as error:
                raise ContractError(f"{encoding}, {dims.axes} axes: {error}") from None


def fills_what_it_gives(make: Make, dims: Dims) -> None:
    """Exactly the fields it declares, in shapes that broadcast over the batch."""
    encoding, at = _drawn(make, dims), Positions.grid(dims.grid)
    n, signal = at.coords.shape[1], encoding(at)
    fields = {"token": signal.token, "rotation": signal.q_rotation, "bias": signal.bias or None}
    filled = {name for name, value in fields.items() if value is not None}
    _require(filled == set(encoding.gives), f"gives {sorted(filled)}, declares {sorted(encoding.gives)}")
    for name, tensor in tensors(signal).items():
        if name == "token":
            ok = tensor.shape == (1, n, dims.width)
        elif name.startswith("bias"):
            ok = tensor.shape == (1, dims.heads, n, n)
        else:
            ok = tensor.shape in ((1, 1, n, dims.head_dim // 2), (1, dims.heads, n, dims.head_dim // 2))
        _require(ok, f"{name} has shape {tuple(tensor.shape)} for {n} tokens")
        _require(tensor.dtype == torch.float32, f"{name} is {tensor.dtype}, tables are float32")
        _require(bool(tensor.isfinite().all()), f"{name} is not finite")
    _require(bool(encoding.policies), "names no resolution policy")


def leaves_prefix_alone(make: Make, dims: Dims) -> None:
    """Prefix tokens get no token row, the identity rotation and no bias; the others are as without prefix."""
    encoding, at = _drawn(make, dims), Positions.grid(dims.grid)
    plain, behind = tensors(encoding(at)), tensors(encoding(at.with_prefix(2)))
    for name, tensor in behind.items():
        idle = 1.0 if name.endswith("cos") else 0.0
        if name.startswith("bias"):
            edges, rest = torch.cat([tensor[..., :2, :].flatten(), tensor[..., :2].flatten()]), tensor[..., 2:, 2:]
        else:
            edges, rest = tensor[..., :2, :], tensor[..., 2:, :]
        _require(bool((edges == idle).all()), f"{name} touches the prefix")
        _same(rest, plain[name], f"{name} changes behind a prefix")


def subset_is_gather(make: Make, dims: Dims) -> None:
    """The Signal of some tokens, in any order, shared or per sample, is the gather of the whole; queries and keys may
    differ."""
    encoding, at = _drawn(make, dims), Positions.grid(dims.grid)
    n, whole = at.coords.shape[1], probed(encoding(at))
    q = torch.stack([torch.randperm(n)[: n - 2] for _ in range(2)])  # (B, K), per sample
    k = torch.stack([torch.randperm(n)[: n - 1] for _ in range(2)])  # of keys some are missing too
    parts = {"per sample": (q, k), "shared": (q[:1], k[:1])}
    for name, (qi, ki) in parts.items():
        taken = (at.take(qi), at.take(ki)) if name == "per sample" else (at.take(qi[0]), at.take(ki[0]))
        expected = tensors(_gather(whole, qi, ki))
        for field, tensor in tensors(encoding(*taken)).items():
            _same(tensor, expected[field], f"{field} of a {name} subset is not the gather of the whole")


def relative_as_declared(make: Make, dims: Dims) -> None:
    """Moving all tokens together changes no logit between them if `relative` is declared, and some if not."""
    encoding, at = _drawn(make, dims).double(), Positions.grid(dims.grid)
    inner = (at.coords[0] < torch.tensor(dims.grid) - 1).all(-1).nonzero().flatten()
    here = at.take(inner) if len(inner) > 1 else at
    steps = [1.0, 0.375] if encoding.continuous else [1.0]
    for axis in range(at.axes):
        for step in steps:
            move = torch.zeros(at.axes)
            move[axis] = step
            there = Positions(here.coords + move, here.extent)
            change = (_logits(encoding(here), dims) - _logits(encoding(there), dims)).abs().max().item()
            if encoding.relative:
                _require(change < 1e-9, f"is declared relative, but a shift by {step} changes logits by {change:.1e}")
            else:
                _require(change > 1e-9, "is not declared relative, but a shift changes nothing")


def takes_fractions_as_declared(make: Make, dims: Dims) -> None:
    """Fractional places give finite values close to those of their neighbours, or are refused.

    From a whole place to the next one, the first and the last step of the way included: what is read between the
    entries of a table meets both of them. What comes into sight or leaves it (a bias of -1e9) is no jump.
    """
    encoding, at = _drawn(make, dims), Positions.grid(dims.grid)
    if not encoding.continuous:
        _raises(lambda: tensors(encoding(_moved(at, 0.25))), "fractional places are not refused")
        return
    inner = at.take((at.coords[0] < torch.tensor(dims.grid) - 1).all(-1).nonzero().flatten())
    for some, start in ((inner, 0.0), (at, 0.25), (inner, 1 - 2**-12)):
        ways = [_moved(some, start + step) for step in (0.0, 2**-12)]
        for q in (None, some):  # with them, and past queries that stay
            here, near = (tensors(encoding(way if q is None else q, way)) for way in ways)
            for name, tensor in here.items():
                _require(bool(tensor.isfinite().all()), f"{name} is not finite at fractional places")
                seen = (tensor - near[name]).abs() * ((tensor > -1e8) & (near[name] > -1e8))
                jump = seen.max().item() if seen.numel() else 0.0
                _require(jump < 0.05, f"{name} jumps by {jump:.2g} over 1/4096 of a patch from {start:g} on")


def keeps_its_precision(make: Make, dims: Dims) -> None:
    """Tables are those of float64, cast once; half precision and autocast around them change no bit."""
    encoding = _drawn(make, dims)
    ends = any(part.resizes for part in terms(encoding))  # a table, which has no place 300
    at = Positions.grid(dims.grid)
    at = at if not encoding.continuous else _moved(at, 0.25 if ends else 300.0)
    exact = Positions(at.coords.double(), at.extent)
    tables = tensors(encoding(at))
    with _Float64():
        truth = tensors(copy.deepcopy(encoding).double()(exact))
    learned = any(True for _ in encoding.parameters())
    for name, tensor in tables.items():
        # A learned encoding computes in its parameters' float32 (docs/decisions/0002): a few roundings of its largest
        # value, and of its angle, which grows with the coordinates.
        size = truth[name].abs().clamp(min=1)
        if learned:
            size = size.max() + (float(at.coords.abs().max()) * at.axes if encoding.continuous else 0)
        error = ((tensor.double() - truth[name]).abs() / size).max().item()
        # Rotations of a sum are multiplied in float32, each of them rounded already.
        _require(
            error <= (4e-6 if learned else 1e-7 * len(terms(encoding))), f"{name} is off by {error:.1e} against float64"
        )
    for name, tensor in tensors(copy.deepcopy(encoding).double()(at)).items():
        _require(tensor.dtype == torch.float64, f"{name} of a .double() module is {tensor.dtype}")
    with torch.autocast("cpu", torch.bfloat16):
        _identical(tables, tensors(encoding(at)), "under autocast")
    if not learned:
        _identical(tables, tensors(encoding.bfloat16().float()(at)), "after .bfloat16().float()")


def learns(make: Make, dims: Dims) -> None:
    """Every parameter gets a gradient, and the right one; what gets none does not depend on them."""
    encoding, at = _drawn(make, dims).double(), Positions.grid(dims.grid)
    named = {name: p for name, p in encoding.named_parameters() if p.requires_grad}
    if not named:
        return
    values = tuple(p.detach().clone().requires_grad_() for p in named.values())

    def outputs(*parameters: Tensor) -> dict[str, Tensor]:
        signal = torch.func.functional_call(encoding, dict(zip(named, parameters, strict=True)), (at,))
        return tensors(signal)

    here, there = outputs(*values), outputs(*(x.detach() + 0.1 * torch.randn_like(x) for x in values))
    learned = [name for name, t in here.items() if t.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(values)
    if learned:
        total = torch.stack([(here[name] * torch.randn_like(here[name])).sum() for name in learned]).sum()
        grads = torch.autograd.grad(total, values, allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        _require(grad is not None and bool(grad.any()), f"parameter {name} gets no gradient")
    for name in here.keys() - set(learned):  # which gradcheck does not take
        _require(torch.equal(here[name], there[name]), f"gradients are wrong: {name} has none, and depends on them")

    def differentiable(*parameters: Tensor) -> tuple[Tensor, ...]:
        given = outputs(*parameters)
        return tuple(given[name] for name in learned)

    try:
        torch.autograd.gradcheck(differentiable, values, fast_mode=True)
    except RuntimeError as error:
        raise ContractError(f"gradients are wrong: {error}") from None


def survives_copies(make: Make, dims: Dims) -> None:
    """state_dict, deepcopy, pickle, and a build on the meta device that is loaded later: all give the same tables."""
    encoding, at = _drawn(make, dims), Positions.grid(dims.grid)
    tables = tensors(encoding(at))
    again = make(dims).eval()
    again.load_state_dict(encoding.state_dict())
    _identical(tables, tensors(again(at)), "after a state_dict round trip")
    _identical(tables, tensors(copy.deepcopy(encoding)(at)), "after deepcopy")
    _identical(tables, tensors(pickle.load(io.BytesIO(pickle.dumps(encoding)))(at)), "after pickling")
    with torch.device("meta"):
        empty = make(dims).eval()
    empty.to_empty(device="cpu").load_state_dict(encoding.state_dict())
    _identical(tables, tensors(empty(at)), "after a build on the meta device")
    if not any(True for _ in encoding.parameters()):
        _require(not list(encoding.buffers()), "learns nothing, but has buffers")
    wider = make(replace(dims, grid=tuple(size + 3 for size in dims.grid))).eval()
    shapes = [[p.shape for p in one.parameters()] for one in (encoding, wider)]
    if shapes[0] == shapes[1]:  # nothing to resize, so nothing may change
        wider.load_state_dict(encoding.state_dict())
        _identical(tables, tensors(wider(at)), "in a build for another grid (what depends on it belongs in the state)")


def compiles_whole(make: Make, dims: Dims) -> None:
    """torch.compile traces it without a break."""
    encoding, at = _drawn(make, dims), Positions.grid(dims.grid).with_prefix(1)
    torch.compiler.reset()
    compiled = torch.compile(lambda where: tensors(encoding(where)), fullgraph=True, backend="aot_eager")
    expected = tensors(encoding(at))
    for name, tensor in compiled(at).items():
        _same(tensor, expected[name], f"{name} differs when compiled")


def has_no_memory(make: Make, dims: Dims) -> None:
    """Two calls are equal, and instances of other sizes do not touch each other."""
    encoding, at = _drawn(make, dims), Positions.grid(dims.grid)
    first = tensors(encoding(at))
    larger = tuple(size + 2 for size in dims.grid)
    other = make(Dims(2 * dims.width, 2 * dims.heads, larger, depth=dims.depth)).eval()
    other(Positions.grid(larger))
    encoding(Positions.grid(larger))
    _identical(first, tensors(encoding(at)), "at a second call")
    with_none = tensors((encoding + NoPosition())(at))
    _identical(first, with_none, "when `none` is added")


def names_wrong_sizes(make: Make, dims: Dims) -> None:
    """Positions of another number of axes raise a ValueError naming both, or count in full."""
    encoding, at = _drawn(make, dims), Positions.grid((*dims.grid, 2))
    try:
        here = tensors(encoding(at))
    except ValueError as error:
        both = str(dims.axes) in str(error) and str(dims.axes + 1) in str(error)
        _require(both, f"the error for {dims.axes + 1} axes instead of {dims.axes} does not name both: {error}")
        return
    coords = at.coords.clone()
    coords[..., -1] *= 3
    if here:
        moved = tensors(encoding(Positions(coords, at.extent)))
        _require(any(not torch.equal(here[name], moved[name]) for name in here), "an additional axis is ignored")


PROMISES: list[Callable[[Make, Dims], None]] = [
    fills_what_it_gives,
    leaves_prefix_alone,
    subset_is_gather,
    relative_as_declared,
    takes_fractions_as_declared,
    keeps_its_precision,
    learns,
    survives_copies,
    compiles_whole,
    has_no_memory,
    names_wrong_sizes,
]


def tensors(signal: Signal) -> dict[str, Tensor]:
    """The tensors of a Signal by name, bias terms in full, contextual ones for fixed queries and keys (`probed`)."""
    fields: dict[str, Tensor | None] = {"token": signal.token}
    for name, rotation in (("q_rotation", signal.q_rotation), ("k_rotation", signal.k_rotation)):
        if rotation is not None:
            fields |= {f"{name}.cos": rotation.cos, f"{name}.sin": rotation.sin}
    fields |= {f"bias[{i}]": term.dense() for i, term in enumerate(probed(signal).bias)}
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


class _Float64(TorchDispatchMode):
    """Within it everything is computed in float64, whatever the code casts to: a reference that shares no rounding."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*map(_double, args), **{name: _double(value) for name, value in (kwargs or {}).items()})


def _double(value):  # tensors, dtypes, and sequences of them are changed; any other argument is not
    """An argument of an operation in float64."""
    if isinstance(value, list | tuple):
        return type(value)(map(_double, value))
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def randomise(module: nn.Module) -> nn.Module:
    """Draw every parameter from N(0, 1/4): what is zero at initialisation must not hide a fault."""
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return module


def _drawn(make: Make, dims: Dims) -> PositionEncoding:
    encoding = make(dims).eval()
    randomise(encoding)
    return encoding


def _moved(at: Positions, step: float) -> Positions:
    return Positions(at.coords + step, at.extent, at.prefix)


def _gather(signal: Signal, q: Tensor, k: Tensor) -> Signal:
    """The whole Signal (batch 1) at queries q and keys k, both (B, K)."""

    def rows(tensor: Tensor, index: Tensor) -> Tensor:  # (1, ..., N, C) -> (B, ..., K, C)
        return torch.cat([tensor[..., i, :] for i in index])

    def rotation(whole, index):
        return None if whole is None else type(whole)(rows(whole.cos, index), rows(whole.sin, index))

    from .signal import Dense

    return Signal(
        token=None if signal.token is None else rows(signal.token, q),
        q_rotation=rotation(signal.q_rotation, q),
        k_rotation=rotation(signal.k_rotation, k),
        bias=tuple(
            Dense(torch.cat([term.dense()[:, :, i][..., j] for i, j in zip(q, k, strict=True)])) for term in signal.bias
        ),
    )


def _logits(signal: Signal, dims: Dims) -> Tensor:
    """q·k + bias for fixed random tokens and projections, float64."""
    generator = torch.Generator().manual_seed(1)
    some = next(iter(tensors(signal).values()), None)
    n = 1 if some is None else some.shape[-2]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(1, n, dims.width) + (0 if signal.token is None else signal.token)
    q, k = ((x @ draw(dims.width, dims.width)).unflatten(-1, (dims.heads, -1)).transpose(1, 2) for _ in range(2))
    signal = contract(signal, q, k)
    if signal.q_rotation is not None and signal.k_rotation is not None:
        q, k = rotate(q, signal.q_rotation), rotate(k, signal.k_rotation)
    logits = q @ k.transpose(-1, -2)
    for term in signal.bias:
        logits = logits + term.dense()
    return logits


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def _same(a: Tensor, b: Tensor, message: str) -> None:
    _require(a.shape == b.shape, f"{message}: {tuple(a.shape)} against {tuple(b.shape)}")
    worst = (a - b).abs().max().item() if a.numel() else 0.0
    _require(worst <= 2e-6 * max(1.0, b.abs().max().item()), f"{message} (by {worst:.1e})")


def _identical(a: dict[str, Tensor], b: dict[str, Tensor], when: str) -> None:
    for name, tensor in a.items():
        _require(torch.equal(tensor, b[name]), f"{name} is not the same {when}")


def _raises(call: Callable[[], object], message: str) -> None:
    try:
        call()
    except ValueError:
        return
    raise ContractError(message)
