"""The tokenizer: byte-level BPE in the `tokenizers` library's own JSON format, trained or loaded."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pi_dist.config import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""The special token that ends every document."""

MAX_TRAINED_VOCABULARY = 1 << 24
"""The library sets memory aside for all tokens that are asked for, and aborts if there is not so much."""

_CHUNK_CHARS = 1 << 18
_BATCH_CHARS = 1 << 22
_SAMPLE_CHARS = 1000
_CUT = re.compile(r"(?<=\S)[ \n]")

Tag = TypeVar("Tag")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on `texts`; the same texts in the same order give the same tokenizer.

    Raises ValueError if vocab_size cannot hold the 256 bytes and the end-of-text token, or is too large. A
    small corpus may give fewer than vocab_size tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(
            f"vocab_size: vocab_size ({vocab_size}) >= 257 does not hold; 256 bytes and {END_OF_TEXT}"
        )
    if vocab_size > MAX_TRAINED_VOCABULARY:
        raise UserError(f"vocab_size: vocab_size ({vocab_size}) <= {MAX_TRAINED_VOCABULARY} does not hold")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json. Truncation and padding stored in it are switched off.

    Raises ValueError naming the file if it is missing or no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest token id, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def kept_characters(tokenizer: Tokenizer, text: str) -> tuple[int, int]:
    """(visible characters that come back, those there were) of the beginning of a text, encoded and decoded.

    Special tokens, as that for what is unknown, bring nothing back. Accents do not count: many tokenizers
    drop them.
    """
    sample = text.strip()[:_SAMPLE_CHARS]
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(sample, add_special_tokens=False).ids
    return _visible(tokenizer.decode(ids, skip_special_tokens=True)), _visible(sample)


def _visible(text: str) -> int:
    """Characters of a text that are neither white space nor accents."""
    composed = unicodedata.normalize("NFC", text)
    return sum(not char.isspace() and not unicodedata.combining(char) for char in composed)


def encode_texts(tokenizer: Tokenizer, texts: Iterable[tuple[Tag, str]]) -> Iterator[tuple[Tag, np.ndarray]]:
    """Yield (tag, ids uint32 [tokens]) for each (tag, text), in order, many texts at a time on all cores.

    Text that spells a special token is encoded as ordinary text. Long texts are encoded in chunks where that
    cannot change the result, so that memory stays bounded by the ids of one document.
    """
    tokenizer.encode_special_tokens = True
    cut = _chunks_are_exact(tokenizer)
    parts: list[np.ndarray] = []
    for batch in _batches(_chunks(texts, cut)):
        encodings = tokenizer.encode_batch_fast([chunk for _, chunk, _ in batch], add_special_tokens=False)
        for (tag, _, last), encoding in zip(batch, encodings, strict=True):
            parts.append(np.array(encoding.ids, dtype=np.uint32))
            if last:
                yield tag, np.concatenate(parts)
                parts = []


def _chunks_are_exact(tokenizer: Tokenizer) -> bool:
    """Whether encoding may restart before any space: GPT-2's splitting, and nothing that sees across it."""
    parts = json.loads(tokenizer.to_str())
    splitting = parts["pre_tokenizer"] or {}
    return (
        splitting.get("type") == "ByteLevel"
        and splitting.get("use_regex", True)
        and not splitting.get("add_prefix_space", False)
        and parts["normalizer"] is None
        and all(token["special"] for token in parts["added_tokens"])
    )


def _chunks(texts: Iterable[tuple[Tag, str]], cut: bool) -> Iterator[tuple[Tag, str, bool]]:
    """(tag, chunk, whether it is the text's last), cut before a space that follows a visible character."""
    for tag, text in texts:
        start = 0
        while cut and (space := _CUT.search(text, start + _CHUNK_CHARS)):
            yield tag, text[start : space.start()], False
            start = space.start()
        yield tag, text[start:], True


def _batches(chunks: Iterable[tuple[Tag, str, bool]]) -> Iterator[list[tuple[Tag, str, bool]]]:
    """Lists of chunks of about _BATCH_CHARS characters."""
    batch: list[tuple[Tag, str, bool]] = []
    chars = 0
    for chunk in chunks:
        batch.append(chunk)
        chars += len(chunk[1]) + 64  # the list itself costs too
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
