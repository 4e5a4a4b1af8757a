"""FlexAttention on the CPU, where `attend` does not take it and torch refuses gradients to q, k and v."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from vit2dpe.attention.kernels import flex


def plainly(program, *args):
    return flex.plainly(*args)


@contextmanager
def flex_on_cpu(run=plainly):
    """`attend` takes it at any size; `plainly`, or as it is, by `compiled`. Yields the structures of the programs."""
    programs = []

    def counted(program, *args):
        programs.append(program)
        return run(program, *args)

    with mock.patch.multiple(flex, DEVICES=("cpu",), PAIRS=1, WIDTHS=range(1, 257), TRITON=True, run=counted):
        yield programs


@contextmanager
def compiled():
    """The reference that torch has for the CPU, in a graph of `aot_eager`; yields the counter of programs."""
    counter, run = CompileCounterWithBackend("aot_eager"), flex.run
    torch.compiler.reset()
    flex._compiled.cache_clear()
    with (
        mock.patch.object(flex, "BACKEND", counter),
        mock.patch.object(flex_attention, "_validate_device", _serves),
        flex_on_cpu(run),
    ):
        yield counter
    flex._compiled.cache_clear()


def _serves(*tensors):
    pass
