"""The numbers that models take, by the names of their arguments, and what each may be.

What fits together (a width and its heads) is checked where it is used; here each number stands by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ConfigError
from ..ranges import Count, Depth, Natural, NotNegative, Positive, Probability, Rate, check_numbers

RANGES: dict[str, object] = {
    **dict.fromkeys(("patch_size", "img_size", "mask_unit"), Count),
    **dict.fromkeys(("in_chans", "embed_dim", "decoder_embed_dim", "vocab_size", "context"), Count),
    **dict.fromkeys(("num_heads", "decoder_num_heads", "kv_heads", "attn_pool_num_heads"), Count),
    **dict.fromkeys(("depth", "depths", "decoder_depth"), Depth),
    **dict.fromkeys(("num_classes", "reg_tokens", "token_types", "hidden", "window"), Natural),
    **dict.fromkeys(("mlp_ratio", "decoder_mlp_ratio", "attn_pool_mlp_ratio", "scale", "embed_scale"), Positive),
    "norm_eps": NotNegative,
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), Probability),
    "drop_path_rate": Probability,
    "patch_drop_rate": Rate,
}
AXES = ("patch_size", "img_size", "mask_unit", "window")  # one number, or (rows, columns)
STAGES = ("depths", "num_heads", "mlp_ratio")  # one for each stage, of a Swin


def check_arguments(given: Mapping[str, object], stages: bool = False) -> None:
    """Refuse numbers that no model can have, among the arguments of a constructor: `check_arguments(locals())`.

    Args:
        stages: whether depths, heads and ratios may be given for each stage.

    Raises:
        ConfigError: naming the argument, what it must be and what came.
    """
    several = (*AXES, *STAGES) if stages else AXES
    check_numbers(RANGES, given, several)
    for name in AXES:
        if isinstance(size := given.get(name), Sequence) and len(size) != 2:
            raise ConfigError(f"{name} must be one number or two (rows, columns), got {size!r}")
    for name in ("depths", "num_heads"):
        if stages and not isinstance(given[name], Sequence):
            raise ConfigError(f"{name} must be one number for each stage, such as (2, 2, 6, 2), got {given[name]!r}")
