"""The one attention of the project: what an encoding asks for arrives as a `Signal`. Imports the ground floor alone."""

from .cache import KVCache
from .dispatch import explain
from .functional import attend, rotate
from .modules import Attention, CrossAttention

__all__ = ["Attention", "CrossAttention", "KVCache", "attend", "explain", "rotate"]
