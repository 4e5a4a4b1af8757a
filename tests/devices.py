"""A device that is not there: tensors of the CPU that are labelled with it, and the rules that it would hold them to.

    with Device("mps") as device:
        model.to("mps")(images.to("mps")).sum().backward()

Numbers are real, and so is the backward pass, which fake tensors of a device without a driver do not have. `.device`,
moves and factories answer with the label; each operation, of the backward pass too, is refused where its tensors are
labelled with several devices (0-d numbers of the CPU aside, which torch takes), or where it would make a float64 tensor
on a device that has none.

A label belongs to memory, so that views share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
GENERATOR = torch.Generator
WIDE = (torch.float64, torch.complex128)
ACROSS = ("copy_", "_to_copy", "_foreach_copy_")  # operations whose tensors may be on two devices


class WrongDevice(AssertionError):
    """An operation that the device would not run."""


class Device:
    """Within it, tensors can be on this device.

    Args:
        name: "mps", "cuda", ...
        float64: whether it has float64; default: all have but MPS.
    """

    def __init__(self, name: str, *, float64: bool | None = None) -> None:
        self.device = torch.device(name)
        self.float64 = self.device.type != "mps" if float64 is None else float64
        # Of memory, by its address, which nothing else gets while it is referred to.
        self._labels: dict[int, tuple[torch.device, StorageWeakRef]] = {}
        self._target: torch.device | None = None  # of the tensors that are being made
        self._default = CPU  # of those that are made of no other
        self._stack = ExitStack()

    def __enter__(self) -> Device:
        self._stack.enter_context(mock.patch("torch.Generator", _Generator))
        self._stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", return_value=False))
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, tensor: Tensor) -> torch.device:
        """The device that a tensor is labelled with."""
        with torch._C.DisableTorchFunction():
            if tensor.device.type == "meta":
                return tensor.device
            return self._labels.get(tensor.untyped_storage()._cdata, (CPU, None))[0]

    def label(self, tensor: Tensor, device: torch.device) -> None:
        with torch._C.DisableTorchFunction():
            if tensor.device.type != "meta":
                memory = tensor.untyped_storage()
                self._labels[memory._cdata] = device, StorageWeakRef(memory)

    @contextmanager
    def making(self, device: torch.device | None, *, only_from_nothing: bool = False) -> Iterator[None]:
        """What is made meanwhile is on this device; or what is made of no other tensor."""
        before = self._target, self._default
        if only_from_nothing:
            self._default = device or CPU
        else:
            self._target = device
        try:
            yield
        finally:
            self._target, self._default = before

    def check(self, name: str, tensors: list[Tensor], made: list[Tensor], generators: list[torch.Generator]) -> None:
        """Refuse an operation, or label what it made."""
        # 0-d numbers of the CPU go with any device.
        devices = {self.of(x) for x in tensors if x.ndim or self.of(x) != CPU} or {self.of(x) for x in tensors}
        devices.discard(torch.device("meta"))
        if len(devices) > 1 and name not in ACROSS:
            kinds = [f"{self.of(x)} {x.dtype} {tuple(x.shape)}" for x in tensors]
            raise WrongDevice(f"{name} mixes devices: {', '.join(kinds)}")
        target = self._target or next(iter(devices), self._default)
        if name == "copy_":
            target = self.of(tensors[0])
        for generator in generators:
            if generator.device.type != target.type:
                raise WrongDevice(f"{name} draws on {target} from a generator of {generator.device}")
        # A copy changes the dtype on the device that it comes from.
        places = (target, *(devices if name in ACROSS else ()))
        lacking = [] if self.float64 else [place for place in places if place.type == self.device.type]
        for tensor in made:
            if tensor.dtype in WIDE and lacking:
                raise WrongDevice(f"{name} makes {tensor.dtype} {tuple(tensor.shape)}, of which {lacking[0]} has none")
            self.label(tensor, target)


class _Generator(torch.Generator):
    """One of the CPU under another label."""

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        return super().__new__(cls)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._label = torch.device(device)

    device = property(lambda self: self._label)


class _Operations(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.of = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            leaves = tree_leaves((args, kwargs))
            tensors = [x for x in leaves if isinstance(x, Tensor)]
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            generators = [x for x in leaves if isinstance(x, GENERATOR)]
        self.of.check(function.overloadpacket.__name__, tensors, made, generators)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.of = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == _DEVICE:  # `is` fails: a new one at each look
            return self.of.of(args[0])
        if (kind := _KIND.get(function)) is not None:
            return self.of.of(args[0]).type == kind
        if function in (Tensor.numpy, Tensor.__array__) and self.of.of(args[0]) != CPU:
            raise WrongDevice(f"numpy reads {self.of.of(args[0])}")
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(function, *args, **kwargs)
        if function is Tensor.__deepcopy__:
            copied = function(*args, **kwargs)
            self.of.label(copied, self.of.of(args[0]))
            return copied
        if kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            if device.type == "meta":
                return function(*args, device="meta", **kwargs)
            with self.of.making(device):
                return function(*args, device="cpu", **kwargs)
        if function is Tensor.backward:
            with self:  # the code of a backward pass runs under these rules too
                return _backward(*args, **kwargs)
        if function is Tensor.new_tensor:
            with self.of.making(self.of.of(args[0])):
                return function(*args, **kwargs)
        # What a function makes by itself lies beside its first argument.
        beside = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
        with self.of.making(beside if beside is None else self.of.of(beside), only_from_nothing=True):
            return function(*args, **kwargs)

    def _move(self, function: Callable[..., Tensor], tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if function is not Tensor.to:
            args, kwargs = ("cpu" if function is Tensor.cpu else "cuda",), {}
        kwargs.pop("copy", None)
        if args and isinstance(args[0], Tensor):
            device, dtype, channels = self.of.of(args[0]), args[0].dtype, None
        else:
            device, dtype, _, channels = torch._C._nn._parse_to(*args, **kwargs)
        here = self.of.of(tensor)
        device = here if device is None else device
        if device == here or "meta" in (device.type, here.type):
            place = {"device": device} if device.type == "meta" else {}
            more = {} if channels is None else {"memory_format": channels}
            return tensor.to(dtype=dtype or tensor.dtype, **more, **place)
        return _Move.apply(tensor, self.of, here, device, dtype or tensor.dtype)


_DEVICE = Tensor.device.__get__
_KIND = {getattr(Tensor, f"is_{kind}").__get__: kind for kind in ("cuda", "mps", "xpu", "cpu")}


def _backward(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: list[Tensor] | None = None,
) -> None:
    gradient = torch.ones_like(loss) if gradient is None else gradient
    keep = create_graph if retain_graph is None else retain_graph
    # The public functions would leave the mode again.
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (gradient,), keep, create_graph, tuple(inputs or ()), allow_unreachable=True, accumulate_grad=True
    )


class _Move(torch.autograd.Function):
    """A copy on another device; its gradient goes back."""

    @staticmethod
    def forward(ctx, tensor, of, here, there, dtype):
        ctx.of, ctx.here, ctx.there, ctx.dtype = of, here, there, tensor.dtype
        with of.making(there), torch._C.DisableTorchFunction():
            return tensor.to(dtype, copy=True)

    @staticmethod
    def backward(ctx, gradient):
        with ctx.of.making(ctx.here), torch._C.DisableTorchFunction():
            return gradient.to(ctx.dtype, copy=True), None, None, None, None
