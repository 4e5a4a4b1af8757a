"""timm's name of every model that came from timm: `timm.create_model("vit2dpe_from_timm", base=..., position=...)`.

Models of `from_timm` have this name, and so have the hub folders and the run folders they are saved in. Here is the
name alone, which is there as soon as timm is imported; what it does is in `entry.py`, imported at the first call.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

__all__: list[str] = []  # register_model adds the entry point

default_cfgs = generate_default_cfgs(
    {"vit2dpe_from_timm.untrained": dict(fixed_input_size=False, first_conv="patch_embed.proj", classifier="head")}
)


def vit2dpe_from_timm(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any model of timm's that `vit2dpe.from_timm` covers, with its own encoding or another one.

    Args:
        pretrained: load weights: those of the folder or file that timm was given, or else timm's own of `base`.
        kwargs: `base`, timm's name; `position`, `policy`, `img_size`, `patch_size` as for `from_timm`; others go to
            timm's model, and from there to ours. Beside a `record`, as a folder holds one, they are arguments of our
            class.

    Raises:
        ConfigError: without `base`; for what `from_timm` refuses.
    """
    from .entry import create

    return create(pretrained, kwargs)


register_model(vit2dpe_from_timm)
