"""Translation: pairs of sentences, batches of them for a `Seq2Seq`, what it writes, and BLEU of that.

One vocabulary serves both languages (subwords learned from both sides of the training pairs), so that embeddings can be
shared as in Vaswani et al., arXiv 1706.03762. A sentence ends with </s>, on both sides; the decoder starts from <s>.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, unknown
from ..models.generate import beam_search
from ..models.seq2seq import Seq2Seq
from ..models.text_model import pad
from .decoding import Pair, count_labels, decoding_batch, decoding_loss, evaluate_pairs
from .distributed import ALONE, World
from .task import Batch, Task, batch_of, described, steps_of
from .text_config import TextDataConfig
from .tokenizers import Subwords, from_json, make_tokenizer


class Pairs(NamedTuple):
    """Sentences in two languages."""

    name: str
    train: list[Pair]
    val: list[Pair]
    test: list[tuple[str, str]]
    tokenizer: Subwords
    digest: str
    left_out: int  # training pairs longer than the context


def load_pairs(config: TextDataConfig) -> Pairs:
    """Read `<split>.<language>` or `<split>.<language>.gz`, a sentence a line, for train, val and the test set.

    Args:
        config: `pairs` names the folder, `source`, `target` and `test` the files; `limit` takes the first so many pairs
            of each split; `tokenizer` and `vocab` as for a text. Training pairs of more than `context` tokens on either
            side are left out.

    Raises:
        ConfigError: without a folder, or with a tokenizer that has no <pad>, <s> and </s>.
        DataError: if a file is missing or two sides have different numbers of lines.
    """
    if config.pairs is None:
        raise ConfigError("translation needs pairs: --data.pairs FOLDER with train, val and test in two languages")
    folder = Path(config.pairs).expanduser()
    sha = hashlib.sha256()
    splits: list[list[tuple[str, str]]] = []
    for split in ("train", "val", config.test):
        sides = [_lines(folder, f"{split}.{language}", sha) for language in (config.source, config.target)]
        if len(sides[0]) != len(sides[1]) or not sides[0]:
            raise DataError(
                f"{folder}: {split} has {len(sides[0])} lines of {config.source} and {len(sides[1])} of "
                f"{config.target}; both need the same number, at least one"
            )
        splits.append(list(zip(*sides, strict=True))[: config.limit])
    texts = [text for pair in splits[0] for text in pair]
    tokenizer = make_tokenizer(config.tokenizer, texts, config.vocab)
    if not isinstance(tokenizer, Subwords):
        raise ConfigError(
            "translation needs the tokens <pad>, <s> and </s>: --data.tokenizer bpe or wordpiece, got "
            f"{config.tokenizer}"
        )
    encode = Encoder(tokenizer)
    train, val = ([(encode(a), encode(b)) for a, b in split] for split in splits[:2])
    fit = [pair for pair in train if max(map(len, pair)) <= config.context]
    if not fit:
        raise DataError(f"none of {len(train)} training pairs fits into data.context = {config.context} tokens")
    name = f"{folder.name} {config.source}-{config.target}"
    return Pairs(name, fit, val, splits[2], tokenizer, sha.hexdigest(), len(train) - len(fit))


class Encoder:
    """A sentence as token ids with its end, (N,), under a tokenizer with <pad>, <s> and </s>."""

    def __init__(self, tokenizer: Subwords) -> None:
        self.tokenizer = tokenizer
        self.pad, self.start, self.stop = (tokenizer.id(token) for token in ("<pad>", "<s>", "</s>"))

    def __call__(self, text: str) -> Tensor:
        return torch.tensor([*self.tokenizer.encode(text), self.stop])


@dataclass(frozen=True)
class TranslationTask(Task):
    """Each training pair once an epoch, in an order drawn anew; validation loss without smoothing.

    Args:
        data: pairs.
        batch_size: pairs of a step, over all ranks.
        smoothing: label smoothing of the training loss.
        seed, device, world: as in `ImageTask`.
    """

    data: Pairs
    batch_size: int
    smoothing: float = 0.0
    seed: int = 0
    device: torch.device | str = "cpu"
    world: World = ALONE
    best: tuple[str, str] | None = ("val_loss", "min")
    unit: str = "tokens"

    @property
    def steps_per_epoch(self) -> int:  # type: ignore[override]
        return steps_of(len(self.data.train), self.batch_size, self.world)

    def batch(self, epoch: int, step: int) -> Batch:
        train = self.data.train
        index = batch_of(len(train), self.batch_size, self.seed, epoch, step)
        index = index[self.world.share(len(index))]
        encode = Encoder(self.data.tokenizer)
        found = decoding_batch([train[i] for i in index.tolist()], encode.start, encode.pad)
        return {name: value.to(self.device, non_blocking=True) for name, value in found.items()} | {"index": index}

    def count(self, batch: Batch) -> int:
        return count_labels(batch)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return decoding_loss(model, batch, smoothing=self.smoothing), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        encode, pairs = Encoder(self.data.tokenizer), sorted(self.data.val, key=lambda pair: len(pair[0]))
        return evaluate_pairs(model, pairs, encode.start, encode.pad, self.batch_size, self.world, self.device)

    def describe(self) -> dict[str, Any]:
        return described("translation", self.data, tokenizer=self.data.tokenizer.describe())


def translate(
    model: Seq2Seq, tokenizer: Subwords, texts: Sequence[str], *, beams: int = 4, batch: int = 64
) -> list[str]:
    """What the model makes of sentences, by beam search (one beam: greedy), in their order.

    A translation has at most as many tokens as the decoder's context, whatever it is batched with.
    """
    encode, device = Encoder(tokenizer), next(model.parameters()).device
    sources = [encode(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(sources[i]))
    found = [""] * len(texts)
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        source, valid = (t.to(device) for t in pad([sources[i] for i in part], encode.pad))
        start = torch.full((len(part), 1), encode.start, device=device)
        with torch.no_grad():
            memory = model.encode(source, valid)
        written = beam_search(model.decoder, start, model.decoder.context, stop=encode.stop, beams=beams, memory=memory)
        for i, row in zip(part, written[:, 1:].tolist(), strict=True):
            found[i] = tokenizer.decode(row[: row.index(encode.stop)] if encode.stop in row else row).strip()
    return found


class Score(NamedTuple):
    """BLEU in percent, and how sacrebleu computed it."""

    bleu: float
    signature: str


def bleu(written: Sequence[str], references: Sequence[str]) -> Score:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu defines it (arXiv 1804.08771): cased, tokenizer 13a."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ConfigError('BLEU needs an extra that is not installed: pip install "vit2dpe[text]"') from None
    metric = BLEU()
    return Score(metric.corpus_score(list(written), [list(references)]).score, str(metric.get_signature()))


def tokenizer_of(about: dict[str, Any]) -> Subwords:
    """The tokenizer of a run of translation."""
    found = from_json(about["tokenizer"])
    if not isinstance(found, Subwords):
        raise unknown("tokenizer of a translation", type(found).__name__, ["Subwords"])
    return found


def _lines(folder: Path, name: str, sha: Any) -> list[str]:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            sha.update(raw)
            try:
                return raw.decode().removesuffix("\n").split("\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 ({error}): convert it") from None
    raise DataError(f"there is neither {folder / name} nor {name}.gz: give another --data.pairs")
