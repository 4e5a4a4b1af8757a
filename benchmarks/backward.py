"""The backward pass, node by node in Python: on fake CUDA tensors torch's engine asks for a device that is not there.

What the engine does between nodes is done here too: gradients of one tensor are added up, summed to its shape and cast
to its dtype. Two calls to one node wait for each other; hooks are not called.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor
from torch.autograd.graph import Node


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """`loss.backward()` of a number."""
    if loss.grad_fn is None:
        raise ValueError("the loss does not depend on anything that requires a gradient")
    waits = _uses(loss.grad_fn)
    given: defaultdict[Node, dict[int, Tensor]] = defaultdict(dict)
    given[loss.grad_fn][loss.output_nr] = torch.ones_like(loss)
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        for (child, slot), gradient in zip(node.next_functions, _apply(node, given.pop(node, {})), strict=False):
            if child is None:
                continue
            if gradient is not None:
                before = given[child].get(slot)
                gradient = _fit(gradient, child, slot)
                given[child][slot] = gradient if before is None else before + gradient
            waits[child] -= 1
            if not waits[child]:
                ready.append(child)


def _uses(root: Node) -> Counter[Node]:
    """How many gradients each node waits for."""
    uses, seen, todo = Counter[Node](), {root}, [root]
    while todo:
        for child, _ in todo.pop().next_functions:
            if child is not None:
                uses[child] += 1
                if child not in seen:
                    seen.add(child)
                    todo.append(child)
    return uses


def _apply(node: Node, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of what went into a node; those of a parameter are put where they belong."""
    if hasattr(node, "variable"):
        parameter, gradient = node.variable, given.get(0)
        parameter.grad = gradient if parameter.grad is None or gradient is None else parameter.grad + gradient
        return ()
    outputs = [given.get(i) for i in range(len(node._input_metadata))]
    run = node.apply if hasattr(node, "apply") else node  # of a Function written in Python
    found = run(*outputs)  # type: ignore[operator]
    return found if isinstance(found, tuple) else (found,)


def _fit(gradient: Tensor, node: Node, slot: int) -> Tensor:
    """In shape and dtype of the tensor that it is the gradient of."""
    like = node._input_metadata[slot]
    shape = torch.Size(like.shape)
    gradient = gradient if gradient.shape == shape else gradient.sum_to_size(shape)
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)
