"""`vit2dpe probe`: what a frozen encoder's features are worth: a linear classifier and k nearest neighbours on them.

    linear   logits = W (f - mean) / std + b; mean and std over the training features (an affine-free BatchNorm1d)
    k-NN     votes of the k most similar training features, weighted by exp(cosine similarity / 0.07)

Sources: linear probe with BatchNorm as in MAE (arXiv 2111.06377); weighted k-NN, Wu et al., arXiv 1805.01978. How ours
differs: features are computed once, of images as they are, so nothing is augmented; the linear map is found by
L-BFGS with a small L2 penalty chosen on a tenth of the training images, which needs no learning rate.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets import load_images, normalize
from ..data.splits import resize
from ..errors import ConfigError, unknown
from ..files import write_atomically
from ..seeding import generator
from ..spec import parse_size
from ..training.checkpoint import load_run
from ..training.devices import pick_device
from .settings import ProbeConfig

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
TEMPERATURE = 0.07


def probe(config: ProbeConfig, command: str = "vit2dpe probe") -> Path:
    """Measure the features of a run; write `probe.csv` beside it and print it.

    Args:
        config: settings; the data are the run's own where nothing else is said.
        command: what was typed, for the record.

    Returns:
        the path of the table, with a row for each method and pooling: method, pool, top1, setting, n_train, n_test.

    Raises:
        ConfigError, DataError, CheckpointError: for what cannot work.
    """
    if config.run is None:
        raise ConfigError("say which run: vit2dpe probe --run runs/pretrain")
    if config.pool not in (None, "avg", "token", "both"):
        raise unknown("pool", str(config.pool), ("avg", "token", "both"))
    folder = Path(config.run).expanduser()
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    model: Any = load_run(folder, device, which=config.which)
    about = model.about
    if lacking := [name for name in ("data", "mean", "std", "train_size") if name not in about]:
        raise ConfigError(
            f"{folder} holds a {about['model']} and says nothing of {', '.join(lacking)}: probed is what saw images"
        )
    model = getattr(model, "encoder", model)
    data = load_images(**data_of(config, folder, about["data"]))
    if len(data.mean) != len(about["mean"]):
        raise ConfigError(f"the run saw images of {len(about['mean'])} channels, these have {len(data.mean)}")
    if config.data is None and data.digest != about["digest"]:
        print(f"note: not all of the images the run saw, or others: {len(data.train)} for training the probe")
    size = tuple(about["train_size"])
    pools = {"both": ["avg", "token"], None: ["avg"]}.get(config.pool, [str(config.pool)])
    rows = []
    for pool in pools:
        train, test = (
            features(model, split.pixels(torch.arange(len(split))), about["mean"], about["std"], size=size, pool=pool)
            for split in (data.train, data.test)
        )
        linear = linear_probe(train, data.train.labels, test, data.test.labels)
        knn = knn_probe(train, data.train.labels, test, data.test.labels, config.k)
        for method, found, setting in (("linear", linear, "penalty"), ("knn", knn, "k")):
            row = dict(method=method, pool=pool, top1=round(found["top1"], 2), setting=f"{setting}={found[setting]:g}")
            rows.append(row | dict(n_train=len(train), n_test=len(test)))
            print(f"{method:6}  {pool:5}  top-1 {found['top1']:.2f}%  ({row['setting']})")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "probe.csv", text.getvalue().encode())
    return folder / "probe.csv"


def data_of(config: ProbeConfig, folder: Path, name: str) -> dict[str, Any]:
    """Arguments of `load_images`: what the probe is told, else what the run was."""
    import yaml

    path = folder / "config.yaml"
    before: dict[str, Any] = {}
    seed = 0
    if config.data is None and path.is_file():
        settings = yaml.safe_load(path.read_text()) or {}
        before, seed = settings.get("data") or {}, (settings.get("run") or {}).get("seed") or 0
    source = before.get("source_size")
    given = dict(
        name=config.data or name,
        root=config.root or before.get("root"),
        source_size=None if source is None else parse_size(source),
    )
    for limit in ("limit_train", "limit_test"):
        told = getattr(config, limit)
        given[limit] = before.get(limit) if told is None else told
    given |= dict(val_fraction=before.get("val_fraction") or 0.0, seed=seed)
    return given | dict(unreadable=before.get("unreadable") or "error")


@torch.no_grad()
def features(
    model: Any, images: Tensor, mean: Iterable[float], std: Iterable[float], *, size: tuple[int, int], pool: str
) -> Tensor:
    """(N, D) float32 on the CPU: the frozen model's patch tokens averaged ("avg") or its first token ("token")."""
    model.eval()
    device, prefix = next(model.parameters()).device, model.num_prefix_tokens
    if pool == "token" and not prefix:
        raise ConfigError("this model has no class token: --pool avg")
    found = []
    for part in images.split(256):
        x = model.forward_features(normalize(resize(part, size), tuple(mean), tuple(std)).to(device))
        x = x.flatten(1, 2) if x.ndim == 4 else x  # a Swin's feature map (B, rows, columns, D)
        found.append((x[:, 0] if pool == "token" else x[:, prefix:].mean(dim=1)).float().cpu())
    return torch.cat(found)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, answers: Tensor, *, seed: int = 0) -> dict[str, float]:
    """Top-1 of a linear classifier on features, in percent, and the penalty that was chosen.

    Args:
        train, test: (N, D) features.
        labels, answers: (N,) of both.
        seed: of the tenth that chooses the penalty.
    """
    classes = int(torch.cat([labels, answers]).max()) + 1
    order = torch.randperm(len(train), generator=generator(seed, "probe"))
    held, rest = order[: len(train) // 10], order[len(train) // 10 :]
    scores = {}
    for penalty in PENALTIES:
        classify = _linear(train[rest], labels[rest], classes, penalty)
        scores[penalty] = _top1(classify(train[held]), labels[held])
    best = max(PENALTIES, key=lambda penalty: scores[penalty])
    return dict(top1=_top1(_linear(train, labels, classes, best)(test), answers), penalty=best)


def knn_probe(train: Tensor, labels: Tensor, test: Tensor, answers: Tensor, k: int = 20) -> dict[str, float]:
    """Top-1 of k nearest neighbours by cosine similarity, in percent."""
    if not 1 <= k <= len(train):
        raise ConfigError(f"k must be between 1 and the {len(train)} training images, got {k}")
    train, test, classes = F.normalize(train), F.normalize(test), int(torch.cat([labels, answers]).max()) + 1
    found = []
    for part in test.split(512):
        near = (part @ train.T).topk(k)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[near.indices], (near.values / TEMPERATURE).exp())
        found.append(votes)
    return dict(top1=_top1(torch.cat(found), answers), k=k)


def _linear(x: Tensor, labels: Tensor, classes: int, penalty: float) -> Callable[[Tensor], Tensor]:
    """The minimum of cross-entropy + penalty |W|², from zero; float64, so that it is the same everywhere."""
    norm = nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6, dtype=torch.float64)
    norm.running_mean, norm.running_var = x.double().mean(dim=0), x.double().var(dim=0)  # the whole set is the batch
    head = nn.Linear(x.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    norm.eval()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-7)
    scaled = norm(x.double())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(scaled), labels) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda features: head(norm(features.double())).detach()


def _top1(scores: Tensor, answers: Tensor) -> float:
    return (scores.argmax(dim=1) == answers).double().mean().item() * 100
