"""`vit2dpe probe`: linear and k-NN evaluation of the features of a frozen encoder.

    linear   logits = W (f - mean) / std + b; mean and std over the training features (an affine-free BatchNorm1d)
    k-NN     votes of the k most similar training features, weighted by exp(cosine similarity / 0.07)

Sources: linear probe with BatchNorm as in MAE (arXiv 2111.06377); weighted k-NN, Wu et al., arXiv 1805.01978. How ours
differs: features are computed once, of images as they are, so nothing is augmented; the linear map is found by
L-BFGS with a small L2 penalty chosen on a tenth of the training images, which needs no learning rate.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets import load, normalize
from ..data.identity import FILES, same_data
from ..data.settings import DataConfig
from ..data.splits import resize
from ..errors import ConfigError, unknown
from ..files import write_atomically
from ..seeding import generator
from ..training.checkpoint import Meta, load_run
from ..training.devices import pick_device, threads
from .settings import ProbeConfig

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
TEMPERATURE = 0.07


@runtime_checkable
class Encoder(Protocol):
    """A model with features: (B, N, D) tokens of which the first are a prefix, or a (B, rows, columns, D) map."""

    num_prefix_tokens: int

    def eval(self) -> nn.Module: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def forward_features(self, x: Tensor) -> Tensor: ...


class Result(NamedTuple):
    """A line of `probe.csv`; top1 in percent."""

    method: str
    pool: str
    top1: float
    setting: str
    n_train: int
    n_test: int


def probe(config: ProbeConfig, command: str = "vit2dpe probe") -> Path:
    """Measure the features of a run; write `probe.csv` beside it and print it.

    Args:
        config: settings; the data default to the run's.
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
    with threads(config.threads):
        return _probe(config, Path(config.run).expanduser())


def _probe(config: ProbeConfig, folder: Path) -> Path:
    device = pick_device(config.device)
    run = load_run(folder, device, which=config.which)
    about: Meta = vars(run)["about"]
    if lacking := [name for name in ("data", "mean", "std", "train_size") if name not in about]:
        raise ConfigError(
            f"{folder} holds a {about['model']} without {', '.join(lacking)}: probes are for image models"
        )
    encoder = getattr(run, "encoder", run)
    if not isinstance(encoder, Encoder):
        raise ConfigError(f"{folder} holds a {about['model']}, which has no features to probe")
    if not about.get("classes", True) and config.data is None and config.root is None:
        raise ConfigError(
            f"{folder} was pretrained on images without classes: name some with classes to measure its features on, "
            "--root <class folders or a CSV>"
        )
    data = load(*data_of(config, folder, about["data"]))
    if len(data.mean) != len(about["mean"]):
        raise ConfigError(f"the run saw images of {len(about['mean'])} channels, these have {len(data.mean)}")
    if config.data is None and not same_data(about, {"digest": data.digest, FILES: data.digest_of_files}):
        print(f"note: not all of the images the run saw, or others: {len(data.train)} for training the probe")
    height, width = about["train_size"]
    pools = {"both": ["avg", "token"], None: ["avg"]}.get(config.pool, [str(config.pool)])
    results = []
    for pool in pools:
        train, test = (
            features(encoder, images, about["mean"], about["std"], size=(height, width), pool=pool)
            for images in (split.pixels(torch.arange(len(split))) for split in (data.train, data.test))
        )
        linear = linear_probe(train, data.train.labels, test, data.test.labels)
        knn = knn_probe(train, data.train.labels, test, data.test.labels, config.k)
        for method, score, name in (("linear", linear, "penalty"), ("knn", knn, "k")):
            setting = f"{name}={score[name]:g}"
            results.append(Result(method, pool, round(score["top1"], 2), setting, len(train), len(test)))
            print(f"{method:6}  {pool:5}  top-1 {score['top1']:.2f}%  ({setting})")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Result._fields, *results])
    write_atomically(folder / "probe.csv", text.getvalue().encode())
    return folder / "probe.csv"


def data_of(config: ProbeConfig, folder: Path, name: str) -> tuple[DataConfig, int]:
    """The run's data but for what the probe's settings change, and the run's seed."""
    import yaml

    path = folder / "config.yaml"
    before = yaml.safe_load(path.read_text()) or {} if config.data is None and path.is_file() else {}
    names = ("root", "size", "source_size", "fit", "limit_train", "limit_test", "val_fraction", "unreadable")
    data = {key: (before.get("data") or {}).get(key) for key in names}
    own = dict(root=config.root, limit_train=config.limit_train, limit_test=config.limit_test)
    data |= {key: value for key, value in own.items() if value is not None}
    data = {key: value for key, value in data.items() if value is not None}
    source = config.data or (before.get("data") or {}).get("name") or (None if "root" in data else name)
    if config.data is None and config.root is not None and source == "digits":
        source = None  # what is under root is understood
    return DataConfig.of(data, name=source, cache="memory"), (before.get("run") or {}).get("seed") or 0


@torch.no_grad()
def features(
    model: Encoder, images: Tensor, mean: Iterable[float], std: Iterable[float], *, size: tuple[int, int], pool: str
) -> Tensor:
    """(N, D) float32 on the CPU: the frozen model's patch tokens averaged ("avg") or its first token ("token")."""
    model.eval()
    device, prefix = next(model.parameters()).device, model.num_prefix_tokens
    if pool == "token" and not prefix:
        raise ConfigError("this model has no class token: --pool avg")
    pooled = []
    for batch in images.split(256):
        x = model.forward_features(normalize(resize(batch, size), tuple(mean), tuple(std)).to(device))
        x = x.flatten(1, 2) if x.ndim == 4 else x  # a Swin's feature map (B, rows, columns, D)
        pooled.append((x[:, 0] if pool == "token" else x[:, prefix:].mean(dim=1)).float().cpu())
    return torch.cat(pooled)  # (N, D)


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
    votes = []
    for batch in test.split(512):
        near = (batch @ train.T).topk(k)  # (B, k)
        weights = (near.values / TEMPERATURE).exp()
        votes.append(torch.zeros(len(batch), classes).scatter_add_(1, labels[near.indices], weights))
    return dict(top1=_top1(torch.cat(votes), answers), k=k)


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
