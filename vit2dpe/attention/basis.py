"""A learned basis of queries and keys in each head, in which they are turned: a parametrization of the projection.

    q' = A_h q,    k' = A_h⁻ᵀ k,    q'·k' = q·k;    with a rotation  (R(p) A q)·(R(p') A⁻ᵀ k)

    orthogonal   A = (1 - S)(1 + S)⁻¹, S skew: A⁻ᵀ = A            Cayley-STRING
    svd          A = U diag(exp σ) Vᵀ, U and V exp of skew ones   HARoPE

A is no function of places, so no encoding has it: it is a linear map behind a linear map. `learn_basis` puts it into
the weight of `qkv` (`torch.nn.utils.parametrize`), `fold_basis` multiplies it out: the model then is one without, as
fast, with the same names in its state_dict. It starts as the identity.

Commuting block rotations (ComRoPE, arXiv 2506.03737) are rotations of pairs in such a basis, exp(Σ p_a A_a) =
P R(p) Pᵀ for skew A_a that commute: `rope_mixed` with an orthogonal basis.

Sources: STRING, arXiv 2502.02562; HARoPE, arXiv 2510.10489, `model/models_HARoPE.py` of Studentxll/HARoPE. How ours
differs: one basis for each head of keys, which its heads of queries share; biases of q and k, learned in the new basis
anyway, are left as they are; σ is a logarithm, where HARoPE takes softplus.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import ConfigError, not_ours, unknown
from .modules import Attention

KINDS = ("orthogonal", "svd")
Model = TypeVar("Model", bound=nn.Module)


class HeadBasis(nn.Module):
    """The weight of `qkv` with q and k in another basis, (D + 2 D_kv, D) -> the same.

    Args:
        heads, kv_heads: of queries, and of keys and values.
        head_dim: Dh.
        kind: of `KINDS`.
        like: the weight, for dtype and device; half precision is computed in float32.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, kind: str, like: Tensor) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        dtype, svd = torch.promote_types(like.dtype, torch.float32), kind == "svd"
        zeros = partial(torch.zeros, kv_heads, head_dim, device=like.device, dtype=dtype)
        self.skew = nn.Parameter(zeros(head_dim))
        self.right = nn.Parameter(zeros(head_dim)) if svd else None
        self.scale = nn.Parameter(zeros(1)) if svd else None

    def bases(self) -> tuple[Tensor, Tensor]:
        """A and A⁻ᵀ, each (H_kv, Dh, Dh)."""
        s = self.skew - self.skew.mT
        if self.right is None or self.scale is None:
            one = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
            a = torch.linalg.solve(one + s, one - s)
            return a, a
        left, right = torch.linalg.matrix_exp(s), torch.linalg.matrix_exp(self.right - self.right.mT)
        return left @ (self.scale.exp() * right.mT), left @ ((-self.scale).exp() * right.mT)

    def forward(self, weight: Tensor) -> Tensor:
        to_q, to_k = self.bases()
        rows = weight.unflatten(0, (self.heads + 2 * self.kv_heads, -1)).to(to_q.dtype)
        q, k, v = rows.split((self.heads, self.kv_heads, self.kv_heads))  # (H, Dh, D)
        to_q = to_q.repeat_interleave(self.heads // self.kv_heads, dim=0)
        return torch.cat([to_q @ q, to_k @ k, v]).flatten(0, 1).to(weight.dtype)


def learn_basis(model: Model, kind: str = "orthogonal") -> Model:
    """Give each head of each attention of a model a basis to learn, in place; before an optimizer is made.

    Args:
        kind: "orthogonal", or "svd".

    Raises:
        ConfigError: for a model without an `Attention` of ours, for norms of q and k or cosines, between which and the
            rotation the basis would act, and for a model that learns one already.
    """
    if kind not in KINDS:
        raise unknown("kind of basis", kind, KINDS)
    found = _attentions(model)
    for name, attention in found.items():
        if not isinstance(attention.q_norm, nn.Identity) or attention.logit_scale is not None:
            raise ConfigError(
                f"{name} has norms of q and k behind its projection, where a basis cannot be folded into it"
            )
        if parametrize.is_parametrized(attention.qkv):
            raise ConfigError(f"the projection of {name} is parametrized already")
    for attention in found.values():
        basis = HeadBasis(attention.heads, attention.kv_heads, attention.head_dim, kind, attention.qkv.weight)
        parametrize.register_parametrization(attention.qkv, "weight", basis)
    return model


def fold_basis(model: Model) -> Model:
    """Multiply the bases that a model learned into its projections, in place: the same function, without them.

    Raises:
        ConfigError: for a model that learned none.
    """
    found = [attention.qkv for attention in _attentions(model).values() if parametrize.is_parametrized(attention.qkv)]
    if not found:
        raise ConfigError(f"this {type(model).__name__} learned no basis: learn_basis comes before its training")
    for projection in found:
        parametrize.remove_parametrizations(projection, "weight")
        bias = projection.bias
        del projection.bias  # behind the weight again, as an optimizer's state has them
        projection.register_parameter("bias", bias)
    return model


def _attentions(model: nn.Module) -> dict[str, Attention]:
    found = {name: part for name, part in model.named_modules() if isinstance(part, Attention)}
    if not found:
        raise not_ours(model, "has no Attention of ours, whose heads could have a basis")
    return found
