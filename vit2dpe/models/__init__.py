"""Models; importing this package registers their names with timm."""

from timm.models import register_notrace_function, register_notrace_module

from ..attention.functional import attend, rotate_qk, split_heads
from ..encodings import PositionEncoding
from . import registry
from .deit import DistilledViT
from .features import allow, spaced
from .layers import PatchDrop, PatchEmbed, add_token, block_inputs, signal_of_block
from .mae import MAE
from .mixed import drop_patches
from .swin.model import Swin, to_grid
from .swin.stage import SwinStage
from .vit import ViT

# Leaves for torch.fx: their operations depend on sizes, and they pass Positions and Signals.
for _module in (PatchEmbed, PatchDrop, PositionEncoding, SwinStage):
    register_notrace_module(_module)
for _function in (
    attend,
    rotate_qk,
    split_heads,
    allow,
    spaced,
    add_token,
    drop_patches,
    signal_of_block,
    block_inputs,
    to_grid,
):
    register_notrace_function(_function)

__all__ = ["MAE", "DistilledViT", "Swin", "ViT", "registry"]
