"""Which parts of a model a policy reaches, and putting it there: `use_policy` for a while, `set_policy` for good.

The policies themselves are in `policies.py`. A policy is chosen at evaluation, for any encoding that can take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..encodings import PositionEncoding, encodings_of, named_encodings
from ..encodings.base import Overrides, Policy, Temperature, common_policies, overriding
from ..errors import ConfigError, not_ours, unknown
from ..spec import check_option, parse_terms
from .policies import POLICIES, TEMPERATURES, WHY_NOT
from .scaled import Extent, Keep

WINDOW_POLICIES = ("keep", "scale")
KeepChoice = Callable[[str, str | None, list[Extent], bool, bool], None]  # `TimmModel.record_policy`
PositionGroup = tuple[PositionEncoding, nn.Module, Extent]  # leading encoding, the part it leads, training extent


def policies_of(model: nn.Module) -> tuple[str, ...]:
    """The policies that every encoding of a model can take, the default first.

    "default" is what each does by itself, where that differs between the parts of a sum; so too for a module that is
    not ours. ("extrapolate",) for a model without positions.
    """
    found = encodings_of(model)
    without = ("extrapolate",) if named_encodings(model) else ("default",)
    common = common_policies(found) if found else without
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
        policy: "extrapolate", "interpolate", "interpolate(power=0.5)", "ntk", "yarn(beta_fast=2)",
            "resize(mode=plain)", or "default": each encoding does what it does by itself, or what `set_policy` made its
            own. Of several, "resize+interpolate", each takes the first that it can, tables `resize`. For a Swin also
            "keep" or "scale", what its windows do, alone or before one of these: "scale+interpolate".
        temperature: "log" (or True): logits times ln N / ln N_train; "yarn": times (0.1 ln s + 1)²; "log(power=0.5)".
            By default none; beside "default" the model's own.

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
        chosen = [] if policy == "default" else _policies(policy, extent)
        for encoding in encodings_of(part):
            taken = _taken(encoding, chosen)
            if chosen and taken is None:
                raise ConfigError(_refusal(type(encoding).__name__, chosen, encoding.policies, encoding.resizes))
            policies[encoding] = taken if chosen else encoding.own_policy
        factor = _temperature(temperature, extent)  # one for all its encodings
        temperatures[root] = root.own_temperature if factor is None and policy == "default" else factor
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


def set_policy(
    model: nn.Module, policy: str, *, temperature: str | bool | None = None, train: Extent | None = None
) -> None:
    """From now on `model` follows `policy` at sizes it was not trained at; "default" then means this.

    Every encoding that can take the policy does; a table beside a formula goes on being resized, where the formula
    interpolates too. No key of the state_dict changes: the choice is an argument of the model, with which timm,
    `save_model` and hub folders keep it.

    Args:
        policy: a specification as for `use_policy`, but for "default".
        temperature: as for `use_policy`.
        train: the grid that the policy scales to; default: what each part of the model was trained on. Of a model that
            did not come from timm it is not saved.

    Raises:
        ConfigError: for a policy that none of the encodings can take, with the reason; for `train` where windows have
            extents of their own.
    """
    groups, (windows, policy) = position_groups(model), _split(policy, model)
    if train is not None and windows_of(model):
        raise ConfigError(f"train is one grid, and {type(model).__name__} has windows of other extents: leave it out")
    if windows is None or policy != "default":
        restore_policy(
            model, policy, [tuple(train or extent) for _, _, extent in groups], temperature_word(temperature)
        )
    elif temperature_word(temperature) is not None:
        raise ConfigError(f"a temperature goes with a policy of encodings, {windows!r} is one of windows alone")
    _set_windows(model, windows)


def restore_policy(model: nn.Module, policy: str, extents: Sequence[Extent], temperature: str | None = None) -> None:
    """`set_policy` of the encodings alone, with what each part of the model (`position_groups`) measures from."""
    groups, able = position_groups(model), list[tuple[PositionEncoding, Keep]]()
    chosen: list[Keep] = []
    for (_, part, _), extent in zip(groups, extents, strict=True):
        chosen = _policies(policy, extent)
        able += [(e, taken) for e in encodings_of(part) if (taken := _taken(e, chosen)) is not None]
    if any(not e.resizes for e, _ in able):
        able = [(e, taken) for e, taken in able if not e.resizes or taken.name != "interpolate"]
    if not able:
        found = dict.fromkeys(type(encoding).__name__ for encoding in encodings_of(model))
        resizes = [word for encoding in encodings_of(model) for word in encoding.resizes]
        raise ConfigError(
            _refusal(", ".join(found) or "a model without positions", chosen, policies_of(model), resizes)
        )
    factors = [_temperature(temperature, extent) for extent in extents]
    for encoding, taken in able:
        encoding.own_policy = taken
    for (lead, _, _), factor in zip(groups, factors, strict=True):
        lead.own_temperature = factor
    mine = {id(encoding) for encoding, _ in able}
    measured = {id(lead): tuple(extent) for (lead, _, _), extent in zip(groups, extents, strict=True)}
    for owner in model.modules():  # the model, or those inside of it, that are saved from a record
        keep: KeepChoice | None = getattr(owner, "record_policy", None)
        inside = {id(encoding) for encoding in encodings_of(owner)}
        if keep is not None and not mine.isdisjoint(inside):
            own = [(measured.get(id(lead), extent), extent) for lead, _, extent in position_groups(owner)]
            usual = all(tuple(extent) == tuple(trained) for extent, trained in own)
            keep(policy, temperature, [extent for extent, _ in own], usual, inside <= mine)
    if getattr(model, "record_policy", None) is None:  # of text, or one that holds an encoder: no argument names it
        usual = all(tuple(extent) == tuple(trained) for (_, _, trained), extent in zip(groups, extents, strict=True))
        before, whole = kept_policy(model), {id(encoding) for encoding in encodings_of(model)} <= mine
        word = policy if whole or before is None else f"{policy}+{before[0]}"
        vars(model)["kept_policy"] = (word, temperature) if usual else None


def kept_policy(model: nn.Module) -> tuple[str, str | None] | None:
    """What `set_policy` made the own policy of a model without a record: the policy, and the temperature."""
    kept: tuple[str, str | None] | None = vars(model).get("kept_policy")
    return kept


def _taken(encoding: PositionEncoding, chosen: Sequence[Keep]) -> Keep | None:
    """The first of several policies that an encoding can take; a table is resized where that is among them."""
    # A part of a table is no policy for every other size, and so none of its `policies`.
    policies = (*encoding.policies, "subtable") if encoding.resizes else encoding.policies
    able = [p for p in chosen if p.kind in policies and getattr(p, "mode", None) in (None, *encoding.resizes)]
    last = "interpolate" if encoding.resizes else ""
    found = next((p for p in able if p.name != last), able[0] if able else None)
    return found if found is None or encoding.along is None else found.on(encoding.along)


def _refusal(who: str, chosen: Sequence[Keep], policies: Sequence[str], resizes: Sequence[str]) -> str:
    policy = chosen[0]
    if policy.kind in policies:
        return f"{who} has no table that is resized by {getattr(policy, 'mode', '')}; its ways are {', '.join(resizes)}"
    return f"{who} cannot {policy.name}: {WHY_NOT[policy.name]}; it can {' or '.join(policies)}"


def _policies(spec: str, train: Extent) -> list[Keep]:
    found = []
    for name, options in parse_terms(spec, "policy", [*POLICIES, "default"]):
        if name == "default":
            raise ConfigError(f"a policy is one name or several, such as 'interpolate(align=corner)'; got {spec!r}")
        kind = POLICIES[name]
        allowed = [field for field in kind.__dataclass_fields__ if field not in ("train", "name")]
        for option in options:
            if option not in allowed:
                raise unknown(f"option of {name}", option, allowed or ["(it takes none)"])
            check_option(kind, option, options[option])
        found.append(kind(train, name=name, **options))
    return found


def temperature_word(temperature: str | bool | None) -> str | None:
    """ "log" for True; None for no temperature."""
    if temperature in (None, False, "none"):
        return None
    return "log" if temperature is True else str(temperature)


def _temperature(spec: str | bool | None, train: Extent) -> Temperature | None:
    word = temperature_word(spec)
    if word is None:
        return None
    (name, options), *more = parse_terms(word, "temperature", ["none", *TEMPERATURES])
    if more or name == "none":
        raise ConfigError(f"a temperature is one word, such as 'log(power=0.5)', got {word!r}")
    for option in options:
        if option != "power":
            raise unknown(f"option of {name}", option, ["power"])
        check_option(TEMPERATURES[name], option, options[option])
    power = options.get("power", 1.0)
    return TEMPERATURES[name](train, float(power) if isinstance(power, int | float) else 1.0)
