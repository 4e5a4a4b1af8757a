"""Text to token ids and back: characters, bytes, and the `tokenizers` library's BPE and WordPiece.

Every one is a `Tokenizer`; `describe` gives JSON of it that `from_json` reads, so that a checkpoint carries its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import CheckpointError, ConfigError, DataError, install, unknown

if TYPE_CHECKING:
    import tokenizers as library

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")  # ids 0 to 3 of those that are trained here
PADS = ("<pad>", "[PAD]", "<|pad|>")
KINDS = ("chars", "bytes", "bpe", "wordpiece")
Description = dict[str, str]  # "kind", and what its constructor takes


class Tokenizer(Protocol):
    """Interface of tokenizers.

    Attributes:
        size: number of tokens.
        special: ids of those that are no part of a text (padding, start, stop, mask, unknown), ascending.
        pad: the one of them that is padding, by its name.
    """

    size: int
    special: tuple[int, ...]
    pad: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def describe(self) -> Description:
        """Metadata that `from_json` reads."""
        ...


class Characters:
    """One token for each symbol.

    Args:
        symbols: every character, in the order of its id.
    """

    special: tuple[int, ...] = ()
    pad: int | None = None

    def __init__(self, symbols: str) -> None:
        self.symbols, self.size = symbols, len(symbols)
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        if not symbols or len(self.ids) != self.size:
            raise ConfigError(f"symbols must be given and differ, got {symbols!r}")

    @classmethod
    def of(cls, text: str) -> Characters:
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> list[int]:
        """Raises DataError for a character that has no token."""
        try:
            return [self.ids[symbol] for symbol in text]
        except KeyError as error:
            raise DataError(
                f"the character {error.args[0]!r} was not in the training text; known: {self.symbols!r}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.symbols[i] for i in ids)

    def describe(self) -> Description:
        return dict(kind="chars", symbols=self.symbols)


class Bytes:
    """UTF-8: 256 tokens, any text."""

    size = 256
    special: tuple[int, ...] = ()
    pad: int | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no UTF-8, as the first half of a letter, become U+FFFD."""
        return bytes(ids).decode(errors="replace")

    def describe(self) -> Description:
        return dict(kind="bytes")


class Subwords:
    """A tokenizer of the `tokenizers` library.

    Args:
        inner: a `tokenizers.Tokenizer`.
    """

    def __init__(self, inner: library.Tokenizer) -> None:
        self.inner, self.size = inner, inner.get_vocab_size()
        added = inner.get_added_tokens_decoder()
        self.special = tuple(sorted(id_ for id_, token in added.items() if token.special))
        self.pad = next((id_ for id_ in self.special if added[id_].content in PADS), None)

    @classmethod
    def train(cls, kind: str, texts: Sequence[str], size: int) -> Subwords:
        """Learn `size` tokens from texts: "bpe" (of bytes: any text comes back as it was) or "wordpiece" (BERT's:
        lower case, words and their ends; a character never seen becomes [UNK]).
        """
        _require()
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        if kind == "bpe":
            inner = Tokenizer(models.BPE())
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            inner.decoder = decoders.ByteLevel()
            trainer: trainers.Trainer = trainers.BpeTrainer(
                vocab_size=size,
                special_tokens=list(SPECIAL),
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            )
        elif kind == "wordpiece":
            inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
            inner.normalizer = normalizers.BertNormalizer()
            inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            inner.decoder = decoders.WordPiece()
            special = [*SPECIAL, "[UNK]"]
            trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
        else:
            raise unknown("subwords", kind, ("bpe", "wordpiece"))
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> Subwords:
        """A `tokenizer.json`, with the truncation and padding that it may carry turned off."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise DataError(f"there is no tokenizer at {path}: give a tokenizer.json, or one of {', '.join(KINDS)}")
        return cls.parse(path.read_text(), str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Subwords:
        """The content of a `tokenizer.json`; `where` it comes from is for the error."""
        _require()
        from tokenizers import Tokenizer

        try:
            inner = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{where} is no tokenizer: {error}") from None
        inner.no_truncation()
        inner.no_padding()
        return cls(inner)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids; with `special` also what the tokenizer puts around a text ([CLS], [SEP])."""
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(list(ids))

    def id(self, token: str) -> int:
        """Raises ConfigError for a token that does not exist."""
        number = self.inner.token_to_id(token)
        if number is None:
            raise unknown("token", token, self.inner.get_vocab())
        return number

    def describe(self) -> Description:
        return dict(kind="tokenizers", json=self.inner.to_str())


def make_tokenizer(kind: str, texts: Sequence[str], size: int = 8000) -> Tokenizer:
    """The tokenizer that a setting names: one of `KINDS`, learned from `texts`, or the path of a tokenizer.json."""
    if kind == "chars":
        return Characters.of("".join(texts))
    if kind == "bytes":
        return Bytes()
    if kind in ("bpe", "wordpiece"):
        return Subwords.train(kind, texts, size)
    if kind.endswith(".json"):
        return Subwords.load(kind)
    raise unknown("tokenizer", kind, [*KINDS, "path/to/tokenizer.json"])


def from_json(about: Description) -> Tokenizer:
    """The inverse of `Tokenizer.describe`."""
    kind = about.get("kind")
    if kind == "chars":
        return Characters(about["symbols"])
    if kind == "bytes":
        return Bytes()
    if kind == "tokenizers":
        return Subwords.parse(about["json"], "the checkpoint's tokenizer")
    raise CheckpointError(f"this version cannot read a tokenizer of kind {kind!r}; it reads chars, bytes, tokenizers")


def _require() -> None:
    if find_spec("tokenizers") is None:
        raise ConfigError(f"subwords need an extra that is not installed: {install('text')}")
