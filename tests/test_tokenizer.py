"""The tokenizer: exact round trips, determinism, and long texts encoded in chunks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_dist.data import tokenizer as module
from pi_dist.data.tokenizer import END_OF_TEXT, encode_texts, load_tokenizer, train_tokenizer, vocabulary_size

TEXTS = [
    f"The {n} quick brown foxes jump over {n * 7} lazy dogs, don't they?\n\n  Yes: they do."
    for n in range(99)
]
TOKENIZER = train_tokenizer(TEXTS, 400)


def encode(text: str) -> list[int]:
    return next(encode_texts(TOKENIZER, [(0, text)]))[1].tolist()


@settings(max_examples=60)
@given(st.text(max_size=200))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train_tokenizer(iter(TEXTS), 400).to_str() == TOKENIZER.to_str()
    assert vocabulary_size(TOKENIZER) == TOKENIZER.get_vocab_size() == 400


def test_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(256\) >= 257"):
        train_tokenizer(TEXTS, 256)


def test_text_that_spells_the_special_token_is_text() -> None:
    special = TOKENIZER.token_to_id(END_OF_TEXT)
    assert special == 0
    ids = encode(f"before{END_OF_TEXT}after")
    assert special not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == f"before{END_OF_TEXT}after"


@settings(max_examples=60)
@given(st.text(alphabet="ab'st 1.,\n\t\u00a0\u0085é字", max_size=300), st.integers(1, 40))
def test_chunks_do_not_change_the_ids(text: str, size: int) -> None:
    """A text cut before spaces, as long ones are, has the ids of the whole text."""
    pieces = []
    start = 0
    while space := module._CUT.search(text, start + size):
        pieces.append(text[start : space.start()])
        start = space.start()
    pieces.append(text[start:])
    assert "".join(pieces) == text
    joined = [id for piece in pieces for id in TOKENIZER.encode(piece).ids]
    assert joined == TOKENIZER.encode(text).ids == encode(text)


def test_long_texts_between_short_ones_keep_their_order_and_ids() -> None:
    long = " ".join(TEXTS) * 60  # several chunks
    assert len(long) > 1.5 * module._CHUNK_CHARS
    texts = [("a", "short"), ("b", long), ("c", ""), ("d", "x" * 1000)]
    encoded = list(encode_texts(TOKENIZER, texts))
    assert [tag for tag, _ in encoded] == ["a", "b", "c", "d"]
    for (_, text), (_, ids) in zip(texts, encoded, strict=True):
        assert ids.dtype == np.uint32
        np.testing.assert_array_equal(ids, TOKENIZER.encode(text).ids)


def test_load_switches_truncation_and_padding_off(tmp_path) -> None:
    saved = train_tokenizer(TEXTS, 300)
    saved.enable_truncation(4)
    saved.enable_padding(length=50)
    saved.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    ids = loaded.encode(TEXTS[0]).ids
    assert len(ids) > 4 and loaded.decode(ids) == TEXTS[0]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe"])
def test_what_is_no_tokenizer_is_named(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(path)
