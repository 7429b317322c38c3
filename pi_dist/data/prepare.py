"""`pi-dist prepare`: text in, a prepared directory of token shards out, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pi_dist.data.shards import ShardError, ShardIndex, ShardWriter, fsync, sha256_of, writing
from pi_dist.data.sources import Document, InputFile, PrepareError, list_inputs, read_documents
from pi_dist.data.tokenizer import (
    END_OF_TEXT,
    encode_texts,
    kept_characters,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)

_HELDOUT_OFFSET = 5
_LOCK = "lock"


@dataclass(frozen=True)
class SplitSummary:
    """One prepared directory: documents, tokens (end-of-text included), tokens of the longest document."""

    directory: Path
    documents: int
    tokens: int
    longest_document: int


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` made, or found made already from the same inputs and options (`reused`)."""

    train: SplitSummary
    heldout: SplitSummary | None
    vocab_size: int
    empty_documents: int
    """Texts of nothing but white space, which were left out."""
    reused: bool


def prepare(
    inputs: list[str],
    output: str,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 8192,
    heldout_every: int = 0,
    shard_tokens: int = 50_000_000,
    text_field: str = "text",
    end_of_text: str = END_OF_TEXT,
) -> PrepareSummary:
    """Tokenize the documents of `inputs` into `output`/train and, if heldout_every > 0, `output`/heldout.

    inputs: .txt (a document each), .jsonl, webdataset .tar files, and directories of them, read in sorted
    order. tokenizer: a tokenizer.json; None trains a byte-level BPE of vocab_size on the training documents.
    heldout_every: one document of this many is held out (0: none). shard_tokens: a shard is closed at this
    size. text_field: key of the text in JSON objects. end_of_text: the token of `tokenizer` that ends a
    document.

    The output appears by one rename when it is complete. If it is there already and complete, from the same
    inputs and options, nothing is done. Where SIGTERM and SIGHUP have their default handlers, they end the
    process with status 128 + signal, after what was half made is removed. Raises PrepareError (one line, the
    file named) for input that is refused, for options that cannot work, and for an output that holds anything
    else.
    """
    for name, value, least in (("heldout_every", heldout_every, 0), ("shard_tokens", shard_tokens, 1)):
        if value < least:
            raise PrepareError(f"{name}: {name} ({value}) >= {least} does not hold")
    if heldout_every == 1:
        raise PrepareError(
            "heldout_every: heldout_every (1) != 1 does not hold; nothing would be left to train on"
        )
    if tokenizer is None and end_of_text != END_OF_TEXT:
        raise PrepareError(
            f"end_of_text: end_of_text ({end_of_text!r}) == {END_OF_TEXT!r} does not hold; a newly"
            " trained tokenizer has no other; name one that has as tokenizer"
        )
    target, place = Path(output), _place(output)
    inside = [entry for entry in inputs if place.is_relative_to(Path(entry).resolve())]
    if inside:
        raise PrepareError(f"{output}: lies inside the input {inside[0]}, which would then be read as input")
    files = list_inputs(inputs)
    options = {
        "tokenizer": tokenizer and sha256_of(_existing(tokenizer)),
        "vocab_size": None if tokenizer else vocab_size,
        "heldout_every": heldout_every,
        "shard_tokens": shard_tokens,
        "text_field": text_field,
        "end_of_text": end_of_text,
    }
    hashes = [[file.name, sha256_of(file.path)] for file in _progress(files, "hash inputs", "file")]
    digest = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    made_from = {"options": options, "inputs": len(files), "inputs_sha256": digest}

    _remove_leftovers(place)
    if place.exists() and not _is_empty(place):
        return _reuse(target, made_from)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _exit_at_signals(), _building_folder(place) as building:
        empty = _build(files, building, made_from, tokenizer)
        changed = [
            file for file, (_, sha256) in zip(files, hashes, strict=True) if sha256_of(file.path) != sha256
        ]
        if changed:
            raise PrepareError(f"{changed[0].path}: changed while it was read")
        (building / _LOCK).unlink(missing_ok=True)
        fsync(building)
        with writing(place):
            building.rename(place)
        fsync(place.parent)
    return _summary(target, empty, reused=False)


def _is_empty(place: Path) -> bool:
    """Whether it is a directory without entries."""
    return place.is_dir() and not any(place.iterdir())


def _place(output: str) -> Path:
    """Where an output really lies, links followed; PrepareError where a rename cannot put it."""
    place = Path(os.path.realpath(output))
    if place.is_symlink():
        raise PrepareError(f"{output}: is a link in a circle")
    if _is_empty(place) and (place.is_mount() or place == Path.cwd()):
        kind = "a mount point" if place.is_mount() else "the current directory"
        raise PrepareError(f"{output}: is {kind}, which a rename cannot replace; name a new directory in it")
    return place


@contextlib.contextmanager
def _exit_at_signals() -> Iterator[None]:
    """Within, the first SIGTERM or SIGHUP raises SystemExit (128 + signal), so that files are cleaned up.

    A handler that is not the default stays, and threads other than the main one cannot have any.
    """
    taken = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL
    ]
    if threading.current_thread() is not threading.main_thread():
        taken = []

    def leave(received: int, frame) -> None:
        for number in taken:  # another one must not disturb the cleaning
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + received)

    try:
        for number in taken:
            signal.signal(number, leave)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _building_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, removed if what is done within fails.

    While this process lives it locks the folder's file `lock`, which holds the name of its host.
    """
    building = place.with_name(f".{place.name}.preparing-{uuid.uuid4().hex[:8]}")
    with ExitStack() as stack:
        try:
            with writing(place):
                building.mkdir()
            file = stack.enter_context(open(building / f"{_LOCK}.new", "w"))
            file.write(socket.gethostname())
            file.flush()
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(file.name, building / _LOCK)  # so that whoever finds it finds it locked
            (building / f"{_LOCK}.new").unlink(missing_ok=True)
            yield building
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


def _remove_leftovers(place: Path) -> None:
    """Remove folders that earlier, killed processes of this host built `place` in; name those of others."""
    pattern = re.compile(re.escape(f".{place.name}.preparing-") + "[0-9a-f]{8}")
    names = os.listdir(place.parent) if place.parent.is_dir() else []
    for folder in (place.with_name(name) for name in sorted(names) if pattern.fullmatch(name)):
        said = "left by a prepare that was killed, unless one is at work there; remove it if none is"
        with contextlib.suppress(OSError), open(folder / _LOCK, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its owner lives
                continue
            if file.read() == socket.gethostname():
                shutil.rmtree(folder)
                said = "removed, left by a prepare that was killed"
        print(f"warning: {folder}: {said}", file=sys.stderr)


def _build(files: list[InputFile], building: Path, made_from: dict, tokenizer_path: str | None) -> int:
    """Write both splits below `building`; returns the number of empty documents."""
    options = made_from["options"]
    every = options["heldout_every"]
    counts = {"documents": 0, "empty": 0}

    def documents(label: str, total: int | None = None) -> Iterator[Document]:
        """All documents that are not empty, in order."""
        counts.update(documents=0, empty=0)
        read = (document for file in files for document in read_documents(file, options["text_field"]))
        for document in _progress(read, label, "doc", total):
            empty = not document.text.strip()
            counts["empty" if empty else "documents"] += 1
            if not empty:
                yield document

    def is_heldout(number: int) -> bool:
        return every > 0 and number % every == _HELDOUT_OFFSET % every

    total = None
    saved = Path(tokenizer_path) if tokenizer_path else building / "tokenizer.json"
    if tokenizer_path is None:
        texts = (doc.text for n, doc in enumerate(documents("train tokenizer")) if not is_heldout(n))
        try:
            trained = train_tokenizer(texts, options["vocab_size"])
        except ValueError as error:
            raise PrepareError(str(error)) from error
        with writing(saved):
            saved.write_text(trained.to_str(pretty=True), encoding="utf-8")
        total = counts["documents"] + counts["empty"]
    tokenizer, end_of_text = _usable_tokenizer(saved, options["end_of_text"])

    with ExitStack() as stack:
        writers = []
        for split in ("train", "heldout") if every else ("train",):
            writers.append(
                ShardWriter(
                    building / split,
                    vocab_size=vocabulary_size(tokenizer),
                    end_of_text=end_of_text,
                    shard_tokens=options["shard_tokens"],
                )
            )
            stack.callback(writers[-1].abandon)
        texts = documents("write shards", total)
        if tokenizer_path is not None:
            texts = _warn_of_loss(texts, tokenizer, saved)
        tagged = (((n, doc.id, doc.source, doc.where), doc.text) for n, doc in enumerate(texts))
        for (number, id, source, where), ids in encode_texts(tokenizer, tagged):
            if len(ids) == 0:
                raise PrepareError(f"{where}: its text has no token in {saved}, and would be lost")
            writers[is_heldout(number)].add(ids, id=id, source=source)
        for writer in writers:
            if writer.num_documents == 0:
                raise PrepareError(
                    f"{writer.directory.name}: no document is left for it; inputs that are not empty:"
                    f" {counts['documents']}, heldout_every: {every}"
                )
            writer.finish(saved, {**made_from, "empty_documents": counts["empty"]})
    if tokenizer_path is None:
        saved.unlink()  # each split has its copy
    return counts["empty"]


def _warn_of_loss(documents: Iterator[Document], tokenizer, path: Path) -> Iterator[Document]:
    """The documents; warns once on stderr if the first of a file loses most of its text to the tokenizer."""
    file, warned = None, False
    for document in documents:
        if not warned and document.file != file:
            file = document.file
            kept, seen = kept_characters(tokenizer, document.text)
            if warned := 2 * kept < seen:
                print(
                    f"warning: {document.where}: of its first {seen} visible characters {path} can bring back"
                    f" {kept}; what it does not know is lost",
                    file=sys.stderr,
                )
        yield document


def _usable_tokenizer(path: Path, end_of_text: str):
    """(tokenizer, id of its end-of-text token)."""
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        raise PrepareError(str(error)) from error
    token = tokenizer.token_to_id(end_of_text)
    if token is None:
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
        raise PrepareError(
            f"{path}: has no token {end_of_text!r} to end documents with; its added ones: {special}"
        )
    return tokenizer, token


def _existing(path: str) -> Path:
    if not os.path.isfile(path):
        raise PrepareError(f"{path}: no such file")
    return Path(path)


def _reuse(target: Path, made_from: dict) -> PrepareSummary:
    """The summary of an output that is complete and made from the same; PrepareError for any other."""
    try:
        found = dict(ShardIndex.open(target / "train").made_from)
        if made_from["options"]["heldout_every"] and found["options"]["heldout_every"]:
            ShardIndex.open(target / "heldout")
    except ShardError as error:
        raise PrepareError(f"{target}: is there and is not complete prepared data ({error})") from error
    empty = found.pop("empty_documents")
    if found != made_from:
        pairs = {**found, **found["options"]}, {**made_from, **made_from["options"]}
        differs = [key for key in pairs[0] if key != "options" and pairs[0][key] != pairs[1].get(key)]
        raise PrepareError(
            f"{target}: is there, made from other inputs or options (differ: {', '.join(differs)})"
        )
    return _summary(target, empty, reused=True)


def _summary(target: Path, empty: int, reused: bool) -> PrepareSummary:
    """Read back what lies in `target`."""
    splits = {}
    for name in ("train", "heldout"):
        if (target / name).is_dir():
            index = ShardIndex.open(target / name)
            longest = int(index.token_counts.max())
            splits[name] = SplitSummary(target / name, index.num_documents, index.num_tokens, longest)
    return PrepareSummary(splits["train"], splits.get("heldout"), index.vocab_size, empty, reused)


def _progress(items, label: str, unit: str, total: int | None = None):
    """A progress bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=label, unit=unit, total=total, disable=None)
