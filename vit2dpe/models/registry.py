"""timm's names for our models: `timm.create_model("vit2dpe_tiny_patch4_32", position="rope")`.

A new name is a line of `ENTRIES`; timm's default config and entry point follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..errors import ConfigError
from .arguments import axes_of
from .swin import weights as swin_weights
from .swin.model import Swin
from .vit import ViT
from .weights import checkpoint_filter_fn

__all__: list[str] = []  # register_model adds the entry points


class Entry(NamedTuple):
    """A model under a name of timm's.

    Args:
        title: one sentence, the entry point's docstring.
        model: our class.
        sizes: arguments of the class that the name stands for.
    """

    title: str
    model: type[ViT | Swin]
    sizes: dict[str, int | float | tuple[int, ...]]


def _vit(title: str, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> Entry:
    sizes = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    return Entry(title, ViT, {**sizes})


def _swin(
    title: str,
    img_size: int,
    patch_size: int,
    window_size: int,
    embed_dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    **more: float,
) -> Entry:
    sizes = dict(img_size=img_size, patch_size=patch_size, window_size=window_size, embed_dim=embed_dim)
    return Entry(title, Swin, {**sizes, "depths": depths, "num_heads": num_heads, **more})


_ANY, _SERVES = "with any encoding.", "with any encoding that serves in windows."
ENTRIES = {
    "vit2dpe_tiny_patch16_224": _vit(f"ViT-Ti/16; timm's `vit_tiny_patch16_224` {_ANY}", 224, 16, 192, 12, 3),
    "vit2dpe_small_patch16_224": _vit(f"ViT-S/16; timm's `vit_small_patch16_224` {_ANY}", 224, 16, 384, 12, 6),
    "vit2dpe_base_patch16_224": _vit(f"ViT-B/16; timm's `vit_base_patch16_224` {_ANY}", 224, 16, 768, 12, 12),
    "vit2dpe_large_patch16_224": _vit(f"ViT-L/16; timm's `vit_large_patch16_224` {_ANY}", 224, 16, 1024, 24, 16),
    "vit2dpe_tiny_patch4_32": _vit("ViT-Ti/4 for 32-pixel images (CIFAR): 64 tokens.", 32, 4, 192, 12, 3),
    "vit2dpe_tiny_patch8_64": _vit("ViT-Ti/8 for 64-pixel images (Tiny-ImageNet): 64 tokens.", 64, 8, 192, 12, 3),
    "vit2dpe_swin_tiny_patch4_window7_224": _swin(
        f"Swin-T; timm's `swin_tiny_patch4_window7_224` {_SERVES}", 224, 4, 7, 96, (2, 2, 6, 2), (3, 6, 12, 24)
    ),
    "vit2dpe_swin_small_patch4_window7_224": _swin(
        f"Swin-S; timm's `swin_small_patch4_window7_224` {_SERVES}", 224, 4, 7, 96, (2, 2, 18, 2), (3, 6, 12, 24)
    ),
    "vit2dpe_swin_base_patch4_window7_224": _swin(
        f"Swin-B; timm's `swin_base_patch4_window7_224` {_SERVES}", 224, 4, 7, 128, (2, 2, 18, 2), (4, 8, 16, 32)
    ),
    "vit2dpe_swin_tiny_patch2_window4_32": _swin(  # its sizes are those of arXiv 2112.13492
        "A Swin for 32-pixel images (CIFAR), of seven million parameters: three stages on grids of 16, 8 and 4.",
        32,
        2,
        4,
        96,
        (2, 6, 4),
        (3, 6, 12),
        mlp_ratio=2.0,
    ),
}


def _default_cfg(entry: Entry) -> dict[str, Any]:
    size = entry.sizes["img_size"]
    cfg = dict(url="", num_classes=1000, input_size=(3, size, size), interpolation="bicubic", fixed_input_size=False)
    cfg |= dict(crop_pct=0.9 if size == 224 else 1.0, first_conv="patch_embed.proj")
    if entry.model is ViT:
        return cfg | dict(pool_size=None, mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD, classifier="head")
    last = 7 if size == 224 else 4  # the side of the last stage's grid, which timm calls pool_size
    return cfg | dict(
        pool_size=(last, last), mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, classifier="head.fc"
    )


def _entry_point(name: str, entry: Entry) -> Callable[..., ViT | Swin]:
    def create(pretrained: bool = False, **kwargs: Any) -> ViT | Swin:
        arguments = {**entry.sizes, **kwargs}
        if axes_of(arguments["img_size"], arguments["patch_size"]) != 2:
            raise ConfigError(
                f"timm's names are of images, got img_size={arguments['img_size']!r}: make others by the class, "
                f"vit2dpe.{entry.model.__name__}(...)"
            )
        is_vit = entry.model is ViT
        model: ViT | Swin = build_model_with_cfg(
            entry.model,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn if is_vit else swin_weights.checkpoint_filter_fn,
            feature_cfg=dict(out_indices=3 if is_vit else tuple(range(len(arguments["depths"]))), feature_cls="getter"),
            **arguments,
        )
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = entry.title
    return create


default_cfgs = generate_default_cfgs({f"{name}.untrained": _default_cfg(entry) for name, entry in ENTRIES.items()})
for _name, _entry in ENTRIES.items():
    register_model(_entry_point(_name, _entry))
