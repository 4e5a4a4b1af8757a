"""The one attention of the project: the effect of an encoding arrives as a `Signal`. Imports the ground floor alone."""

from .basis import fold_basis, learn_basis
from .cache import KVCache
from .functional import attend, rotate
from .kernels.flex import mask_mod, score_mod
from .modules import Attention, CrossAttention
from .observe import attention_maps, explain

__all__ = [
    "Attention",
    "CrossAttention",
    "KVCache",
    "attend",
    "attention_maps",
    "explain",
    "fold_basis",
    "learn_basis",
    "mask_mod",
    "rotate",
    "score_mod",
]
