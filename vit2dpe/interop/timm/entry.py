"""`timm.create_model("vit2dpe_from_timm", ...)`: from a base of timm's, or from the record in a folder.

Without a record `from_timm` makes the model, on the meta device where it loads no weights, and ours is built from the
record of that one: both ways lead to the same model. `record.py` has what a record holds.
"""

from __future__ import annotations

import json
from typing import Any, cast

import timm
import torch
from timm.models import build_model_with_cfg, get_pretrained_cfg

from ...errors import ConfigError
from ...models import weights as vit_weights
from ...models.mae_names import State
from ...models.spec import Arguments
from ...models.swin import weights as swin_weights
from ...models.timm_api import PretrainedCfg
from .convert import from_timm
from .record import NAME, Model, Record, checked, config_of, is_rate, rebuild, record_of

UNTRAINED = "untrained"  # the tag of the name without a base
OF_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir")
OF_FEATURES = ("features_only", "out_indices", "feature_cls")
PLACEMENT = ("device", "dtype")
AT_RUN_TIME = ("dynamic_img_size", "dynamic_img_pad")  # timm's models take other sizes, or do not; ours do in any case


def create(pretrained: bool, kwargs: Arguments) -> Model:
    """What the entry point returns; see there."""
    base, record = kwargs.pop("base", None), kwargs.pop("record", None)
    if not isinstance(base, str):
        raise ConfigError(
            f"{NAME} needs base=, timm's name of a model, such as base='vit_tiny_patch16_224'; got {base}"
        )
    timms = {name: kwargs.pop(name) for name in OF_TIMM if name in kwargs}
    features = {name: kwargs.pop(name) for name in OF_FEATURES if name in kwargs}
    own = _own_weights(timms)
    weights: State | None = None
    changes, of_base = kwargs, None
    if record is None:
        donor = _donor(base, kwargs, pretrained and not own, timms.get("cache_dir"))
        record, changes = _asked(donor, kwargs)
        of_base, weights = donor.pretrained_cfg, donor.state_dict() if pretrained and not own else None
    elif pretrained and not own:
        raise ConfigError(f"no weights were named beside the record of {base}: pretrained_cfg_overlay=dict(file=...)")
    record = checked(record)

    def make(**_: Any) -> Model:
        model = rebuild(base, record, changes)
        if weights is not None:
            model.load_state_dict(weights)
        return model

    arguments = record["arguments"] | changes
    is_swin = record["kind"] == "Swin"
    cfg = _config(of_base or _config_of_base(base, record), timms.get("pretrained_cfg"))
    model: Model = build_model_with_cfg(
        make,
        NAME,
        pretrained and own,
        **{**timms, "pretrained_cfg": cfg},
        pretrained_filter_fn=swin_weights.checkpoint_filter_fn if is_swin else vit_weights.checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(len(arguments["depths"]))) if is_swin else 3, feature_cls="getter"),
        in_chans=arguments["in_chans"],
        num_classes=arguments["num_classes"],
        **features,
    )
    return model


def _own_weights(timms: Arguments) -> bool:
    """Whether timm was told of weights under our names: a folder, a file, a repository, a state_dict."""
    given = [cfg for cfg in (timms.get("pretrained_cfg"), timms.get("pretrained_cfg_overlay")) if isinstance(cfg, dict)]
    return any(cfg.get(place) for cfg in given for place in ("url", "file", "state_dict", "hf_hub_id"))


def _donor(base: str, kwargs: Arguments, pretrained: bool, cache_dir: str | None) -> Model:
    """The model that `from_timm` makes of these arguments; on the meta device where it gives no weights."""
    given = {name: value for name, value in kwargs.items() if name not in (*PLACEMENT, *AT_RUN_TIME)}
    if "weights" in given:
        raise ConfigError(f"{NAME} takes files of our names, checkpoint_path=...; vit2dpe.from_timm takes weights=")
    if pretrained:
        return from_timm(base, pretrained=True, **given | ({} if cache_dir is None else {"cache_dir": cache_dir}))
    with torch.device("meta"):
        return from_timm(base, **given)


def _asked(donor: Model, kwargs: Arguments) -> tuple[Record, Arguments]:
    """The donor's record, and those of the arguments that it does not hold."""
    record = record_of(donor)
    if record is None:
        raise ConfigError(f"{type(donor).__name__} did not come from timm")
    changes = {name: value for name, value in kwargs.items() if name in (*PLACEMENT, *AT_RUN_TIME) or is_rate(name)}
    asked = {name: value for name, value in kwargs.items() if name not in changes and _can_be_written(value)}
    if "position" not in record:
        changes["position"] = kwargs["position"]
    return {**record, "asked": asked}, changes


def _can_be_written(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _config_of_base(base: str, record: Record) -> PretrainedCfg:
    known = get_pretrained_cfg(base) if timm.is_model(base.partition(".")[0]) else None
    return config_of({} if known is None else known.to_dict(), record["kind"], record["arguments"])


def _config(of_base: PretrainedCfg, given: Arguments | str | None) -> PretrainedCfg:
    """timm's record of the weights: that of the folder they are in, or that of the base and what was said beside it."""
    said = given if isinstance(given, dict) else {}
    if said and said.get("tag") != UNTRAINED:
        return cast("PretrainedCfg", said | {"architecture": NAME})
    none = get_pretrained_cfg(NAME).to_dict()
    changed = {name: value for name, value in said.items() if none.get(name) != value}
    return cast("PretrainedCfg", {**of_base, **changed})
