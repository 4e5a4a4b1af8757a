"""`--smoke` runs two steps with whatever other settings are given."""

from __future__ import annotations

import random

import pytest

from tests.data.pictures import pixels, save
from tests.helpers import read_csv
from vit2dpe.cli import main
from vit2dpe.training.initial_weights import INITS

MICRO = ["--smoke", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"]
FEW = {("causal", "bpe"), ("masked", "wordpiece"), ("classify", "bpe")}  # the others are slow together
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text of 3,000 different words, labelled lines, and pairs of sentences."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmno", k=rng.randint(2, 9))) for _ in range(3000)]
    lines = [" ".join(rng.choices(words, k=8)) for _ in range(600)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "lines.tsv").write_text("".join(f"{i % 2}\t{line}\n" for i, line in enumerate(lines[:40])))
    for split in ("train", "val", "test"):
        for language in ("de", "en"):
            (folder / f"{split}.{language}").write_text("\n".join(lines[:12]))
    return folder


@pytest.mark.need("D18")
@pytest.mark.parametrize(
    ("objective", "tokenizer"),
    [
        pytest.param(objective, tokenizer, marks=() if (objective, tokenizer) in FEW else SLOW)
        for objective in ("causal", "masked", "spans", "classify", "translate")
        for tokenizer in ("chars", "bytes", "bpe", "wordpiece")
        if objective != "translate" or tokenizer in ("bpe", "wordpiece")
    ],
)
def test_every_tokenizer(objective, tokenizer, texts, tmp_path):
    data = {"classify": ["--data.path", str(texts / "lines.tsv")], "translate": ["--data.pairs", str(texts)]}
    more = data.get(objective, ["--data.path", str(texts / "text.txt")])
    more = [
        *more,
        "--optim.accumulate",
        "5",
        "--data.test",
        "test",
        "--data.vocab",
        "400",
        "--data.context",
        "64" if objective != "translate" else "256",
    ]
    args = ["text", "train", *MICRO, "--objective", objective, "--data.tokenizer", tokenizer, *more]
    assert main([*args, "--run.out", str(tmp_path / "run")]) == 0
    assert len(read_csv(tmp_path / "run" / "metrics.csv")) == 1


@pytest.mark.need("D18")
@pytest.mark.parametrize("share", ["0.02", "0.97"])
def test_a_small_split(share, texts, tmp_path):
    args = ["text", "train", *MICRO, "--data.path", str(texts / "text.txt"), "--data.context", "64"]
    assert main([*args, "--data.val_share", share, "--run.out", str(tmp_path / "run")]) == 0


@pytest.mark.need("D18")
@pytest.mark.parametrize(
    "more",
    [
        ["--data.val_fraction", "0.3", "--optim.accumulate", "3", "--augment.train_sizes", "8,16"],
        pytest.param(["--data.limit_train", "3", "--optim.batch_size", "1", "--optim.epochs", "9"], marks=SLOW),
        pytest.param(["--optim.accumulate", "64"], marks=SLOW),
        pytest.param(
            ["--data.val_fraction", "0.99", "--optim.batch_size", "128", "--optim.accumulate", "128"], marks=SLOW
        ),
        pytest.param(["--optim.warmup_epochs", "7", "--optim.epochs", "9"], marks=SLOW),
        pytest.param(["--data.size", "8x12", "--model.class_token", "--model.pool", "token"], marks=SLOW),
    ],
)
@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_other_settings_of_images(command, more, tmp_path):
    more = (
        [*more, "--decoder.width", "16", "--decoder.heads", "2", "--mask_unit", "4"] if command == "pretrain" else more
    )
    if command == "pretrain" and "--augment.train_sizes" in more:
        more = more[: more.index("--augment.train_sizes")]
    assert main([command, *MICRO, *more, "--run.out", str(tmp_path / "run")]) == 0
    assert len(read_csv(tmp_path / "run" / "metrics.csv")) == 1


@pytest.mark.need("D18")
@pytest.mark.parametrize("command", ["train", "pretrain"])
@pytest.mark.parametrize(
    "more",
    [
        ["--data.cache", "none", "--data.workers", "1", "--model.init", "xavier"],
        pytest.param(["--data.cache", "none"], marks=SLOW),
        pytest.param(["--data.workers", "2"], marks=SLOW),
        *(pytest.param(["--model.init", how], marks=SLOW) for how in INITS),
    ],
)
def test_where_images_are_and_what_a_run_starts_from(command, more, cache, tmp_path):
    for i in range(8):
        save(tmp_path / "data" / ("val" if i < 4 else "train") / "ab"[i % 2] / f"{i}.png", pixels(i, 8, 8))
    own = ["--decoder.width", "16", "--decoder.heads", "2", "--mask_unit", "4"] if command == "pretrain" else []
    run, again = str(tmp_path / "run"), ["--init", str(tmp_path / "run"), "--run.out", str(tmp_path / "again")]
    words = [command, *MICRO, "--data.name", "folder", "--data.root", str(tmp_path / "data"), *own, *more]
    assert main([*words, "--run.out", run]) == 0
    assert main([*words, *again]) == 0
