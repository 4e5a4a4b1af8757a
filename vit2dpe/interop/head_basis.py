"""Where a rotation is put into a trained model: a basis of each head in which it disturbs least what was learned.

Without a rotation a head counts by its products q·k alone, which are (Aᵀ q)·(A⁻¹ k) for any matrix A (Dh, Dh), and what
all keys have in common changes no softmax. A is taken that makes both second moments one diagonal,

    E[q qᵀ] = L_q L_qᵀ    E[k kᵀ] = L_k L_kᵀ    L_qᵀ L_k = U S Vᵀ    A = L_k V S^(-1/2)    A⁻¹ = S^(-1/2) Uᵀ L_qᵀ

for keys of mean 0: Aᵀ q and A⁻¹ k both have the second moments S. The channels of the largest S become those pairs that
turn least over the grid, by |the mean over places of exp(i angle)|. The moments are those of inputs γ x̂ + β with x̂ of
mean 0 and unit covariance, so that the weights are all that is needed.

Source of the basis: balanced realizations, B. C. Moore, Principal component analysis in linear systems, 1981.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..attention.modules import Attention
from ..models.layers import PostNormBlock
from ..models.swin.model import Swin
from ..models.vit import ViT
from ..modes import evaluating
from ..positions import float64_device
from ..resolution.sweep import train_size_of
from ..signal import Rotation, Signal


@torch.no_grad()
def choose_bases(old: ViT | Swin, new: ViT | Swin) -> None:
    """Change the basis of queries and keys of `new`, which has the weights of `old`, in place: of each attention that
    turns them and did not before. Without its rotation its function is the same."""
    before, turns = _rotations(old), _rotations(new)
    blocks = {f"{name}.attn".removeprefix("."): block for name, block in new.named_modules() if hasattr(block, "attn")}
    for name, rotation in turns.items():
        block = blocks.get(name)
        if block is not None and name not in before and _plain(block.attn):
            _choose(block.attn, rotation, None if isinstance(block, PostNormBlock) else getattr(block, "norm1", None))


def _plain(attention: nn.Module) -> bool:
    """Whether q and k are products of weights, and each head has its own."""
    plain = isinstance(attention, Attention) and isinstance(attention.q_norm, nn.Identity)
    return plain and attention.logit_scale is None and attention.kv_heads == attention.heads


def _rotations(model: ViT | Swin) -> dict[str, Rotation]:
    """The rotation of the queries in each attention that has one, at the model's own size."""
    found: dict[str, Rotation] = {}

    def note(name: str, module: nn.Module, given: tuple[Tensor, Signal]) -> None:
        if (rotation := given[1].q_rotation) is not None:
            found.setdefault(name, rotation)

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    ]
    weight = model.patch_embed.proj.weight
    try:
        with evaluating(model):
            model(weight.new_zeros(1, weight.shape[1], *train_size_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _choose(attention: Attention, rotation: Rotation, norm: nn.Module | None) -> None:
    heads, head_dim, weight, bias = attention.heads, attention.head_dim, attention.qkv.weight, attention.qkv.bias
    q_bias = attention.q_bias if attention.q_bias is not None else bias

    def wide(value: Tensor | None, like: Tensor) -> Tensor:
        return (like.new_zeros(like.shape) if value is None else value).to(float64_device(weight.device), torch.float64)

    gamma, beta = getattr(norm, "weight", None), wide(getattr(norm, "bias", None), weight[0])
    gamma = torch.ones_like(beta) if gamma is None else wide(gamma, weight[0])
    rows = weight.unflatten(0, (3, heads, head_dim))[:2]  # a view, (2, H, Dh, D)
    w_q, w_k = wide(rows, rows)
    b_q = wide(None if q_bias is None else q_bias[: heads * head_dim].view(heads, head_dim), w_q[..., 0])
    mean = w_q @ beta + b_q  # (H, Dh)
    l_q = _root((w_q * gamma) @ (w_q * gamma).mT + mean[..., None] * mean[..., None, :])
    l_k = _root((w_k * gamma) @ (w_k * gamma).mT)
    u, s, vt = torch.linalg.svd(l_q.mT @ l_k)
    small = s.clamp_min(torch.finfo(s.dtype).tiny).rsqrt()[..., None]  # (H, Dh, 1)
    both = torch.stack((small * (vt @ l_k.mT), small * (u.mT @ l_q.mT)))  # Aᵀ and A⁻¹, rows of the largest S first
    order = _least_first(rotation, heads).to(both.device)[..., None].expand_as(both)
    to_q, to_k = torch.empty_like(both).scatter_(2, order, both)
    rows.copy_(torch.stack((to_q @ w_q, to_k @ w_k)))
    if q_bias is not None:
        q_bias[: heads * head_dim] = (to_q @ b_q[..., None]).flatten().to(q_bias)
    if bias is not None:  # keys of mean 0
        bias.chunk(3)[1].copy_(-(to_k @ w_k @ beta).flatten())


def _root(moment: Tensor) -> Tensor:
    """(H, Dh, Dh) lower triangles, moment = L Lᵀ, with a trace that makes them regular."""
    size = moment.shape[-1]
    small = 1e-9 * moment.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(moment.dtype).tiny
    found: Tensor = torch.linalg.cholesky(moment + small[:, None, None] * torch.eye(size).to(moment))
    return found


def _least_first(rotation: Rotation, heads: int) -> Tensor:
    """(H, Dh) channels of each head by how little their pair turns over the grid, the least first."""
    wide = [part.to(float64_device(part.device), torch.float64) for part in rotation]
    still = torch.hypot(*(part.expand(-1, heads, -1, -1)[0].mean(1) for part in wide))  # (H, Dh/2)
    pairs = still.argsort(dim=-1, descending=True, stable=True)
    return torch.stack((2 * pairs, 2 * pairs + 1), dim=-1).flatten(1)
