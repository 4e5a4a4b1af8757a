"""Models; importing this package registers their names with timm."""

from . import registry
from .vit import ViT

__all__ = ["ViT", "registry"]
