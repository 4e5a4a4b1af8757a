"""timm's names for our models: `timm.create_model("vit2dpe_tiny_patch4_32", position="rope")`."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .swin import weights as swin_weights
from .swin.model import Swin
from .vit import ViT
from .weights import checkpoint_filter_fn

__all__ = [
    "vit2dpe_base_patch16_224",
    "vit2dpe_large_patch16_224",
    "vit2dpe_small_patch16_224",
    "vit2dpe_swin_base_patch4_window7_224",
    "vit2dpe_swin_small_patch4_window7_224",
    "vit2dpe_swin_tiny_patch2_window4_32",
    "vit2dpe_swin_tiny_patch4_window7_224",
    "vit2dpe_tiny_patch4_32",
    "vit2dpe_tiny_patch8_64",
    "vit2dpe_tiny_patch16_224",
]


def _cfg(size: int, **more: Any) -> dict[str, Any]:
    return dict(
        url="",
        num_classes=1000,
        input_size=(3, size, size),
        pool_size=None,
        crop_pct=0.9 if size > 64 else 1.0,
        interpolation="bicubic",
        fixed_input_size=False,
        mean=IMAGENET_INCEPTION_MEAN,
        std=IMAGENET_INCEPTION_STD,
        first_conv="patch_embed.proj",
        classifier="head",
        **more,
    )


def _swin_cfg(size: int, last: int) -> dict[str, Any]:
    """`last` is the side of the last stage's grid, which timm calls pool_size."""
    return _cfg(size) | dict(
        pool_size=(last, last), mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, classifier="head.fc"
    )


default_cfgs = generate_default_cfgs(
    {
        "vit2dpe_tiny_patch16_224.untrained": _cfg(224),
        "vit2dpe_small_patch16_224.untrained": _cfg(224),
        "vit2dpe_base_patch16_224.untrained": _cfg(224),
        "vit2dpe_large_patch16_224.untrained": _cfg(224),
        "vit2dpe_tiny_patch4_32.untrained": _cfg(32),
        "vit2dpe_tiny_patch8_64.untrained": _cfg(64),
        "vit2dpe_swin_tiny_patch4_window7_224.untrained": _swin_cfg(224, 7),
        "vit2dpe_swin_small_patch4_window7_224.untrained": _swin_cfg(224, 7),
        "vit2dpe_swin_base_patch4_window7_224.untrained": _swin_cfg(224, 7),
        "vit2dpe_swin_tiny_patch2_window4_32.untrained": _swin_cfg(32, 4),
    }
)


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> ViT:
    return build_model_with_cfg(
        ViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **{**sizes, **kwargs},
    )


@register_model
def vit2dpe_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-Ti/16; timm's `vit_tiny_patch16_224` with any encoding."""
    sizes = dict(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return _create("vit2dpe_tiny_patch16_224", pretrained, sizes, kwargs)


@register_model
def vit2dpe_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-S/16; timm's `vit_small_patch16_224` with any encoding."""
    sizes = dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create("vit2dpe_small_patch16_224", pretrained, sizes, kwargs)


@register_model
def vit2dpe_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-B/16; timm's `vit_base_patch16_224` with any encoding."""
    sizes = dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return _create("vit2dpe_base_patch16_224", pretrained, sizes, kwargs)


@register_model
def vit2dpe_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-L/16; timm's `vit_large_patch16_224` with any encoding."""
    sizes = dict(img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
    return _create("vit2dpe_large_patch16_224", pretrained, sizes, kwargs)


@register_model
def vit2dpe_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-Ti/4 for 32-pixel images (CIFAR): 64 tokens."""
    sizes = dict(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3)
    return _create("vit2dpe_tiny_patch4_32", pretrained, sizes, kwargs)


@register_model
def vit2dpe_tiny_patch8_64(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-Ti/8 for 64-pixel images (Tiny-ImageNet): 64 tokens."""
    sizes = dict(img_size=64, patch_size=8, embed_dim=192, depth=12, num_heads=3)
    return _create("vit2dpe_tiny_patch8_64", pretrained, sizes, kwargs)


def _create_swin(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> Swin:
    kwargs = {**sizes, **kwargs}
    return build_model_with_cfg(
        Swin,
        variant,
        pretrained,
        pretrained_filter_fn=swin_weights.checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["depths"]))), feature_cls="getter"),
        **kwargs,
    )


@register_model
def vit2dpe_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-T; timm's `swin_tiny_patch4_window7_224` with any encoding that serves in windows."""
    sizes = dict(img_size=224, patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    return _create_swin("vit2dpe_swin_tiny_patch4_window7_224", pretrained, sizes, kwargs)


@register_model
def vit2dpe_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-S; timm's `swin_small_patch4_window7_224` with any encoding that serves in windows."""
    sizes = dict(
        img_size=224, patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)
    )
    return _create_swin("vit2dpe_swin_small_patch4_window7_224", pretrained, sizes, kwargs)


@register_model
def vit2dpe_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-B; timm's `swin_base_patch4_window7_224` with any encoding that serves in windows."""
    sizes = dict(
        img_size=224, patch_size=4, window_size=7, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)
    )
    return _create_swin("vit2dpe_swin_base_patch4_window7_224", pretrained, sizes, kwargs)


@register_model
def vit2dpe_swin_tiny_patch2_window4_32(pretrained: bool = False, **kwargs: Any) -> Swin:
    """A Swin for 32-pixel images (CIFAR), of seven million parameters: three stages on grids of 16, 8 and 4.

    Its sizes are those of arXiv 2112.13492.
    """
    sizes = dict(
        img_size=32, patch_size=2, window_size=4, embed_dim=96, depths=(2, 6, 4), num_heads=(3, 6, 12), mlp_ratio=2.0
    )
    return _create_swin("vit2dpe_swin_tiny_patch2_window4_32", pretrained, sizes, kwargs)
