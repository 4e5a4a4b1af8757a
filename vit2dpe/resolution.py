"""What happens at a resolution a model was not trained at: `use_policy` chooses, `sweep` measures.

The policies themselves are in `policies.py`. A policy is chosen at evaluation, for any encoding that can take it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encodings import PositionEncoding, Sum, check_option, parse
from .errors import ConfigError, unknown
from .policies import POLICIES, TEMPERATURES, WHY_NOT, Extent, Keep

Size = tuple[int, int]
MODES = ("scale", "canvas")
WINDOW_POLICIES = ("keep", "scale")
Scope = tuple[PositionEncoding, nn.Module, Extent]  # what leads a part of a model, the part, its training extent


def encodings_of(model: nn.Module) -> list[PositionEncoding]:
    """Every encoding of a model that does something, shared and per block, sums taken apart."""
    return [e for e in model.modules() if isinstance(e, PositionEncoding) and e.gives and not isinstance(e, Sum)]


def policies_of(model: nn.Module) -> tuple[str, ...]:
    """The policies that every encoding of a model can take, the default first.

    ("default",) where the parts of a sum have none in common and each does what it does by itself; so too for a
    module that is not ours. ("extrapolate",) for a model without positions.
    """
    found = encodings_of(model)
    common: tuple[str, ...]
    if not found:
        common = ("extrapolate",) if any(isinstance(e, PositionEncoding) for e in model.modules()) else ("default",)
    else:
        common = tuple(p for p in found[0].policies if all(p in e.policies for e in found)) or ("default",)
    return tuple(f"{window}+{p}" for window in windows_of(model) for p in common) or common


def windows_of(model: nn.Module) -> tuple[str, ...]:
    """What the windows of a model can do at another size, the model's own first; () where it has none."""
    own = getattr(model, "window_policy", None)
    return () if own is None else (own, *(policy for policy in WINDOW_POLICIES if policy != own))


@contextmanager
def use_policy(model: nn.Module, policy: str = "default", *, temperature: str | bool | None = None) -> Iterator[None]:
    """Within this context every encoding of `model` follows `policy` at sizes it was not trained at.

    Args:
        model: a model of ours; it remembers its `train_grid`. Or a module that holds such parts, as an
            `nn.Transformer` does after `stock.attach`: each part then scales to its own.
        policy: a word: "extrapolate", "interpolate", "interpolate(align=corner)", "ntk", "yarn(beta_fast=2)",
            "resize", or "default": each encoding does what it does by itself, or what `set_policy` made its own. For a
            Swin also "keep" or "scale", what its windows do, alone or before one of these: "scale+interpolate".
        temperature: "log" (or True): logits times ln N / ln N_train; "yarn": times (0.1 ln s + 1)².

    Changes no key of the state_dict, and on leaving puts back what was there. With gradient checkpointing the backward
    pass computes blocks again, so it has to run inside the context too.

    Raises:
        ConfigError: for a policy that one of the encodings cannot take, with the reason.
    """
    # An encoder and a decoder have a root each; a Swin says itself what it consists of.
    roots: list[Any] = [m for m in model.modules() if hasattr(m, "position") and hasattr(m, "train_grid")]
    train = getattr(model, "train_grid", None)
    if train is None and not roots:
        raise ConfigError(f"{type(model).__name__} has no train_grid, the grid that a policy scales to")
    windows, policy = _split(policy, model)
    own: list[Scope] = [(root.position, root, tuple(train or root.train_grid)) for root in roots]
    scopes: list[Scope] = model.scopes() if hasattr(model, "scopes") else own  # type: ignore[operator]
    before = [(encoding, encoding.policy) for encoding in encodings_of(model)]
    before_heat = [(root, root.temperature) for root, _, _ in scopes]
    before_windows = getattr(model, "window_policy", None)
    try:
        for root, part, extent in scopes:
            chosen = None if policy == "default" else _policy(policy, extent)
            for encoding in encodings_of(part):
                if chosen is not None and chosen.name not in encoding.policies:
                    raise ConfigError(
                        f"{type(encoding).__name__} cannot {chosen.name}: {WHY_NOT[chosen.name]}; "
                        f"it can {' or '.join(encoding.policies)}"
                    )
                encoding.policy = encoding.own_policy if policy == "default" else chosen
            root.temperature = _temperature(temperature, extent)  # one factor for all its encodings
        if windows is not None:
            model.window_policy = windows  # type: ignore[assignment]
        yield
    finally:
        for encoding, policy_before in before:
            encoding.policy = policy_before
        for root, heat in before_heat:
            root.temperature = heat
        if windows is not None:
            model.window_policy = before_windows  # type: ignore[assignment]


def _split(word: str, model: nn.Module) -> tuple[str | None, str]:
    """What windows do (None: as before) and what encodings do, of "scale+interpolate", "scale" or "interpolate"."""
    first, _, rest = word.partition("+")
    if first.strip() not in WINDOW_POLICIES:
        return None, word
    if not windows_of(model):
        raise ConfigError(f"policy {word!r} says what windows do, and {type(model).__name__} has none")
    return first.strip(), rest.strip() or "default"


def set_policy(model: nn.Module, policy: str, *, train: Extent | None = None) -> None:
    """From now on `model` follows `policy` at sizes it was not trained at; "default" then means this.

    Every encoding that can take the policy does; a table beside a formula goes on being resized. No key of the
    state_dict changes, so the policy is not saved with the weights.

    Args:
        policy: a word as for `use_policy`, but for "default".
        train: the grid that the policy scales to; default: the model's `train_grid`.

    Raises:
        ConfigError: for a policy that none of the encodings can take, with the reason.
    """
    train = train or getattr(model, "train_grid", None)
    if train is None:
        raise ConfigError(f"{type(model).__name__} has no train_grid, the grid that a policy scales to")
    chosen, found = _policy(policy, tuple(train)), encodings_of(model)
    able = [encoding for encoding in found if chosen.name in encoding.policies]
    if not able:
        names = ", ".join(dict.fromkeys(type(encoding).__name__ for encoding in found)) or "a model without positions"
        raise ConfigError(
            f"{names} cannot {chosen.name}: {WHY_NOT[chosen.name]}; it can {' or '.join(policies_of(model))}"
        )
    for encoding in able:
        encoding.policy = encoding.own_policy = chosen


def _policy(word: str, train: Extent) -> Keep:
    (name, options), *more = parse(word, "policy", [*POLICIES, "default"])
    if more or name == "default":
        raise ConfigError(f"a policy is one name, such as 'interpolate(align=corner)'; got {word!r}")
    kind = POLICIES[name]
    allowed = [field for field in kind.__dataclass_fields__ if field not in ("train", "name")]
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {name}", option, allowed or ["(it takes none)"])
        check_option(kind, option, options[option])
    return kind(train, name=name, **options)


def _temperature(word: str | bool | None, train: Extent):
    if word in (None, False, "none"):
        return None
    name = "log" if word is True else str(word)
    if name not in TEMPERATURES:
        raise unknown("temperature", name, ["none", *TEMPERATURES])
    return TEMPERATURES[name](train)


def sweep(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    sizes: Sequence[Size],
    policies: Sequence[str] | None = None,
    *,
    modes: Sequence[str] = ("scale",),
    temperatures: Sequence[str] = ("none",),
    train_size: Size | None = None,
    crop: float = 1.0,
) -> list[dict[str, Any]]:
    """Accuracy of a classifier at other sizes: one row for each size, mode, policy and temperature.

    Args:
        model: any module from images (B, C, H, W) to logits (B, classes); policies need one of ours.
        data: batches (images, labels), normalised as the model wants them, iterated once for each row.
        sizes: (height, width) in pixels; rectangles too.
        policies: words for `use_policy`; default: all that the model can take.
        modes: "scale": the same picture with more pixels (it is resized to the size). "canvas": more content at the
            scale of training (the picture at the training size in the middle, continued by its mirror image; smaller
            canvases see its middle). The two answer different questions and are never mixed in a row.
        train_size: (height, width) of training; default: the model's.
        crop: the centre share of each side that is kept, the same for all sizes.

    Returns:
        rows with mode, policy, temperature, train_height, train_width, height, width, top1 (percent), loss (nats), n.
    """
    for mode in modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
    train_size = train_size or train_size_of(model)
    ours = any(isinstance(module, PositionEncoding) for module in model.modules())
    rows = []
    for mode in modes:
        for policy in policies or policies_of(model):
            for temperature in temperatures:
                for size in sizes:
                    batches = ((fit_size(x, size, mode, train_size, crop), y) for x, y in data)
                    if ours:
                        with use_policy(model, policy, temperature=temperature):
                            score = evaluate(model, batches)
                    elif policy == "default" and temperature == "none":
                        score = evaluate(model, batches)
                    else:
                        raise ConfigError(
                            f"policy {policy!r} with temperature {temperature!r} needs a model of ours; "
                            f"{type(model).__name__} runs with 'default' and 'none' only"
                        )
                    rows.append(
                        dict(
                            policy=policy,
                            temperature=temperature,
                            mode=mode,
                            train_height=train_size[0],
                            train_width=train_size[1],
                            height=size[0],
                            width=size[1],
                            **score,
                        )
                    )
    return rows


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], top: Sequence[int] = (1,)) -> dict[str, Any]:
    """{"top1": percent, "loss": nats, "n": images} of a classifier in evaluation mode; its mode is put back.

    Args:
        top: for each k how often the label is among the k likeliest classes, as "topk".
    """
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right, loss, n = dict.fromkeys(top, 0), 0.0, 0
    try:
        for images, labels in batches:
            logits, labels = model(images.to(device)).float(), labels.to(device)
            for k in top:
                likeliest = logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices
                right[k] += int((likeliest == labels[:, None]).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            n += len(labels)
    finally:
        model.train(was_training)
    if n == 0:
        raise ConfigError("no images to evaluate: the data are empty, or an iterator that was used up")
    return {f"top{k}": 100 * hits / n for k, hits in right.items()} | {"loss": loss / n, "n": n}


def fit_size(images: Tensor, size: Size, mode: str, train_size: Size, crop: float = 1.0) -> Tensor:
    """(B, C, H, W) -> (B, C, *size) by one of the two modes of `sweep`."""
    if crop < 1:
        h, w = (max(1, round(side * crop)) for side in images.shape[-2:])
        top, left = (images.shape[-2] - h) // 2, (images.shape[-1] - w) // 2
        images = images[..., top : top + h, left : left + w]
    if mode == "scale":
        return _resize(images, size)
    images = _resize(images, train_size)
    for dim, (side, train) in zip((-2, -1), zip(size, train_size, strict=True), strict=True):
        index = torch.arange(side, device=images.device) + (train - side) // 2
        index = index.remainder(2 * train)
        images = images.index_select(dim, torch.where(index < train, index, 2 * train - 1 - index))
    return images


def _resize(images: Tensor, size: Size) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def train_size_of(model: nn.Module) -> Size:
    """The size in pixels a model was trained at: ours remember it, timm's say it in their config."""
    if hasattr(model, "train_grid") and hasattr(model, "patch_embed"):
        (rows, cols), (high, wide) = model.train_grid, model.patch_embed.patch_size  # type: ignore[misc, union-attr]
        return rows * high, cols * wide
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg and cfg.get("input_size"):
        return cfg["input_size"][-2], cfg["input_size"][-1]
    raise ConfigError(
        f"{type(model).__name__} does not say the size it was trained at: give train_size=(height, width)"
    )


def parse_size(text: str | int) -> Size:
    """(height, width) of "32" or "32x48"."""
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"a size is written 32 or 32x48 (height x width, pixels), got {text!r}")
    return int(parts[0]), int(parts[-1])
