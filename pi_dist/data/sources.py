"""Documents as they come from users: .txt, .jsonl and webdataset .tar files, or directories of them.

Everything that is read here is somebody else's: no file is unpickled, and a file that is damaged is refused
by name.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pi_dist.config import UserError

SUFFIXES = (".txt", ".jsonl", ".tar")
"""Files that are read; a directory's other files are left alone."""
TAR_EXTENSIONS = ("txt", "json")
"""Members of a .tar that are decoded; any other is refused."""

_BLOCK = 512


class PrepareError(UserError):
    """The input or output cannot be used; the message is one line that names the file."""


@dataclass(frozen=True)
class InputFile:
    """A file to read, and its name in document ids (relative to the directory that was given)."""

    path: Path
    name: str


@dataclass(frozen=True)
class Document:
    """One text, where it came from, an id that a person can find it by, and its file and place in it."""

    id: str
    source: str
    text: str
    file: InputFile
    where: str


def list_inputs(inputs: list[str]) -> list[InputFile]:
    """All files of `inputs`, directories searched recursively, sorted by path, each file once.

    Raises PrepareError for a missing path, a file of another kind or that is not regular (a pipe would block,
    and can be read only once), a directory that cannot be read, or if nothing is left.
    """
    files: dict[str, InputFile] = {}
    for entry in inputs:
        root = Path(entry)
        if root.is_dir():
            found = [path for path in _files_below(root) if path.suffix.lower() in SUFFIXES]
        elif root.exists():
            if root.suffix.lower() not in SUFFIXES:
                raise PrepareError(
                    f"{entry}: only {', '.join(SUFFIXES)} files and directories of them are read"
                )
            found, root = [root], root.parent
        else:
            raise PrepareError(f"{entry}: no such file or directory")
        for path in found:
            if not path.is_file():
                raise PrepareError(f"{path}: is not a regular file")
            files.setdefault(os.path.realpath(path), InputFile(path, path.relative_to(root).as_posix()))
    if not files:
        raise PrepareError(f"{', '.join(inputs) or 'inputs'}: no {', '.join(SUFFIXES)} file found")
    return sorted(files.values(), key=lambda file: (file.name, str(file.path)))


def _files_below(root: Path) -> Iterator[Path]:
    """Files of a directory and of all below it, also those that are linked to, each directory once.

    Links to directories are followed last, so that a file which also lies in the tree keeps its name there.
    """

    def refuse(error: OSError) -> None:
        raise PrepareError(f"{error.filename}: directory cannot be read: {error.strerror}") from error

    seen = set()
    starts = [root]
    for start in starts:
        for parent, directories, names in os.walk(start, onerror=refuse):
            place = os.path.realpath(parent)
            if place in seen:
                directories.clear()
                continue
            seen.add(place)
            directories.sort()
            paths = [Path(parent, name) for name in directories]
            starts += [path for path in paths if path.is_symlink()]
            for path in (Path(parent, name) for name in sorted(names)):
                if not path.exists() and path.suffix.lower() in ("", *SUFFIXES):  # it may be a directory
                    raise PrepareError(f"{path}: links to what is not there, or in a circle")
                yield path


def read_documents(file: InputFile, text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of one file in order: one per .txt, per .jsonl line, per sample of a .tar.

    JSON objects hold the text in `text_field`, and optionally `id` and `source`. Texts may be empty. Raises
    PrepareError naming the file (and the line or sample) for bytes that are not UTF-8, bad JSON, a missing
    text, and for every .tar that is cut, damaged, empty, repeats a key or holds anything but .txt and .json
    members.
    """
    match file.path.suffix.lower():
        case ".txt":
            where = str(file.path)
            yield Document(file.name, file.name, _utf8(file.path.read_bytes(), where), file, where)
        case ".jsonl":
            yield from _read_jsonl(file, text_field)
        case _:
            yield from _read_tar(file, text_field)


def _utf8(data: bytes, where: str) -> str:
    """Text of UTF-8 bytes, a byte order mark removed."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PrepareError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error


def _json_object(data: bytes, where: str) -> dict:
    """The JSON object in `data`."""
    text = _utf8(data, where)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise PrepareError(f"{where}: bad JSON: nested too deep") from error
    except ValueError as error:  # JSONDecodeError, and that of an integer of too many digits
        raise PrepareError(f"{where}: bad JSON: {error}") from error
    if not isinstance(value, dict):
        raise PrepareError(f"{where}: a JSON object is needed, not {type(value).__name__}")
    return value


def _document(fields: dict, text_field: str, where: str, default_id: str, file: InputFile) -> Document:
    """A document from a JSON object; checks that the text is one that can be encoded."""
    text = fields.get(text_field)
    if not isinstance(text, str):
        raise PrepareError(f"{where}: field {text_field!r} must hold a string, not {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PrepareError(f"{where}: field {text_field!r} holds half a surrogate pair") from error
    return Document(
        str(fields.get("id", default_id)), str(fields.get("source", file.name)), text, file, where
    )


def _read_jsonl(file: InputFile, text_field: str) -> Iterator[Document]:
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file.path}: line {number}"
                fields = _json_object(line, where)
                yield _document(fields, text_field, where, f"{file.name}:{number}", file)


def _read_tar(file: InputFile, text_field: str) -> Iterator[Document]:
    """Samples through webdataset, from a stream that is already open (it would run a name like "pipe:…")."""
    from webdataset.autodecode import Decoder, DecodingError
    from webdataset.tariterators import group_by_keys, tar_file_expander

    expected = _check_tar(file.path)

    def decode(extension: str, data: bytes) -> str | dict:
        return _utf8(data, extension) if extension == ".txt" else _json_object(data, extension)

    decoder = Decoder([decode], pre=[], post=[])  # pre and post: none of webdataset's own decoders
    samples = 0
    with open(file.path, "rb") as stream:
        for raw in group_by_keys(tar_file_expander([{"url": str(file.path), "stream": stream}])):
            key, where = raw["__key__"], f"{file.path}: sample {raw['__key__']}"
            try:
                sample = decoder(raw)
            except DecodingError as error:
                raise PrepareError(f"{where}: {error.__cause__}") from error
            fields = sample.get("json", {})
            if "txt" in sample:
                fields = {**fields, text_field: sample["txt"]}
            samples += 1
            yield _document(fields, text_field, where, f"{file.name}:{key}", file)
    if samples != expected:
        raise PrepareError(f"{file.path}: {samples} samples were read of {expected}")


def _check_tar(path: Path) -> int:
    """Number of samples; raises PrepareError unless the archive is whole and holds nothing but them.

    webdataset ends quietly at a cut, skips what has no extension and gives a repeated key twice.
    """
    from webdataset.tariterators import base_plus_ext

    size = path.stat().st_size
    end, keys, last_key, extensions = 0, set(), None, set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isdir():
                    continue
                where = f"{path}: member {member.name}"
                key, extension = base_plus_ext(member.name)
                if not member.isreg() or member.issparse() or key is None or member.name.startswith("__"):
                    raise PrepareError(f"{where}: only plain files named KEY.txt and KEY.json are read")
                extension = extension.lower()
                if extension not in TAR_EXTENSIONS:
                    raise PrepareError(
                        f"{where}: .{extension} is refused; only .txt and .json members are decoded"
                    )
                if key != last_key:
                    if key in keys:
                        raise PrepareError(f"{where}: the key {key} is there twice")
                    keys.add(key)
                    last_key, extensions = key, set()
                if extension in extensions:
                    raise PrepareError(f"{where}: is there twice")
                extensions.add(extension)
    except tarfile.TarError as error:
        raise PrepareError(f"{path}: not a whole uncompressed tar archive: {error}") from error
    if size - end < 2 * _BLOCK:
        raise PrepareError(
            f"{path}: cut: {size} bytes, the last member and the end mark need {end + 2 * _BLOCK}"
        )
    with open(path, "rb") as stream:
        stream.seek(end)
        while rest := stream.read(1 << 20):
            if any(rest):
                raise PrepareError(f"{path}: damaged: no member and no end mark at byte {end}")
    if not keys:
        raise PrepareError(f"{path}: holds no sample")
    return len(keys)
