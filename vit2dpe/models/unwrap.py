"""What wrappers and training scripts put around a state_dict and in front of its names, taken off again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from .mae_names import State

Rest = dict[str, str] | bool | list[str]  # further arguments of a load pre-hook

# Under which files keep their tensors. Where there is an average beside them it is taken, as timm does.
KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
# Parts of a dotted name that belong to torch.compile, FSDP, activation checkpointing and Lightning's Fabric, wherever
# they stand: blocks and layers are wrapped one by one too.
INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# What holds a model as a whole: DDP, timm's and torch's averages; a LightningModule.
IN_FRONT = ("module.", "model.")


def unwrapped(state_dict: Mapping[str, Tensor]) -> State:
    """The tensors by name, of a file that may keep them under "model" or the like, without the prefixes of wrappers.

    `module.` is taken off name by name, `model.` where every name has it; both as often as they are there. The count of
    torch's AveragedModel is left out.
    """
    state_dict = cast("Mapping[str, Tensor]", innermost(state_dict))
    state = {_without_parts(name): value for name, value in state_dict.items()}
    if any(name.startswith("module.") for name in state):
        state.pop("n_averaged", None)
    for _ in range(8):  # nested: a compiled model in DDP in a LightningModule
        shared = [prefix for prefix in IN_FRONT if state and all(name.startswith(prefix) for name in state)]
        if not shared:
            break
        state = {name.removeprefix(shared[0]): value for name, value in state.items()}
    return {name.removeprefix("module."): value for name, value in state.items()}


def innermost(file: Mapping[str, object]) -> Mapping[str, object]:
    """What a file keeps under "model" or the like, however deep; the average of the weights where it has one."""
    while key := next((key for key in KEYS if isinstance(file.get(key), Mapping) and file[key]), None):
        file = cast("Mapping[str, object]", file[key])
    return file


def _without_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INSIDE) if "_" in name else name


def unwrapped_module(model: nn.Module) -> nn.Module:
    """The model that torch.compile, DDP, FSDP or an average of weights was put around, however nested."""
    while inner := next((part for n, part in model.named_children() if n in INSIDE | {"module"}), None):
        model = inner
    return model


def rewrite(state_dict: State, state: State) -> None:
    """Replace the contents of `state_dict` by `state`, where names differ."""
    if state.keys() != state_dict.keys():
        state_dict.clear()
        state_dict.update(state)


def unwrap_names(module: nn.Module, state_dict: State, prefix: str, *_: Rest) -> None:
    """Load pre-hook, in place, of models that read nobody else's names."""
    if not prefix:
        rewrite(state_dict, unwrapped(state_dict))
