"""Span corruption and classification of lines: what they make of a text, and both from end to end."""

from pathlib import Path

import pytest
import torch

from vit2dpe import ConfigError, DataError, load_run
from vit2dpe.cli import main
from vit2dpe.data.labelled_text import load_lines
from vit2dpe.data.text import load_text
from vit2dpe.data.text_settings import TextDataConfig
from vit2dpe.training.distributed import World
from vit2dpe.training.tasks.span_corruption import SpanCorruption, SpanTask
from vit2dpe.training.tasks.text_classification import LineTask

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CORRUPT = SpanCorruption(vocab_size=60, stop=29, start=28, sentinels=30)


def draws(seed):
    return torch.Generator().manual_seed(seed)


def test_spans_are_the_example_of_the_docstring():
    tokens = torch.tensor([10, 11, 12, 13, 14, 15, 16, 17, 18, 19])
    hidden = torch.zeros(10, dtype=torch.bool)
    hidden[[2, 3, 7]] = True
    source, target = CORRUPT.pair(tokens, hidden)
    assert source.tolist() == [10, 11, 59, 14, 15, 16, 58, 18, 19, 29]
    assert target.tolist() == [59, 12, 13, 58, 17, 29]


@pytest.mark.parametrize("n", [2, 3, 7, 50, 199])
def test_a_text_comes_back_whole(n):
    """From source and target alone; sentinels in falling order in both; as many hidden as the formula says."""
    for seed in range(20):
        tokens = torch.randint(28, (n,), generator=draws(seed))
        hidden = CORRUPT.hidden(n, draws(seed))
        m = min(max(round(0.15 * n), 1), n - 1)
        spans = min(max(round(m / 3), 1), m, n - m)
        assert (int(hidden.sum()), bool(hidden[0])) == (m, False)
        source, target = CORRUPT.pair(tokens, hidden)
        assert torch.equal(CORRUPT.restore(source, target), tokens)
        wanted = list(range(59, 59 - spans, -1))
        assert [t for t in source.tolist() if t >= 30] == wanted
        assert [t for t in target.tolist() if t >= 30] == wanted
        assert len(source) + len(target) == n + 2 * spans + 2
    with pytest.raises(ConfigError, match="two tokens"):
        CORRUPT.hidden(1)
    with pytest.raises(ConfigError, match="1000 tokens have 50 spans, and there are 30 sentinels"):
        CORRUPT.hidden(1000)


@pytest.mark.need("E5a")
def test_special_tokens_of_a_text_stay_where_they_are():
    """They are never hidden; of the others as many are as in a text without them, and the text comes back."""
    corrupt = SpanCorruption(60, 29, 28, sentinels=30, rate=0.3, special=(0, 1))
    for seed in range(20):
        tokens = torch.randint(28, (80,), generator=draws(seed))
        tokens[::9] = seed % 2
        hidden = corrupt.hidden_in(tokens, draws(seed))
        ordinary = tokens > 1
        assert not hidden[~ordinary].any()
        assert int(hidden.sum()) == round(0.3 * int(ordinary.sum()))
        source, target = corrupt.pair(tokens, hidden)
        assert torch.equal(corrupt.restore(source, target), tokens)
        wanted = [t for t in tokens.tolist() if t < 2]
        assert [t for t in source.tolist() if t < 2] == wanted
        assert not any(t < 2 for t in target.tolist())
        assert torch.equal(corrupt.hidden_in(tokens + 2, draws(seed)), corrupt.hidden(80, draws(seed)))
    few = SpanCorruption(60, 29, 28, sentinels=2, rate=0.5, mean=20.0, special=(0,))  # parted by every second token
    assert int(few.hidden_in(torch.arange(40) % 2 * 5, draws(0)).sum()) == 2
    assert not few.hidden_in(torch.tensor([0, 5, 0]), draws(0)).any()


def test_every_composition_is_as_likely():
    """Ten tokens with half of them hidden in two spans: 4 x 4 ways."""
    corrupt = SpanCorruption(60, 29, rate=0.5, mean=2.5)
    generator = draws(0)
    found = [tuple(corrupt.hidden(10, generator).tolist()) for _ in range(3200)]
    counts = torch.tensor([found.count(way) for way in set(found)])
    assert len(counts) == 16
    assert int(counts.min()) > 140  # of 200 expected, four deviations
    assert int(counts.max()) < 260


def test_the_collator_pads_and_shifts():
    texts = [torch.arange(n) for n in (20, 9)]
    batch = CORRUPT(texts, draws(1))
    assert torch.equal(batch["source_valid"].sum(1), torch.tensor([20 - 3 + 1 + 1, 9 - 1 + 1 + 1]))
    for i, text in enumerate(texts):
        source, target = batch["source"][i][batch["source_valid"][i]], batch["labels"][i][batch["labels"][i] >= 0]
        assert torch.equal(CORRUPT.restore(source, target), text)
        assert batch["tokens"][i, : len(target)].tolist() == [28, *target[:-1].tolist()]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 40)
    return path


SMALL = ["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--run.device", "cpu"]


def test_a_model_learns_to_fill_spans(text, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["text", "train", "--objective", "spans", "--data.path", str(text), "--data.context", "24", *SMALL]
    command += ["--epochs", "2", "--batch-size", "8", "--warmup-epochs", "0", "--steps_per_epoch", "30"]
    assert main([*command, "--lr", "0.01", "--run.out", str(out)]) == 0, capsys.readouterr().err
    model = load_run(out)
    size = len(set(text.read_text()))
    assert (type(model).__name__, model.decoder.vocab_size) == ("Seq2Seq", size + 102)
    assert model.about["final"]["val_loss"] < 3.0  # ln 16 symbols is 2.8, and sentinels come in order
    data = load_text(TextDataConfig(path=str(text), context=24))
    collate = SpanCorruption(size + 102, stop=size, start=size + 1)
    task = SpanTask(data, 24, 6, 3, collate=collate)
    parts = [SpanTask(data, 24, 6, 3, collate=collate, world=World(rank, 2)).batch(1, 2) for rank in (0, 1)]
    whole = task.batch(1, 2)
    rows = [row[row >= 0].tolist() for part in parts for row in part["labels"]]
    assert rows == [row[row >= 0].tolist() for row in whole["labels"]]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.tsv"
    animals = [f"animal\tthe {word} {'runs ' * i}" for i in range(1, 11) for word in ("dog", "cat", "cow")]
    numbers = [f"number\tthe {word} {'counts ' * i}" for i in range(1, 11) for word in ("one", "two", "six")]
    path.write_text("".join(f"{line}\n" for pair in zip(animals, numbers, strict=True) for line in pair))
    return path


def test_lines_are_cut_for_each_label(lines):
    data = load_lines(TextDataConfig(path=str(lines), context=9, val_share=0.2))
    assert (data.classes, len(data.train), len(data.val)) == (["animal", "number"], 48, 12)
    assert [label for _, label in data.val] == [0] * 6 + [1] * 6
    assert data.tokenizer.decode(data.train[0][0].tolist()) == "the dog r"
    task = LineTask(data, 10)
    seen = torch.cat([task.batch(0, step)["index"] for step in range(task.steps_per_epoch)])
    assert sorted(seen.tolist()) == list(range(48))
    for text, message in [("a\tb\nc d\n", "line 2: a label, a tab"), ("a\tb\na\tc\n", "two labels are needed")]:
        lines.write_text(text)
        with pytest.raises(DataError, match=message):
            load_lines(TextDataConfig(path=str(lines)))
    lines.write_bytes("a\tGröße\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        load_lines(TextDataConfig(path=str(lines)))
    with pytest.raises(ConfigError, match="label<TAB>text"):
        load_lines(TextDataConfig())


def test_masked_pretraining_then_classification(text, lines, tmp_path, capsys):
    """The pretrained run's tokenizer and weights are taken; its masked head is not."""
    text.write_text(text.read_text() + lines.read_text() * 3)
    pretrain = ["text", "train", "--objective", "masked", "--data.path", str(text), "--data.context", "32", *SMALL]
    pretrain += ["--epochs", "1", "--batch-size", "4", "--warmup-epochs", "0", "--steps_per_epoch", "2"]
    assert main([*pretrain, "--run.out", str(tmp_path / "masked")]) == 0, capsys.readouterr().err
    capsys.readouterr()
    train = ["text", "train", "--objective", "classify", "--data.path", str(lines), "--data.context", "32", *SMALL]
    train += ["--epochs", "6", "--batch-size", "8", "--warmup-epochs", "1", "--lr", "0.01", "--data.val_share", "0.2"]
    init = ["--init", str(tmp_path / "masked")]
    assert main([*train, *init, "--run.out", str(tmp_path / "classes")]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "drawn anew: head.weight, head.bias; not used: masked_head" in said
    before, model = load_run(tmp_path / "masked"), load_run(tmp_path / "classes")
    assert model.about["tokenizer"] == before.about["tokenizer"]
    assert model.embed.weight.shape == before.embed.weight.shape
    assert model.about["final"]["val_top1"] == 100
    assert main([*train, "--run.out", str(tmp_path / "scratch")]) == 0
    assert main([*train, "--init", str(lines), "--run.out", str(tmp_path / "other")]) == 2


@pytest.mark.parametrize("name", ["shakespeare_masked", "shakespeare_speakers"])
def test_the_recipes_run(name, text, lines, tmp_path, capsys):
    path = lines if name.endswith("speakers") else text
    command = ["text", "train", "--config", str(RECIPES / f"{name}.yaml"), "--data.path", str(path), "--smoke"]
    assert main([*command, "--data.context", "16", "--run.out", str(tmp_path / "run")]) == 0, capsys.readouterr().err


def test_speeches_are_told_from_their_speakers(tmp_path):
    import runpy

    speeches = runpy.run_path(str(RECIPES / "shakespeare_speakers.py"))["speeches"]
    said = "First Citizen:\nBefore we proceed any\nfurther, hear me speak.\n\nAll:\nSpeak, speak.\n"
    assert speeches(said) == [("First Citizen", "Before we proceed any further, hear me speak.")]
