"""Prepared shards: webdataset tar files of token ids, and an index with counts, offsets and hashes.

A directory holds `shard-000000.tar`, … (for each document `KEY.npy`, 1-d token ids that end with the
end-of-text token, and `KEY.json` with id, source and tokens), `tokenizer.json`, `documents.npy` (int64
[documents, 3]: shard, byte offset of the first token in it, tokens) and `index.json`, which holds the SHA-256
of all of them and its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pi_dist.config import DataConfig, UserError

FORMAT_VERSION = 1
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_ENTROPY_CHUNK = 1 << 22


class ShardError(UserError):
    """A prepared directory is damaged or incomplete; the message is one line that names the file."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its samples (documents), tokens, size in bytes and SHA-256."""

    name: str
    samples: int
    tokens: int
    bytes: int
    sha256: str


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Name the file in an error that comes of writing it; Python's own do not (of a full disk, say).

    Raises:
        ShardError: it cannot be written.
    """
    try:
        yield path
    except OSError as error:
        raise ShardError(f"{path}: cannot be written: {error.strerror or error}") from error


def _checksum(index: dict) -> str:
    """SHA-256 of an index without its own checksum."""
    content = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ShardWriter:
    """Writes a prepared directory: `add` every document, then `finish`. The directory must be new."""

    def __init__(self, directory: Path, *, vocab_size: int, end_of_text: int, shard_tokens: int) -> None:
        directory.mkdir()
        self.directory = directory
        self.vocab_size, self.end_of_text, self.shard_tokens = vocab_size, end_of_text, shard_tokens
        self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.shards: list[Shard] = []
        self.documents: list[np.ndarray] = []  # per shard, [samples, 3]
        self.num_documents = self.num_tokens = 0
        self._file = self._tar = None
        self._tokens: list[int] = []  # of the documents in the open shard
        self._open_tokens = 0  # their sum

    def add(self, ids: np.ndarray, *, id: str, source: str) -> None:
        """Append one document, ids [tokens] without the end-of-text token, which is added."""
        import webdataset

        path = self.directory / f"shard-{len(self.shards):06d}.tar"
        if self._tar is None:
            self._file = open(path, "xb")  # noqa: SIM115 - stays open over many calls, until _close_shard
            self._tar = webdataset.TarWriter(self._file, encoder=False, compress=False, mtime=0)
        ids = np.append(ids, self.end_of_text).astype(_DTYPES[self.dtype])
        meta = {"id": id, "source": source, "tokens": len(ids)}
        key = f"{self.num_documents:09d}"
        sample = {"__key__": key, "npy": webdataset.numpy_dumps(ids), "json": json.dumps(meta).encode()}
        with writing(path):
            self._tar.write(sample)
        self._tokens.append(len(ids))
        self.num_documents += 1
        self.num_tokens += len(ids)
        self._open_tokens += len(ids)
        if self._open_tokens >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        """End the open shard, find where its tokens lie, and hash it."""
        path = Path(self._file.name)
        with writing(path):
            self._tar.close()
            self._file.close()
            fsync(path)
        offsets = []
        with tarfile.open(path, "r:") as archive, open(path, "rb") as stream:
            for member in archive:
                if member.name.endswith(".npy"):
                    stream.seek(member.offset_data)
                    np.lib.format.read_magic(stream)
                    np.lib.format.read_array_header_1_0(stream)
                    offsets.append(stream.tell())
        rows = np.empty((len(offsets), 3), dtype=np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2] = len(self.shards), offsets, self._tokens
        self.shards.append(
            Shard(path.name, len(rows), self._open_tokens, path.stat().st_size, sha256_of(path))
        )
        self.documents.append(rows)
        self._file = self._tar = None
        self._tokens, self._open_tokens = [], 0

    def finish(self, tokenizer: Path, made_from: dict) -> None:
        """Write the last shard, the document table, a copy of the tokenizer and, last of all, the index."""
        if self._tar is not None:
            self._close_shard()
        with writing(self.directory / "tokenizer.json") as path:
            shutil.copyfile(tokenizer, path)
            fsync(path)
        with writing(self.directory / "documents.npy") as path:
            np.save(path, np.concatenate(self.documents), allow_pickle=False)
            fsync(path)
        index = {
            "version": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "dtype": self.dtype,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "tokenizer.json": sha256_of(self.directory / "tokenizer.json"),
            "documents.npy": sha256_of(self.directory / "documents.npy"),
            "shards": [asdict(shard) for shard in self.shards],
            "made_from": made_from,
        }
        index["checksum"] = _checksum(index)
        with writing(self.directory / "index.json") as path:
            path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            fsync(path)
        fsync(self.directory)

    def abandon(self) -> None:
        """Close the open file of a directory that will be deleted; the disk may be full."""
        for opened in filter(None, (self._tar, self._file)):
            with contextlib.suppress(OSError):
                opened.close()


@dataclass(frozen=True)
class ShardIndex:
    """A prepared directory, opened with `ShardIndex.open`.

    documents: int64 [documents, 3], columns shard, byte offset of the first token, tokens. fingerprint:
    SHA-256 over everything that the index holds, hashes of the shards included; equal on ranks that read the
    same data. tokenizer: the verified bytes of tokenizer.json. made_from: options and hash of the inputs.
    """

    directory: Path
    vocab_size: int
    end_of_text: int
    dtype: np.dtype
    documents: np.ndarray
    shards: tuple[Shard, ...]
    tokenizer: bytes = field(repr=False)
    made_from: dict
    fingerprint: str
    verify_hashes: bool
    _checked: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, directory: str | Path, verify_hashes: bool = True) -> ShardIndex:
        """Read the index and check it, the document table, the tokenizer and every shard's size.

        verify_hashes: also check a shard's SHA-256 when it is first read, once per process. Raises
        ShardError, naming the file and what is wrong with it.
        """
        directory = Path(directory)
        path = directory / "index.json"
        try:
            index = json.loads(_contents(path))
        except (ValueError, RecursionError) as error:
            raise ShardError(
                str(error) if isinstance(error, ShardError) else f"{path}: damaged: {error}"
            ) from error
        if not isinstance(index, dict) or index.get("checksum") != _checksum(index):
            raise ShardError(f"{path}: damaged: its checksum differs from its contents")
        if index["version"] != FORMAT_VERSION:
            raise ShardError(
                f"{path}: format version {index['version']}; this program reads {FORMAT_VERSION}"
            )
        contents = {name: _contents(directory / name) for name in ("tokenizer.json", "documents.npy")}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != index[name]:
                raise ShardError(f"{directory / name}: changed: its SHA-256 differs from the index")
        opened = cls(
            directory=directory,
            vocab_size=index["vocab_size"],
            end_of_text=index["end_of_text"],
            dtype=_DTYPES[index["dtype"]],
            documents=np.load(directory / "documents.npy", mmap_mode="r", allow_pickle=False),
            shards=tuple(Shard(**shard) for shard in index["shards"]),
            tokenizer=contents["tokenizer.json"],
            made_from=index["made_from"],
            fingerprint=index["checksum"],
            verify_hashes=verify_hashes,
        )
        for number in range(len(opened.shards)):
            opened._shard_state(number)
        return opened

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def token_counts(self) -> np.ndarray:
        """Tokens of each document, end-of-text included, int64 [documents]."""
        return self.documents[:, 2]

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / "tokenizer.json"

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Token ids [stop - start] of a document, tokens start to stop - 1, and nothing else, from its shard.

        Raises ShardError if the shard is missing, its size or SHA-256 differs from the index, or it was cut.
        """
        number, offset, tokens = (int(value) for value in self.documents[document])
        assert 0 <= start <= stop <= tokens, f"0 <= {start} <= {stop} <= {tokens} of document {document}"
        path = self.directory / self.shards[number].name
        self._check_shard(number)
        try:
            position = offset + start * self.dtype.itemsize
            ids = np.fromfile(path, dtype=self.dtype, count=stop - start, offset=position)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read: {error.strerror or error}") from error
        if len(ids) != stop - start:
            raise ShardError(
                f"{path}: cut while in use: {len(ids)} of {stop - start} tokens at byte {position}"
            )
        return ids

    def _shard_state(self, number: int) -> tuple[int, int]:
        """(size, time of the last change) of a shard; raises ShardError unless the size is the index's."""
        shard = self.shards[number]
        path = self.directory / shard.name
        try:
            status = path.stat()
        except OSError as error:
            raise ShardError(f"{path}: missing: {error.strerror}") from error
        if status.st_size != shard.bytes:
            raise ShardError(
                f"{path}: size ({status.st_size}) == index ({shard.bytes}) does not hold; cut or changed"
            )
        return status.st_size, status.st_mtime_ns

    def _check_shard(self, number: int) -> None:
        """Check size, and the SHA-256 unless this very file was checked before."""
        state = self._shard_state(number)
        if self.verify_hashes and self._checked.get(number) != state:
            path = self.directory / self.shards[number].name
            if sha256_of(path) != self.shards[number].sha256:
                raise ShardError(f"{path}: changed: its SHA-256 differs from the index")
            self._checked[number] = state


def check_labels(index: ShardIndex, packing: str) -> None:
    """Raise ShardError if no document has a token with a next one, so that a loss would be of nothing.

    Joined, documents follow on each other, and every token but the last of a sequence has a next one.
    """
    if packing != "join" and index.num_tokens <= index.num_documents:
        raise ShardError(
            f"{index.directory}: tokens ({index.num_tokens}) > documents ({index.num_documents}) does not "
            "hold; no token has a next one to predict"
        )


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: missing: {error.strerror}") from error


def open_splits(config: DataConfig) -> tuple[ShardIndex, ShardIndex | None]:
    """The training and the held-out data of a run.

    Raises:
        ShardError: they are damaged, their tokenizers differ, or no token of one has a next one.
    """
    train = ShardIndex.open(config.train, config.verify_hashes)
    check_labels(train, config.packing)
    if config.heldout is None:
        return train, None
    heldout = ShardIndex.open(config.heldout, config.verify_hashes)
    check_labels(heldout, config.packing)
    if train.tokenizer != heldout.tokenizer:
        raise ShardError(
            f"{heldout.tokenizer_path}: SHA-256 == that of {train.tokenizer_path} does not hold; "
            "its tokens mean something else"
        )
    return train, heldout


def unigram_entropy(directory: str | Path) -> float:
    """Entropy of a directory's own token counts, nats per token; without context no loss is lower."""
    index = ShardIndex.open(directory)
    counts = np.zeros(index.vocab_size, dtype=np.int64)
    for document, tokens in enumerate(index.token_counts.tolist()):
        for start in range(0, tokens, _ENTROPY_CHUNK):
            ids = index.read(document, start, min(start + _ENTROPY_CHUNK, tokens))
            counts += np.bincount(ids, minlength=index.vocab_size)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
