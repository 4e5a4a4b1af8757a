"""A timm checkpoint, kept, run at another size, or with another encoding: `from_timm`, and back: `to_timm`.

A model is rebuilt as one of ours and its weights are loaded strictly; nothing is patched. `read.py` lists and reads the
covered families; the steps between their parameters and ours are in `steps.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from ...encodings import Position
from ...errors import CheckpointError, ConfigError
from ...models.mae_names import State
from ...models.spec import Arguments
from ...models.swin.model import Swin
from ...models.timm_api import TimmModel, pair, pretrained_cfg_of
from ...models.unwrap import unwrapped_module
from ...models.vit import ViT
from ...resolution.apply import set_policy
from ...spec import join_blocks
from ..own_encoding import names_of, own_weights, with_own_options
from .names import create
from .read import Recipe, read, refusal
from .record import remember, without_source
from .steps import keep_training
from .swin import OWN_WORDS, from_timm_swin, to_timm_swin
from .weights import create_with
from .write import native_steps

OWN_ARGUMENTS = ("window", "global_blocks", "window_kind", "window_tables")  # of ours, which timm's models lack


def from_timm(
    model: str | nn.Module,
    position: Position | None = None,
    policy: str | None = None,
    pretrained: bool = False,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    *,
    temperature: str | None = None,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> ViT | Swin:
    """Our model with the weights of a timm model.

    Args:
        model: a timm name, or a timm model, built by a name or by its class; what torch.compile, DDP and averages of
            weights put around it is taken off.
        position: another encoding, or one for each block in turn; default: its own, so that logits are equal. The
            weights that are not position are kept either way, and the rows that a table adds to leading tokens stay
            with them. A word that names the model's own encoding, alone or in a sum, keeps its weights and options
            too, but for the options that it names: "learned(resize=dino)" is the trained table, "learned+rope" the same
            and a rotation.
        policy: of sizes it was not trained at, from now on (`set_policy`), measured from the size the weights come
            with; for a Swin also of its windows, "scale" or "keep+resize". Default: its family's: EVA-02 interpolates,
            tables are resized, rope-vit extrapolates, windows are kept.
        pretrained: for a name: load timm's weights, with timm's loader.
        img_size: make another size in pixels the model's own: tables are resized for good.
        patch_size: another patch: its kernel is resampled by the pseudo-inverse of resizing images (FlexiViT,
            arXiv 2212.08013), as timm does.
        temperature: with a policy, see `set_policy`.
        weights: for a name: a checkpoint to load, a path or a state_dict, in timm's names or in those of the original
            files that timm reads for that name (DINOv2, DINOv3, EVA, BEiT, BEiT-3, DeiT, CLIP, SigLIP, AIMv2, I-JEPA,
            RADIO, Perception Encoder, Swin, NaFlexViT, MAE's encoder, Google's .npz), or of rope-vit's. A file is read
            without running anything in it.
        kwargs: window, global_blocks, window_kind and window_tables are those of a `ViT`. Of a name, others are passed
            to `timm.create_model`. Of `weights` of other channels than `in_chans` the kernel of the patches is adapted
            as timm does; with `num_classes` a head for other classes is drawn anew. Both are logged.

    Raises:
        ConfigError: for a family or a part that is not covered, or a policy that the encoding cannot take.
        CheckpointError: for `weights` that do not fit the name.
    """
    if not isinstance(model, str | nn.Module):
        raise ConfigError(f"from_timm takes a name of timm's or a timm model, got {type(model).__name__}")
    own = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if name in kwargs}
    if not isinstance(model, str) and (pretrained or weights is not None or kwargs):
        extra = ", ".join([*["pretrained"] * pretrained, *["weights"] * (weights is not None), *kwargs])
        raise ConfigError(f"{extra} goes with a name, and a {type(model).__name__} was given: it keeps its weights")
    if temperature is not None and policy is None:
        raise ConfigError(f"temperature {temperature!r} goes with a policy: give policy= too")
    position = join_blocks(position)
    sizes = {n: pair(size) for n, size in dict(img_size=img_size, patch_size=patch_size).items() if size is not None}
    if not isinstance(model, str):
        theirs = unwrapped_module(model)
    elif weights is None:
        theirs = create(model, pretrained=pretrained, **kwargs)
    else:
        theirs = create_with(model, weights, sizes, pretrained=pretrained, **kwargs)
    if isinstance(theirs, TimmModel):
        raise ConfigError(f"a {type(theirs).__name__} is a model of ours already: use it as it is")
    if isinstance(model, str) and (not pretrained or weights is not None):
        # Drawn, or from a file: not the weights that timm names.
        vars(theirs)["pretrained_cfg"] = without_source(pretrained_cfg_of(theirs))
    if isinstance(theirs, SwinTransformer | SwinTransformerV2):
        if own:
            raise ConfigError(f"{', '.join(own)} goes with a ViT, and {type(theirs).__name__} has windows of its own")
        if isinstance(position, str):
            position = with_own_options(position, OWN_WORDS.get(type(theirs), position))
        swin = from_timm_swin(theirs, position)
        if policy is not None:
            set_policy(swin, policy, temperature=temperature)
        swin.set_input_size(img_size, patch_size)
        return swin
    recipe = read(theirs)
    if isinstance(position, str):
        position = with_own_options(position, recipe.position)
    same = position is None or (isinstance(position, str) and names_of(position) == names_of(recipe.position))
    arguments = recipe.arguments | sizes | own
    _check_size(theirs, arguments)
    built = recipe.position if position is None else position
    like = theirs.get_parameter("embeds.proj.weight" if hasattr(theirs, "embeds") else "patch_embed.proj.weight")
    with torch.device("meta") if like.is_meta else nullcontext():
        ours = recipe.model(built, **arguments)
    complete = _load(ours, theirs, recipe, position)
    if same and complete:
        ours.timm_steps = recipe.steps
    remember(ours, theirs, built, arguments)
    chosen = policy or (recipe.policy if same else None)
    if chosen is not None:
        set_policy(ours, chosen, temperature=temperature, train=recipe.grid)
    keep_training(ours, theirs, recipe.steps)
    return ours.to(like.device, like.dtype)


def _check_size(theirs: nn.Module, arguments: Arguments) -> None:
    """Refuse a size that the patch does not divide: timm leaves the rest out, ours takes whole patches."""
    size, patch = pair(arguments["img_size"]), pair(arguments["patch_size"])
    cut = tuple(side - side % p for side, p in zip(size, patch, strict=True))
    if cut != size and not arguments["dynamic_img_pad"]:
        raise refusal(
            theirs,
            f"its image of {size[0]}x{size[1]} is no multiple of its patch {patch[0]}x{patch[1]}, and timm leaves out "
            f"the rest, below and on the right; img_size={cut} makes it the same model of the images cut to that size",
        )


def _load(ours: ViT, theirs: nn.Module, recipe: Recipe, position: Position | None) -> bool:
    """Load their weights into ours; whether all of ours are theirs."""
    state: State = dict(theirs.state_dict())
    for step in recipe.steps:
        step.into(state)
    kernel = "patch_embed.proj.weight"
    if state[kernel].shape[-2:] != ours.patch_embed.patch_size:
        state[kernel] = resample_patch_embed(state[kernel], list(ours.patch_embed.patch_size))
    kept = {name: value for name, value in state.items() if position is None or "position." not in name}
    if isinstance(position, str) and {*chain(*names_of(position))} & {*chain(*names_of(recipe.position))}:
        kept |= _own_weights(recipe, position, state)
    missing, unexpected = ours.load_state_dict(kept, strict=False)
    lost = [name for name in missing if position is None or "position." not in name] + list(unexpected)
    if lost:
        raise CheckpointError(f"weights without a counterpart: {', '.join(lost[:5])}")
    return not missing


def _own_weights(recipe: Recipe, position: str, state: State) -> State:
    """The weights in `state` of the encodings of `position` that are the model's own, under the names they get."""
    with torch.device("meta"):
        own, new = (recipe.model(spec, **recipe.arguments) for spec in (recipe.position, position))
    return own_weights(own, new, state)


def to_timm(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model of ours under timm's names, for timm's model of the same function.

    A model that came through `from_timm` goes back to the family it came from. For others the encoding decides. Token
    terms, learned or a formula, become the flat `pos_embed` of the training grid, with rows of zeros
    for leading tokens, because they have no place here. That alone, or `none`, belongs to `VisionTransformer` (a
    distilled one to `VisionTransformerDistilled`). With or without it, `rope` (with `attn_type="rope"`), `rope_mixed`
    (`xy`) and `rope_dinov3` (half-split pairs) belong to `Eva`. `relative` (`rel_pos_type="bias"`) and `logcpb`
    ("mlp-swin", and with form=cr "mlp"; `rel_pos_dim` its hidden width) belong to `VisionTransformerRelPos`, shared or
    not.

    Raises:
        ConfigError: where timm has no such model, with the reason.
    """
    if isinstance(model, Swin):
        return to_timm_swin(model)
    if not isinstance(model, ViT):
        raise ConfigError(
            f"to_timm takes a ViT or a Swin of ours, got {type(model).__name__}: of a masked autoencoder give its "
            "`encoder`; text models go to torch's own Transformer by to_torch"
        )
    if model.windowing is not None:
        raise ConfigError(
            "timm has no ViT whose blocks attend within windows but samvit_*, which are not written: keep the model in "
            "its own names (state_dict)"
        )
    steps = native_steps(model) if model.timm_steps is None else model.timm_steps
    state: State = {n: v.detach() for n, v in model.state_dict().items() if not n.endswith("_extra_state")}
    for step in reversed(steps):
        step.back(state)
    return state
