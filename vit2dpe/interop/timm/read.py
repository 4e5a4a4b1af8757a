"""Reads timm's model families: the class, encoding and arguments of our model that computes the same as one of theirs.

`FAMILIES` lists the covered families by timm's class. A reader takes a timm model and returns a `Recipe`, or
refuses, naming the part that ours lacks. A new family is a reader and a line. Common parts,
their blocks and sizes, is read in `arguments.py`; here it is about places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from timm.layers import RotaryEmbeddingMixed
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from ...errors import ConfigError
from ...models.deit import DistilledViT
from ...models.spec import Arguments
from ...models.timm_api import Step, pretrained_cfg_of
from ...models.vit import ViT
from .arguments import arguments_of, parts_of, tokens_of
from .names import nearest
from .steps import BiasTable, Embeds, FlatTable, Frequencies, Fuse, Rename, Reorder, columns_first, halves


@dataclass(frozen=True)
class Recipe:
    """How a timm model is built as one of ours.

    Args:
        model: our class.
        position: the spec of its encoding.
        arguments: of the constructor, beside the position.
        steps: from their parameters to ours, in order.
        policy: of other sizes, where it is not the encodings' default.
        grid: (h, w) of its patches, which the policy scales to.
    """

    model: Callable[..., ViT]
    position: str
    arguments: Arguments
    steps: tuple[Step, ...]
    grid: tuple[int, int]
    policy: str | None = None


def vision_transformer(theirs: VisionTransformer) -> Recipe:
    """`VisionTransformer`: ViT, DeiT, CLIP, SigLIP, DINOv2, FlexiViT, BEiT-3, MAE."""
    arguments = arguments_of(theirs)
    tokens = () if theirs.no_embed_class else tokens_of(theirs)
    grid = theirs.patch_embed.grid_size
    if theirs.pos_embed is None:
        return Recipe(ViT, "none", arguments, (), grid)
    return Recipe(ViT, "learned", arguments, (FlatTable("position.pos_embed", grid, tokens),), grid)


def distilled(theirs: VisionTransformerDistilled) -> Recipe:
    """`VisionTransformerDistilled`: DeiT with a distillation token."""
    arguments, grid = arguments_of(theirs), theirs.patch_embed.grid_size
    if arguments.pop("reg_tokens"):
        raise ConfigError("registers beside a distillation token, which timm has and does not use, are not covered")
    table = FlatTable("position.pos_embed", grid, (("cls_token", 1), ("dist_token", 1)))
    return Recipe(DistilledViT, "learned", arguments, (table,), grid)


def eva(theirs: Eva) -> Recipe:
    """`Eva`: EVA, EVA-02, rope-vit, DINOv3, Perception Encoder, timm's own ViTs with rotary encodings."""
    arguments, grid = arguments_of(theirs), theirs.patch_embed.grid_size
    width = theirs.embed_dim // arguments["num_heads"]
    spec, order, policy = ("none", None, None) if theirs.rope is None else _rotary(theirs, grid, width)
    steps: list[Step] = [Rename("gamma_1", "ls1.gamma"), Rename("gamma_2", "ls2.gamma")]
    if theirs.blocks[0].attn.qkv is None:
        steps.append(Fuse())
    if order is not None:
        steps.append(Reorder(arguments["num_heads"], order))
    shared = spec != "none" and not isinstance(theirs.rope, RotaryEmbeddingMixed)
    if theirs.pos_embed is not None:
        owner = "position.terms.0.pos_embed" if shared else "position.pos_embed"
        steps.append(FlatTable(owner, grid, () if theirs.no_embed_class else tokens_of(theirs)))
        spec = "learned" if spec == "none" else f"learned+{spec}"
    if isinstance(theirs.rope, RotaryEmbeddingMixed):
        steps.append(Frequencies(xy=theirs.rope.grid_indexing == "xy"))
    return Recipe(ViT, spec, arguments, tuple(steps), grid, policy)


def naflexvit(theirs: NaFlexVit) -> Recipe:
    """`NaFlexVit`: timm's own, SigLIP 2's, RADIO's, and what `use_naflex=True` makes of ViT and Eva."""
    embeds = theirs.embeds
    if not embeds.channels_last:
        raise ConfigError("patches whose channels come first are not covered")
    patch, grid = tuple(embeds.patch_size), embeds.pos_embed_grid_size
    if grid is None:  # without a table no size is its own
        size = pretrained_cfg_of(theirs).get("input_size", (3, 224, 224))[1:]
        grid = (max(1, size[0] // patch[0]), max(1, size[1] // patch[1]))
    grid = (grid[0], grid[1])
    arguments = parts_of(theirs) | dict(
        img_size=(grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=patch,
        in_chans=theirs.in_chans,
        dynamic_img_pad=embeds.dynamic_img_pad,
        class_token=embeds.cls_token is not None,
        reg_tokens=embeds.num_reg_tokens,
        embed_norm=not isinstance(embeds.norm, nn.Identity),
        pos_drop_rate=embeds.pos_drop.p,
    )
    width = theirs.embed_dim // arguments["num_heads"]
    spec, order, policy = ("none", None, None) if theirs.rope is None else _rotary(theirs, grid, width)
    steps: list[Step] = []
    if hasattr(theirs.blocks[0], "gamma_1"):  # of Eva's blocks
        steps += [Rename("gamma_1", "ls1.gamma"), Rename("gamma_2", "ls2.gamma")]
    if theirs.blocks[0].attn.qkv is None:
        steps.append(Fuse())
    if order is not None:
        steps.append(Reorder(arguments["num_heads"], order))
    shared = spec != "none" and not isinstance(theirs.rope, RotaryEmbeddingMixed)
    linear = patch if embeds.is_linear else ()
    steps.append(Embeds(linear, "position.terms.0" if shared else "position"))
    if embeds.pos_embed_type != "none":
        table = _table(embeds)
        spec = table if spec == "none" else f"{table}+{spec}"
    if isinstance(theirs.rope, RotaryEmbeddingMixed):
        steps.append(Frequencies(xy=theirs.rope.grid_indexing == "xy"))
    return Recipe(ViT, spec, arguments, tuple(steps), grid, policy)


# How timm resizes a table: mode, antialias, align_corners; and ours of the same numbers.
_RESIZES = {
    ("bicubic", True, False): "antialias",
    ("bicubic", False, False): "plain",
    ("bilinear", True, False): "smooth",
    ("bilinear", False, False): "bilinear",
    ("bilinear", False, True): "corners",
}


def _table(embeds: NaFlexEmbeds) -> str:
    """The spec of a table of NaFlexViT's."""
    options = ["keep_aspect=true"] if embeds.pos_embed_ar_preserving else []
    if embeds.pos_embed_type == "factorized":
        return f"factorized({', '.join(options)})" if options else "factorized"
    how = (embeds.pos_embed_interp_mode, embeds.pos_embed_antialias, embeds.pos_embed_align_corners)
    if how not in _RESIZES:
        raise ConfigError("a table resized by {} (antialias {}, align_corners {}) is not covered".format(*how))
    if embeds.pos_embed_use_grid_sample and embeds.pos_embed_antialias:
        raise ConfigError(
            "a table that is sampled for NaFlex batches and resized with antialias for images, two functions, is not "
            "covered; pos_embed_antialias=False makes them one"
        )
    options = [f"resize={_RESIZES[how]}", *options] if how != ("bicubic", True, False) else options
    return f"learned({', '.join(options)})" if options else "learned"


def _rotary(
    theirs: Eva | NaFlexVit, grid: tuple[int, int], width: int
) -> tuple[str, tuple[int, ...] | None, str | None]:
    """The spec of a rotary encoding, the order of channels that makes it ours, and its policy."""
    rope, kind = theirs.rope, type(theirs.rope).__name__
    xy = rope.grid_indexing == "xy"
    if kind == "RotaryEmbeddingMixed":
        return f"rope_mixed(base={rope.temperature})", None, None
    half = theirs.blocks[0].attn.rotate_half
    if half and xy:
        raise ConfigError("half-split pairs with columns first are not covered")
    order = halves(width) if half else columns_first(width) if xy else None
    if kind == "RotaryEmbeddingDinoV3":
        if rope.normalize_coords != "separate" or rope.grid_offset or rope.min_period or rope.max_period:
            raise ConfigError("a DINOv3 rotary encoding with coordinates or periods of another kind is not covered")
        rescale, jitter, shift = rope.rescale_coords or 1.0, rope.jitter_coords or 1.0, rope.shift_coords or 0.0
        spec = f"rope_dinov3(base={rope.temperature}, rescale={rescale}, jitter={jitter}, shift={shift})"
        return spec, order, None
    if kind != "RotaryEmbeddingCat" or rope.in_pixels or rope.aug_active or rope.grid_type != "index":
        raise ConfigError(f"a rotary encoding of another kind ({kind}) is not covered")
    options = [f"base={rope.temperature}"]
    if rope.grid_offset:
        options.append(f"start={rope.grid_offset}")
    if rope.ref_feat_shape is None:
        return f"rope({', '.join(options)})", order, None
    if rope.grid_offset not in (0, 1):
        raise ConfigError(f"a rotary encoding that counts places from {rope.grid_offset} is not covered")
    steps = tuple(ref / now for ref, now in zip(rope.ref_feat_shape, grid, strict=True))
    if steps != (1.0, 1.0):
        options.append(f"step={steps[0] if steps[0] == steps[1] else steps}")
    return f"rope({', '.join(options)})", order, f"interpolate(align={'one' if rope.grid_offset else 'corner'})"


def beit(theirs: Beit) -> Recipe:
    """`Beit`: BEiT, BEiT v2; a bias table of each block or of all, which class tokens have entries in."""
    arguments, grid = arguments_of(theirs), theirs.patch_embed.grid_size
    steps: list[Step] = [Rename("gamma_1", "ls1.gamma"), Rename("gamma_2", "ls2.gamma")]
    own = theirs.blocks[0].attn.relative_position_bias_table is not None
    if own and theirs.rel_pos_bias is not None:
        raise ConfigError("bias tables of each block beside one of all blocks are not covered")
    specs = []
    if theirs.pos_embed is not None:
        specs.append("learned")
    if own or theirs.rel_pos_bias is not None:
        specs.append(f"relative(prefix=true, resize=geometric{'' if own else ', shared=true'})")
    if theirs.rel_pos_bias is not None:
        ours = "position.terms.1." if theirs.pos_embed is not None else "position."
        steps.append(BiasTable("rel_pos_bias.", ours, grid, True))
    elif own:
        steps.append(BiasTable("attn.", "attn.position.", grid, True))
    if theirs.pos_embed is not None:
        owner = "position.terms.0.pos_embed" if theirs.rel_pos_bias is not None else "position.pos_embed"
        steps.append(FlatTable(owner, grid, tokens_of(theirs)))
    return Recipe(ViT, "+".join(specs) or "none", arguments, tuple(steps), grid)


def relpos(theirs: VisionTransformerRelPos) -> Recipe:
    """`VisionTransformerRelPos`: a table over offsets or a network of their logarithms, of each block or of all."""
    arguments, grid = arguments_of(theirs), theirs.patch_embed.grid_size
    shared = theirs.shared_rel_pos is not None
    bias = theirs.shared_rel_pos if shared else theirs.blocks[0].attn.rel_pos
    source, target = ("shared_rel_pos", "position") if shared else ("attn.rel_pos", "attn.position")
    options = ["shared=true"] if shared else []
    if type(bias).__name__ == "RelPosBias":
        prefix = bias.prefix_tokens > 0
        options += ["resize=geometric", *(["prefix=true"] if prefix else [])]
        steps: tuple[Step, ...] = (BiasTable(f"{source}.", f"{target}.", grid, prefix),)
        return Recipe(ViT, f"relative({', '.join(options)})", arguments, steps, grid)
    if type(bias).__name__ != "RelPosMlp" or bias.mode not in ("swin", "cr"):
        raise ConfigError(f"a relative bias of another kind ({type(bias).__name__}) is not covered")
    if bias.mode == "swin" and tuple(bias.pretrained_window_size) not in ((0, 0), tuple(grid)):
        raise ConfigError("a bias network pretrained on another window is not covered")
    options += [f"hidden={bias.mlp.fc1.out_features}", f"form={bias.mode}"]
    steps = (Rename(f"{source}.mlp.fc1", f"{target}.cpb_mlp.0"), Rename(f"{source}.mlp.fc2", f"{target}.cpb_mlp.2"))
    return Recipe(ViT, f"logcpb({', '.join(options)})", arguments, steps, grid)


FAMILIES: dict[str, Callable[[nn.Module], Recipe]] = {
    "VisionTransformer": vision_transformer,
    "VisionTransformerDistilled": distilled,
    "Eva": eva,
    "Beit": beit,
    "VisionTransformerRelPos": relpos,
    "NaFlexVit": naflexvit,
}


SWINS = ("SwinTransformer", "SwinTransformerV2")  # read by `swin.py`


def read(theirs: nn.Module) -> Recipe:
    """The recipe of a timm model.

    Raises:
        ConfigError: for a family or a part that is not covered, by name, with the nearest covered name.
    """
    family = type(theirs).__name__
    if family not in FAMILIES or not type(theirs).__module__.startswith("timm."):
        inner = "; the model in it (.model) may be" if isinstance(getattr(theirs, "model", None), nn.Module) else ""
        covered = ", ".join((*FAMILIES, *SWINS))
        raise refusal(theirs, f"{family} is not covered{inner}; covered are timm's {covered}")
    try:
        return FAMILIES[family](theirs)
    except ConfigError as error:
        raise refusal(theirs, str(error)) from None


def refusal(theirs: nn.Module, why: str) -> ConfigError:
    """The error for a timm model that is not covered: its name, why, and the nearest covered name."""
    name = pretrained_cfg_of(theirs).get("architecture")
    near = nearest(name, _reads) if name else None
    return ConfigError(f"{name or type(theirs).__name__}: {why}" + (f"; nearest covered name: {near}" if near else ""))


def _reads(theirs: nn.Module) -> bool:
    family = type(theirs).__name__
    try:
        return family in SWINS or bool(FAMILIES[family](theirs))
    except (ConfigError, KeyError):
        return False
