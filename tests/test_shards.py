"""Prepared shards: exact reads by offset, and every kind of damage named."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from pi_dist.config import DataConfig
from pi_dist.data.shards import ShardError, ShardIndex, ShardWriter, open_splits, unigram_entropy

COUNTS = [5, 1, 300, 2, 77, 140, 30]


def documents(vocab_size: int = 1000) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(1, vocab_size, count - 1, dtype=np.uint32) for count in COUNTS]


def write(directory: Path, vocab_size: int = 1000, shard_tokens: int = 200) -> list[np.ndarray]:
    """Write the documents; returns them with their end-of-text token, which is 0."""
    tokenizer = directory.parent / "tokenizer.json"
    tokenizer.write_text('{"a": 1}')
    writer = ShardWriter(directory, vocab_size=vocab_size, end_of_text=0, shard_tokens=shard_tokens)
    for number, ids in enumerate(documents(vocab_size)):
        writer.add(ids, id=f"doc {number}", source="test")
    writer.finish(tokenizer, {"options": {}})
    return [np.append(ids, 0) for ids in documents(vocab_size)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_reads_are_exact(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    written = write(tmp_path / "data", vocab_size)
    index = ShardIndex.open(tmp_path / "data")
    assert (index.num_documents, index.num_tokens, index.end_of_text) == (len(COUNTS), sum(COUNTS), 0)
    assert index.token_counts.tolist() == COUNTS
    assert [shard.samples for shard in index.shards] == [3, 3, 1]
    for document, ids in enumerate(written):
        for start, stop in [(0, len(ids)), (0, 0), (len(ids) // 3, len(ids) // 2), (len(ids) - 1, len(ids))]:
            read = index.read(document, start, stop)
            assert read.dtype == dtype
            np.testing.assert_array_equal(read, ids[start:stop])
    with pytest.raises(AssertionError):
        index.read(0, 0, 6)  # would run into the next member


def test_a_read_touches_only_its_bytes(tmp_path: Path) -> None:
    """With the hashes off, bytes outside of the tokens asked for may be anything: they are not read."""
    written = write(tmp_path / "data")
    index = ShardIndex.open(tmp_path / "data", verify_hashes=False)
    number, offset, _ = index.documents[2].tolist()
    path = tmp_path / "data" / index.shards[number].name
    keep = slice(offset + 2 * 100, offset + 2 * 120)
    content = path.read_bytes()
    noise = bytearray(b"\xff" * len(content))
    noise[keep] = content[keep]
    path.write_bytes(noise)
    np.testing.assert_array_equal(index.read(2, 100, 120), written[2][100:120])


def test_same_documents_give_the_same_bytes_and_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    write(tmp_path / "three", shard_tokens=400)
    fingerprints = [ShardIndex.open(tmp_path / name).fingerprint for name in ("one", "two", "three")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_entropy_is_that_of_the_counts(tmp_path: Path) -> None:
    written = np.concatenate(write(tmp_path / "data", vocab_size=50))
    counts = [int((written == id).sum()) for id in range(50)]
    expected = -sum(c / len(written) * np.log(c / len(written)) for c in counts if c)
    assert unigram_entropy(tmp_path / "data") == pytest.approx(expected, rel=1e-12)


def read_all(directory: Path, verify_hashes: bool = True) -> None:
    index = ShardIndex.open(directory, verify_hashes)
    for document, tokens in enumerate(index.token_counts.tolist()):
        index.read(document, 0, tokens)


FILES = ["index.json", "documents.npy", "tokenizer.json", "shard-000000.tar", "shard-000002.tar"]


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "data")
    (tmp_path / "data" / name).unlink()
    with pytest.raises(ShardError, match=rf"data/{name}: missing"):
        ShardIndex.open(tmp_path / "data")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
def test_flipped_bit_is_named(tmp_path: Path, name: str, where: float) -> None:
    write(tmp_path / "data")
    path = tmp_path / "data" / name
    content = bytearray(path.read_bytes())
    position = int(where * (len(content) - 2))
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=rf"data/{name}: (changed|damaged)") as caught:
        read_all(tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("verify_hashes", [True, False])
def test_truncation_is_named_when_opened(tmp_path: Path, name: str, keep: float, verify_hashes: bool) -> None:
    write(tmp_path / "data")
    path = tmp_path / "data" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ShardError, match=rf"data/{name}: (changed|damaged|size \(\d+\) == index \(\d+\))"):
        ShardIndex.open(tmp_path / "data", verify_hashes)


def test_index_edited_or_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data")
    path = tmp_path / "data" / "index.json"
    index = json.loads(path.read_text())
    for content in [{**index, "end_of_text": 1}, [], {}, {**index, "checksum": None}]:
        path.write_text(json.dumps(content))
        with pytest.raises(ShardError, match=r"index\.json: damaged"):
            ShardIndex.open(tmp_path / "data")


def test_shard_of_other_data_is_refused(tmp_path: Path) -> None:
    """The same size, other tokens."""
    write(tmp_path / "data")
    write(tmp_path / "other", vocab_size=999)
    shutil.copyfile(tmp_path / "other" / "shard-000001.tar", tmp_path / "data" / "shard-000001.tar")
    with pytest.raises(ShardError, match=r"shard-000001\.tar: changed"):
        read_all(tmp_path / "data")


def test_change_and_cut_after_the_first_read_are_found(tmp_path: Path) -> None:
    write(tmp_path / "data")
    index = ShardIndex.open(tmp_path / "data")
    index.read(0, 0, 5)
    path = tmp_path / "data" / "shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(ShardError, match=r"shard-000000\.tar: changed"):
        index.read(0, 0, 5)
    path.write_bytes(content[:1000])
    with pytest.raises(ShardError, match=r"shard-000000\.tar: size"):
        index.read(0, 0, 5)
    path.unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar: missing"):
        index.read(0, 0, 5)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify_hashes", [True, False])
def test_hostile_pickle_is_not_executed(tmp_path: Path, name: str, verify_hashes: bool) -> None:
    """A pickle in place of any file; a shard is given its right size, so that only its hash tells."""
    write(tmp_path / "data")
    trap = tmp_path / "executed"
    path = tmp_path / "data" / name
    if name == "documents.npy":
        np.save(path, np.array([Hostile(trap)], dtype=object), allow_pickle=True)
        np.load(path, allow_pickle=True)
    else:
        hostile = pickle.dumps(Hostile(trap))
        pickle.loads(hostile)
        path.write_bytes(hostile.ljust(path.stat().st_size, b"\0"))
    assert trap.exists()  # the trap works
    trap.unlink()
    if name.endswith(".tar") and not verify_hashes:
        read_all(tmp_path / "data", verify_hashes)  # wrong tokens, as asked for, but only ever tokens
    else:
        with pytest.raises(ShardError, match=name):
            read_all(tmp_path / "data", verify_hashes)
    assert not trap.exists()


def test_data_without_a_token_to_predict_are_refused_unless_joined(tmp_path: Path) -> None:
    """Their loss would be that of nothing: 0, or a perplexity of 1."""
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, lengths in (("empty", [0, 0, 0]), ("some", [0, 1, 0])):
        writer = ShardWriter(tmp_path / name, vocab_size=300, end_of_text=0, shard_tokens=100)
        for number, length in enumerate(lengths):
            writer.add(np.ones(length, dtype=np.uint32), id=str(number), source="test")
        writer.finish(tmp_path / "tokenizer.json", {})
    empty, some = str(tmp_path / "empty"), str(tmp_path / "some")
    for splits in ({"train": empty}, {"train": some, "heldout": empty}):
        with pytest.raises(
            ShardError, match=r"empty: tokens \(3\) > documents \(3\) does not hold; no token"
        ):
            open_splits(DataConfig(**splits))
        open_splits(DataConfig(**splits, packing="join"))
    open_splits(DataConfig(train=some, heldout=some))
