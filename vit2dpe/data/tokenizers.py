"""Text to token ids and back: characters, bytes, and the `tokenizers` library's BPE and WordPiece.

Every tokenizer is a `Tokenizer`, says what it is in JSON (`describe`), and is made again from that (`from_json`), so
that a checkpoint carries its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import CheckpointError, ConfigError, DataError, unknown

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")  # ids 0 to 3 of those that are trained here
KINDS = ("chars", "bytes", "bpe", "wordpiece")


class Tokenizer(Protocol):
    """What models need of a tokenizer; `size` counts its tokens."""

    size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def describe(self) -> dict[str, Any]:
        """JSON values that `from_json` makes it of again."""
        ...


class Characters:
    """One token for each symbol.

    Args:
        symbols: every character, in the order of its id.
    """

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

    def describe(self) -> dict[str, Any]:
        return dict(kind="chars", symbols=self.symbols)


class Bytes:
    """UTF-8: 256 tokens, any text."""

    size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no UTF-8, as the first half of a letter, become U+FFFD."""
        return bytes(ids).decode(errors="replace")

    def describe(self) -> dict[str, Any]:
        return dict(kind="bytes")


class Subwords:
    """A tokenizer of the `tokenizers` library.

    Args:
        inner: a `tokenizers.Tokenizer`.
    """

    def __init__(self, inner: Any) -> None:
        self.inner, self.size = inner, inner.get_vocab_size()

    @classmethod
    def train(cls, kind: str, texts: Sequence[str], size: int) -> Subwords:
        """Learn `size` tokens from texts: "bpe" (of bytes: any text comes back as it was) or "wordpiece" (BERT's:
        lower case, words and their ends; a character never seen becomes [UNK]).
        """
        library = _library()
        if kind == "bpe":
            inner = library.Tokenizer(library.models.BPE())
            inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
            inner.decoder = library.decoders.ByteLevel()
            trainer = library.trainers.BpeTrainer(
                vocab_size=size,
                special_tokens=list(SPECIAL),
                initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            )
        elif kind == "wordpiece":
            inner = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
            inner.normalizer = library.normalizers.BertNormalizer()
            inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
            inner.decoder = library.decoders.WordPiece()
            trainer = library.trainers.WordPieceTrainer(
                vocab_size=size, special_tokens=[*SPECIAL, "[UNK]"], show_progress=False
            )
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
        return cls._parsed(path.read_text(), str(path))

    @classmethod
    def _parsed(cls, text: str, where: str) -> Subwords:
        try:
            inner = _library().Tokenizer.from_str(text)
        except ConfigError:
            raise
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
        found = self.inner.token_to_id(token)
        if found is None:
            raise unknown("token", token, self.inner.get_vocab())
        return found

    def describe(self) -> dict[str, Any]:
        return dict(kind="tokenizers", json=self.inner.to_str())


def make_tokenizer(word: str, texts: Sequence[str], size: int = 8000) -> Tokenizer:
    """The tokenizer that a setting names: one of `KINDS`, learned from `texts`, or the path of a tokenizer.json."""
    if word == "chars":
        return Characters.of("".join(texts))
    if word == "bytes":
        return Bytes()
    if word in ("bpe", "wordpiece"):
        return Subwords.train(word, texts, size)
    if word.endswith(".json"):
        return Subwords.load(word)
    raise unknown("tokenizer", word, [*KINDS, "path/to/tokenizer.json"])


def from_json(about: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `describe` described."""
    kind = about.get("kind")
    if kind == "chars":
        return Characters(about["symbols"])
    if kind == "bytes":
        return Bytes()
    if kind == "tokenizers":
        return Subwords._parsed(about["json"], "the checkpoint's tokenizer")
    raise CheckpointError(f"this version cannot read a tokenizer of kind {kind!r}; it reads chars, bytes, tokenizers")


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise ConfigError('subwords need an extra that is not installed: pip install "vit2dpe[text]"') from None
    return tokenizers
