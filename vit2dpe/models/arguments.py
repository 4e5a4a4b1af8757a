"""The numbers that models take, by the names of their arguments, and what each may be.

What fits together (a width and its heads) is checked where it is used; here each number stands by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index

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
AXES = ("patch_size", "img_size", "mask_unit", "window")  # one number, or (rows, columns); of a ViT one of each axis
MOST_AXES = 3  # torch has convolutions of lines, images and volumes
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
        any_axes = not stages and name != "mask_unit"  # of a ViT; `axes_of` says which
        if isinstance(size := given.get(name), Sequence) and len(size) != 2 and not any_axes:
            raise ConfigError(f"{name} must be one number or two (rows, columns), got {size!r}")
    for name in ("depths", "num_heads"):
        if stages and not isinstance(given[name], Sequence):
            raise ConfigError(f"{name} must be one number for each stage, such as (2, 2, 6, 2), got {given[name]!r}")


def axes_of(img_size: int | Iterable[int], patch_size: int | Iterable[int]) -> int:
    """How many axes a model has: two, or as many as both sizes name, (frames, rows, columns).

    Raises:
        ConfigError: if they name different ones, one of them names none where there are not two, or there are too many.
    """
    image, patch = (len(list(size)) if isinstance(size, Iterable) else 2 for size in (img_size, patch_size))
    axes = patch if image == 2 else image
    alone = axes != 2 and not (isinstance(img_size, Iterable) and isinstance(patch_size, Iterable))
    if alone or image != patch:
        bad, other = ("img_size", "patch_size") if image == axes else ("patch_size", "img_size")
        raise ConfigError(
            f"{bad} must name the axes that {other} names, (frames, rows, columns) of a video, (length,) of a line; "
            f"one number stands for rows and columns. Got img_size={img_size!r} and patch_size={patch_size!r}"
        )
    if not 1 <= axes <= MOST_AXES:
        raise ConfigError(f"a ViT has 1 to {MOST_AXES} axes, got img_size={img_size!r}")
    return axes


def sides(size: int | Iterable[int], axes: int = 2) -> tuple[int, ...]:
    """A size along each axis; of two axes one number is both.

    Raises:
        ConfigError: for anything else.
    """
    try:
        found = tuple(map(index, size if isinstance(size, Iterable) else (size,)))
    except TypeError:
        found = ()
    if axes == 2 and len(found) == 1 and not isinstance(size, Iterable):
        found *= 2
    if len(found) != axes:
        what = "a whole number or two of them (rows, columns)" if axes == 2 else f"{axes} whole numbers, one of an axis"
        raise ConfigError(f"a size is {what}, got {size!r}")
    return found
