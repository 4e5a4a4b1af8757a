"""Which parts of a model a policy reaches, and putting it there: `use_policy` for a while, `set_policy` for good.

The policies themselves are in `policies.py`. A policy is chosen at evaluation, for any encoding that can take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..encodings import PositionEncoding, encodings_of, named_encodings
from ..encodings.base import Overrides, Policy, Temperature, overriding
from ..errors import ConfigError, not_ours, unknown
from ..spec import check_option, parse_terms
from .policies import POLICIES, TEMPERATURES, WHY_NOT, Extent, Keep

WINDOW_POLICIES = ("keep", "scale")
PositionGroup = tuple[PositionEncoding, nn.Module, Extent]  # leading encoding, the part it leads, training extent


def policies_of(model: nn.Module) -> tuple[str, ...]:
    """The policies that every encoding of a model can take, the default first.

    ("default",) where the parts of a sum have none in common and each does what it does by itself; so too for a
    module that is not ours. ("extrapolate",) for a model without positions.
    """
    found = encodings_of(model)
    common: tuple[str, ...]
    if not found:
        common = ("extrapolate",) if named_encodings(model) else ("default",)
    else:
        common = tuple(p for p in found[0].policies if all(p in e.policies for e in found)) or ("default",)
    return tuple(f"{window}+{p}" for window in windows_of(model) for p in common) or common


def windows_of(model: nn.Module) -> tuple[str, ...]:
    """What the windows of a model can do at another size, the model's own first; () where it has none."""
    found = _windowed(model)
    own = found[0].window_policy if found else ""
    return (own, *(policy for policy in WINDOW_POLICIES if policy != own)) if found else ()


def _windowed(model: nn.Module) -> list[Any]:
    """The model, or what is in it, that has windows: a Swin, also within a SimMIM."""
    return [
        module for module in model.modules() if hasattr(module, "window_policy") and hasattr(module, "position_groups")
    ]


def _stages(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that have windows of one size: stages of a Swin."""
    return [module for module in model.modules() if hasattr(module, "own_window_policy")]


def position_groups(model: nn.Module) -> list[PositionGroup]:
    """For each part with places of its own: the encoding that leads it, the part, the extent it was trained on.

    Swin and MAE have a method of this name; a module with a `position` and a `train_grid` is one group; a module that
    holds such modules (Seq2Seq, SimMIM, a wrapper) has theirs.

    Raises:
        ConfigError: for a model without any.
    """
    if found := _groups(model):
        return found
    raise not_ours(model, "has no train_grid, the grid that a policy scales to")


def _groups(model: nn.Module) -> list[PositionGroup]:
    own: Callable[[], list[PositionGroup]] | None = getattr(model, "position_groups", None)
    if own is not None:
        return own()
    position, train_grid = getattr(model, "position", None), getattr(model, "train_grid", None)
    if isinstance(position, PositionEncoding) and train_grid is not None:
        return [(position, model, tuple(train_grid))]
    return [group for child in model.children() for group in _groups(child)]


@contextmanager
def use_policy(model: nn.Module, policy: str = "default", *, temperature: str | bool | None = None) -> Iterator[None]:
    """Within this context every encoding of `model` follows `policy` at sizes it was not trained at.

    Args:
        model: a model of ours, which remembers its `train_grid`, or what holds one (SimMIM, a wrapper).
        policy: "extrapolate", "interpolate", "interpolate(align=corner)", "ntk", "yarn(beta_fast=2)",
            "resize", or "default": each encoding does what it does by itself, or what `set_policy` made its own. For a
            Swin also "keep" or "scale", what its windows do, alone or before one of these: "scale+interpolate".
        temperature: "log" (or True): logits times ln N / ln N_train; "yarn": times (0.1 ln s + 1)².

    It holds for the thread or asyncio task that entered it, whatever other threads do with the same model meanwhile,
    and contexts may be left in any order. No key of the state_dict changes. With gradient checkpointing the backward
    pass computes blocks again, under the policy of their forward.

    Raises:
        ConfigError: for a policy that one of the encodings cannot take, with the reason.
    """
    windows, policy = _split(policy, model)
    policies: dict[nn.Module, Policy | None] = {}
    temperatures: dict[nn.Module, Temperature | None] = {}
    for root, part, extent in position_groups(model):
        chosen = None if policy == "default" else _policy(policy, extent)
        for encoding in encodings_of(part):
            if chosen is not None and chosen.name not in encoding.policies:
                raise ConfigError(
                    f"{type(encoding).__name__} cannot {chosen.name}: {WHY_NOT[chosen.name]}; "
                    f"it can {' or '.join(encoding.policies)}"
                )
            policies[encoding] = encoding.own_policy if policy == "default" else chosen
        temperatures[root] = _temperature(temperature, extent)  # one factor for all its encodings
    window_policies = {} if windows is None else dict.fromkeys(_stages(model), windows)
    with overriding(Overrides(policies, temperatures, window_policies=window_policies)):
        yield


def _split(spec: str, model: nn.Module) -> tuple[str | None, str]:
    """What windows do (None: as before) and what encodings do, of "scale+interpolate", "scale" or "interpolate"."""
    if not isinstance(spec, str):
        raise ConfigError(f"a policy is a word, such as 'ntk' or 'interpolate', got {spec!r}")
    first, _, rest = spec.partition("+")
    if first.strip() not in WINDOW_POLICIES:
        return None, spec
    if not windows_of(model):
        raise ConfigError(f"policy {spec!r} says what windows do, and {type(model).__name__} has none")
    return first.strip(), rest.strip() or "default"


def _set_windows(model: nn.Module, policy: str | None) -> None:
    if policy is not None:
        for part in _windowed(model):
            part.window_policy = policy


def set_policy(model: nn.Module, policy: str, *, train: Extent | None = None) -> None:
    """From now on `model` follows `policy` at sizes it was not trained at; "default" then means this.

    Every encoding that can take the policy does; a table beside a formula goes on being resized. No key of the
    state_dict changes, so the policy is not saved with the weights.

    Args:
        policy: a specification as for `use_policy`, but for "default".
        train: the grid that the policy scales to; default: what each part of the model was trained on.

    Raises:
        ConfigError: for a policy that none of the encodings can take, with the reason; for `train` where windows have
            extents of their own.
    """
    groups, (windows, policy) = position_groups(model), _split(policy, model)
    if train is not None and windows_of(model):
        raise ConfigError(f"train is one grid, and {type(model).__name__} has windows of other extents: leave it out")
    if windows is None or policy != "default":
        restore_policy(model, policy, [tuple(train or extent) for _, _, extent in groups])
    _set_windows(model, windows)


def restore_policy(model: nn.Module, policy: str, extents: Sequence[Extent]) -> None:
    """`set_policy` of the encodings alone, with what each part of the model (`position_groups`) measures from."""
    groups, able = position_groups(model), []
    for (_, part, _), extent in zip(groups, extents, strict=True):
        chosen = _policy(policy, extent)
        able += [(encoding, chosen) for encoding in encodings_of(part) if chosen.name in encoding.policies]
    if not able:
        found = dict.fromkeys(type(encoding).__name__ for encoding in encodings_of(model))
        raise ConfigError(
            f"{', '.join(found) or 'a model without positions'} cannot {chosen.name}: {WHY_NOT[chosen.name]}; "
            f"it can {' or '.join(policies_of(model))}"
        )
    for encoding, chosen in able:
        encoding.own_policy = chosen
    measured = {id(lead): extent for (lead, _, _), extent in zip(groups, extents, strict=True)}
    for owner in model.modules():  # the model, or those inside of it, that timm saves from a record
        keep: Callable[[str, list[Extent]], None] | None = getattr(owner, "record_policy", None)
        if keep is not None and not {id(e) for e, _ in able}.isdisjoint(map(id, encodings_of(owner))):
            keep(policy, [measured.get(id(lead), extent) for lead, _, extent in position_groups(owner)])


def _policy(spec: str, train: Extent) -> Keep:
    (name, options), *more = parse_terms(spec, "policy", [*POLICIES, "default"])
    if more or name == "default":
        raise ConfigError(f"a policy is one name, such as 'interpolate(align=corner)'; got {spec!r}")
    kind = POLICIES[name]
    allowed = [field for field in kind.__dataclass_fields__ if field not in ("train", "name")]
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {name}", option, allowed or ["(it takes none)"])
        check_option(kind, option, options[option])
    return kind(train, name=name, **options)


def _temperature(spec: str | bool | None, train: Extent) -> Temperature | None:
    if spec in (None, False, "none"):
        return None
    name = "log" if spec is True else str(spec)
    if name not in TEMPERATURES:
        raise unknown("temperature", name, ["none", *TEMPERATURES])
    return TEMPERATURES[name](train)
