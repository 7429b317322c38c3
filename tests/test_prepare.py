"""`prepare`: what goes in comes out, bad input is refused by name, and the output is whole or absent."""

import errno
import fcntl
import io
import json
import os
import pickle
import signal
import socket
import string
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tokenizers import Tokenizer, decoders, models, normalizers

from pi_dist.data.prepare import PrepareError, prepare
from pi_dist.data.shards import ShardError, ShardIndex
from pi_dist.data.sources import list_inputs
from pi_dist.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

REPOSITORY = str(Path(__file__).parents[1])

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "rain",
    "falls",
    "on",
    "old",
    "grey",
    "roofs",
]


def text_of(number: int) -> str:
    return " ".join(WORDS[(number * k * k + k) % len(WORDS)] for k in range(5 + number % 40)) + f" {number}\n"


def write_texts(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text_of(n) for n in range(count)]
    for n, text in enumerate(texts):
        (folder / f"{n:04d}.txt").write_text(text)
    return texts


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def documents(directory: Path) -> list[tuple[str, str]]:
    """(id, text) of each document, read back through webdataset's own grouping."""
    index = ShardIndex.open(directory)
    tokenizer = load_tokenizer(index.tokenizer_path)
    found = []
    for number, shard in enumerate(index.shards):
        with open(directory / shard.name, "rb") as stream:
            files = webdataset.tariterators.tar_file_expander([{"url": shard.name, "stream": stream}])
            for sample in webdataset.tariterators.group_by_keys(files):
                ids = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
                meta = json.loads(sample["json"])
                row = len(found)
                assert index.documents[row].tolist()[0] == number
                assert meta["tokens"] == len(ids) == index.documents[row, 2]
                assert ids[-1] == index.end_of_text and index.end_of_text not in ids[:-1]
                np.testing.assert_array_equal(ids, index.read(row, 0, len(ids)))
                found.append((meta["id"], tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False)))
    assert len(found) == index.num_documents
    return found


def leftovers(folder: Path, *expected: str) -> bool:
    """Whether the folder holds the expected names and nothing else, hidden ones included."""
    return sorted(os.listdir(folder)) == sorted(expected)


def test_every_kind_of_input_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "in"
    texts = write_texts(source / "books", 20)
    (source / "books" / "notes.md").write_text("not read")
    lines = [{"text": "été <|endoftext|> 字", "id": "x7"}, {"text": "  \n"}, {"text": "plain"}]
    (source / "more.jsonl").write_text("\ufeff" + "\n".join(json.dumps(line) for line in lines) + "\n\n")
    members = [("d/a.txt", b"first"), ("d/a.json", b'{"id": "A"}'), ("d/b.json", b'{"text": "second"}')]
    write_tar(source / "web.tar", members)
    (source / "zz.txt").write_text("")
    summary = prepare([str(source)], str(tmp_path / "out"), vocab_size=300, shard_tokens=200)
    expected = [(f"books/{n:04d}.txt", text) for n, text in enumerate(texts)]
    expected += [("x7", lines[0]["text"]), ("more.jsonl:3", "plain")]
    expected += [("A", "first"), ("web.tar:d/b", "second")]
    assert documents(tmp_path / "out" / "train") == expected
    index = ShardIndex.open(tmp_path / "out" / "train")
    assert len(index.shards) > 2 and index.dtype == np.uint16
    assert summary.heldout is None and summary.empty_documents == 2 and not summary.reused
    assert summary.train.documents == 24 and summary.train.tokens == index.token_counts.sum()
    assert summary.train.longest_document == index.token_counts.max()
    assert leftovers(tmp_path / "out", "train")


def test_linked_directories_are_read_once_and_each_file_by_its_own_name(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_texts(source / "z", 1)
    write_texts(tmp_path / "elsewhere" / "deep", 2)
    (tmp_path / "elsewhere" / "up").symlink_to(source)  # a loop
    (source / "a").symlink_to("z")  # in the tree already
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "z" / "self").symlink_to(".")
    names = [file.name for file in list_inputs([str(source)])]
    assert names == ["linked/deep/0000.txt", "linked/deep/0001.txt", "z/0000.txt"]


def test_directory_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch) -> None:
    write_texts(tmp_path / "in" / "open", 1)
    locked = tmp_path / "in" / "locked"
    locked.mkdir()
    scandir = os.scandir

    def scan(path):
        if Path(path) == locked:  # root may read it whatever its mode
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(PrepareError, match=r"in/locked: directory cannot be read: Permission denied"):
        list_inputs([str(tmp_path / "in")])
    locked.rmdir()
    locked.symlink_to("unmounted")
    with pytest.raises(PrepareError, match=r"in/locked: links to what is not there"):
        list_inputs([str(tmp_path / "in")])
    locked.rename(tmp_path / "in" / "picture.png")  # no text would be read from there
    assert list_inputs([str(tmp_path / "in")])


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_not_a_regular_file_is_refused(tmp_path: Path, monkeypatch, kind: str) -> None:
    """By name and at once; reading a pipe would wait for ever."""
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    write_texts(tmp_path / "in", 2)
    path = Path("in", "odd.txt")
    if kind == "pipe":
        os.mkfifo("pipe")
        path.symlink_to("../pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to(os.devnull)
    for given in ("in", "in/odd.txt"):
        with pytest.raises(PrepareError, match=r"^in/odd\.txt: is not a regular file$"):
            list_inputs([given])


def test_split_is_every_nth_and_tokenizer_sees_only_training_text(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "in", 30)
    (tmp_path / "in" / "0000.txt").write_text(" ")  # empty ones are not numbered
    prepare([str(tmp_path / "in")], str(tmp_path / "out"), vocab_size=300, heldout_every=12)
    heldout = [id for id, _ in documents(tmp_path / "out" / "heldout")]
    assert heldout == ["0006.txt", "0018.txt"]
    train = documents(tmp_path / "out" / "train")
    assert [text for _, text in train] == [text for n, text in enumerate(texts) if n not in (0, 6, 18)]
    again = train_tokenizer([text for _, text in train], 300).to_str()
    assert load_tokenizer(tmp_path / "out" / "heldout" / "tokenizer.json").to_str() == again


def test_given_tokenizer_and_large_vocabulary(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "in", 6)
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.add_tokens([f"<{n}>" for n in range(70_000)])
    tokenizer.save(str(tmp_path / "mine.json"))
    out = tmp_path / "out"
    summary = prepare([str(tmp_path / "in")], str(out), tokenizer=str(tmp_path / "mine.json"))
    assert summary.vocab_size > 70_000 and ShardIndex.open(out / "train").dtype == np.uint32
    assert [text for _, text in documents(out / "train")] == texts
    with pytest.raises(PrepareError, match=r"mine\.json: has no token '</s>'"):
        prepare([str(tmp_path / "in")], "out2", tokenizer=str(tmp_path / "mine.json"), end_of_text="</s>")


def test_same_again_does_nothing_and_anything_else_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 8)
    arguments = dict(inputs=[str(tmp_path / "in")], output=str(tmp_path / "out"), heldout_every=3)
    first = prepare(**arguments, vocab_size=300)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = prepare(**arguments, vocab_size=300)
    assert again.reused and (again.train, again.heldout) == (first.train, first.heldout)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(PrepareError, match=r"differ: vocab_size\)"):
        prepare(**arguments, vocab_size=301)
    (tmp_path / "in" / "0003.txt").write_text("changed")
    with pytest.raises(PrepareError, match=r"differ: inputs_sha256\)"):
        prepare(**arguments, vocab_size=300)
    (tmp_path / "out" / "heldout" / "index.json").unlink()
    with pytest.raises(PrepareError, match=r"not complete prepared data .*heldout/index\.json: missing"):
        prepare(**arguments, vocab_size=300)


def test_foreign_output_is_refused_and_an_empty_one_used(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 3)
    out = tmp_path / "out"
    out.mkdir()
    assert prepare([str(tmp_path / "in")], str(out), vocab_size=300).train.documents == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_text("precious")
    with pytest.raises(PrepareError, match="other: is there and is not complete prepared data"):
        prepare([str(tmp_path / "in")], str(other), vocab_size=300)
    assert leftovers(other, "thesis.doc")


def test_output_may_be_a_link(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "in", 3)
    (tmp_path / "disk").mkdir()
    for name, place in (("empty", "disk/empty"), ("dangling", "disk/new/dangling")):
        Path(name).symlink_to(place)
    Path("disk/empty").mkdir()
    for name in ("empty", "dangling"):
        assert not prepare(["in"], name, vocab_size=300).reused
        assert prepare(["in"], name, vocab_size=300).reused
        assert Path(name).is_symlink() and len(documents(Path(name, "train"))) == 3
    assert leftovers(tmp_path, "in", "disk", "empty", "dangling")
    assert leftovers(tmp_path / "disk", "empty", "new") and leftovers(tmp_path / "disk" / "new", "dangling")


def test_output_that_cannot_be_put_there_is_refused_before_any_work(tmp_path: Path, monkeypatch) -> None:
    write_texts(tmp_path / "in", 3)
    (tmp_path / "here").mkdir()
    (tmp_path / "mounted").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path / "here")
    is_mount = Path.is_mount
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted" or is_mount(path))
    monkeypatch.setattr("pi_dist.data.prepare.list_inputs", None)
    for output, message in {
        ".": r"^\.: is the current directory, which a rename cannot replace",
        str(tmp_path / "here"): r"here: is the current directory, which a rename cannot replace",
        "../mounted": r"^\.\./mounted: is a mount point, which a rename cannot replace",
        "../circle": r"^\.\./circle: is a link in a circle",
    }.items():
        with pytest.raises(PrepareError, match=message):
            prepare(["../in"], output, vocab_size=300)
    monkeypatch.undo()
    out = tmp_path / ("x" * 250)  # the folder that it is built in has a longer name
    with pytest.raises(ShardError, match=r"x: cannot be written: File name too long"):
        prepare([str(tmp_path / "in")], str(out), vocab_size=300)
    monkeypatch.chdir(tmp_path / "here")
    prepare(["../in"], "../out", vocab_size=300)
    monkeypatch.chdir(tmp_path / "out")
    assert prepare(["../in"], ".", vocab_size=300).reused


def ascii_tokenizer(path: Path, normalizer: normalizers.Normalizer | None = None) -> str:
    """A tokenizer of the 26 letters and the space, without a token for what is unknown."""
    tokenizer = Tokenizer(models.BPE({char: n for n, char in enumerate(string.ascii_lowercase + " ")}, []))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.decoder = decoders.Fuse()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "tar"])
def test_document_without_a_token_is_refused(tmp_path: Path, kind: str) -> None:
    tokenizer = ascii_tokenizer(tmp_path / "t.json")
    lost = json.dumps({"text": "字", "id": "mine"})
    if kind == "tar":
        write_tar(tmp_path / "in.tar", [("a.txt", b"fine"), ("b.json", lost.encode())])
    else:
        (tmp_path / "in.txt").write_text("字")
        (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + lost)
    where = {"txt": r"in\.txt", "jsonl": r"in\.jsonl: line 2", "tar": r"in\.tar: sample b"}[kind]
    message = rf"/{where}: its text has no token in .*t\.json, and would be lost$"
    with pytest.raises(PrepareError, match=message):
        prepare([str(tmp_path / f"in.{kind}")], str(tmp_path / "out"), tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("plain text", False),
        ("PLAIN ÉTÉ", False),  # lower case, accents stripped
        ("ето дом and", True),
        ("a 字字字 " * 500, True),
    ],
)
def test_lost_text_is_warned_of_once(tmp_path: Path, capsys, text: str, warned: bool) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("fine")
    (source / "b.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "xyz"}))
    (source / "c.txt").write_text(text)
    normalizer = normalizers.BertNormalizer(handle_chinese_chars=False)
    tokenizer = ascii_tokenizer(tmp_path / "t.json", normalizer)
    assert prepare([str(source)], str(tmp_path / "out"), tokenizer=tokenizer).train.documents == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith(f"warning: {source}/b.jsonl: line 1: of its first ")
        assert f"{tokenizer} can bring back " in lines[0]


BAD_FILES = {
    "latin.txt": (b"caf\xe9", r"latin\.txt: not UTF-8: .* at byte 3"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl: line 2: bad JSON"),
    "field.jsonl": (
        b'{"body": "a"}\n',
        r"field\.jsonl: line 1: field 'text' must hold a string, not NoneType",
    ),
    "list.jsonl": (b"[1]\n", r"list\.jsonl: line 1: a JSON object is needed, not list"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", r"deep\.jsonl: line 1: bad JSON: nested too deep"),
    "digits.jsonl": (
        b'{"text": "a"}\n{"text": "b", "id": ' + b"9" * 5000 + b"}\n",
        r"digits\.jsonl: line 2: bad JSON: Exceeds the limit .* for integer string conversion",
    ),
    "half.jsonl": (b'{"text": "\\ud800"}\n', r"half\.jsonl: line 1: .* half a surrogate pair"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', r"bytes\.jsonl: line 1: not UTF-8"),
    "void.tar": (b"", r"void\.tar: not a whole uncompressed tar archive: empty file"),
    "noise.tar": (b"noise" * 1000, r"noise\.tar: not a whole uncompressed tar archive"),
    "paper.pdf": (b"%PDF", r"paper\.pdf: only \.txt, \.jsonl, \.tar files"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("trained", [True, False])
def test_bad_file_is_named_and_nothing_is_left(tmp_path: Path, name: str, trained: bool) -> None:
    write_texts(tmp_path / "good", 5)
    train_tokenizer([text_of(1)], 300).save(str(tmp_path / "t.json"))
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    tokenizer = None if trained else str(tmp_path / "t.json")
    with pytest.raises(PrepareError, match=message) as caught:
        prepare([str(tmp_path / "good"), str(tmp_path / name)], str(tmp_path / "out"), tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "good", "t.json", name)


BAD_MEMBERS = {
    "extension": ([("a.txt", b"x"), ("a.png", b"x")], r"member a\.png: \.png is refused"),
    "two dots": ([("a.b.txt", b"x")], r"member a\.b\.txt: \.b\.txt is refused"),
    "gzip": ([("a.txt.gz", b"x")], r"\.txt\.gz is refused"),
    "no extension": ([("README", b"x")], r"member README: only plain files"),
    "skipped": ([("__a__.txt", b"x")], r"member __a__\.txt: only plain files"),
    "key twice": ([("a.txt", b"x"), ("b.txt", b"x"), ("a.txt", b"y")], r"the key a is there twice"),
    "name twice": ([("a.txt", b"x"), ("a.TXT", b"y")], r"member a\.TXT: is there twice"),
    "nothing": ([], r"holds no sample"),
    "not UTF-8": ([("a.txt", b"\xff")], r"sample a: \.txt: not UTF-8"),
    "bad JSON": ([("a.json", b"{")], r"sample a: \.json: bad JSON"),
    "digits": (
        [("a.json", b'{"id": ' + b"9" * 5000 + b"}")],
        r"sample a: \.json: bad JSON: Exceeds the limit",
    ),
    "null": ([("a.json", b"null")], r"sample a: \.json: a JSON object is needed, not NoneType"),
    "no text": ([("a.json", b'{"id": 1}')], r"sample a: field 'text' must hold a string"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_tar_is_named(tmp_path: Path, case: str) -> None:
    members, message = BAD_MEMBERS[case]
    path = write_tar(tmp_path / "in.tar", members)
    with pytest.raises(PrepareError, match=r"in\.tar: .*" + message):
        prepare([str(path)], str(tmp_path / "out"))
    assert leftovers(tmp_path, "in.tar")


def test_link_in_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(PrepareError, match=r"member a\.txt: only plain files"):
        prepare([str(tmp_path / "in.tar")], str(tmp_path / "out"))


def test_tar_cut_or_damaged_anywhere_is_refused(tmp_path: Path) -> None:
    """Also at a member's border, where webdataset reads what is left and says nothing."""
    whole = write_tar(tmp_path / "whole.tar", [(f"{n}.txt", b"x" * 700) for n in range(4)]).read_bytes()
    end = 4 * (512 + 1024)
    path = tmp_path / "cut.tar"
    for size in [512, 513, 1000, 1536, 1537, 3072, 3072 + 512, end - 1, end, end + 512, end + 1023]:
        path.write_bytes(whole[:size])
        with pytest.raises(PrepareError, match=r"cut\.tar: "):
            prepare([str(path)], str(tmp_path / "out"), vocab_size=300)
    for position in (1536, 1536 + 150):  # a header in the middle: tarfile takes it for the end
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(PrepareError, match=r"cut\.tar: damaged: .* at byte 1536"):
            prepare([str(path)], str(tmp_path / "out"), vocab_size=300)
    path.write_bytes(whole + whole)  # the second archive would be ignored
    with pytest.raises(PrepareError, match=r"cut\.tar: damaged"):
        prepare([str(path)], str(tmp_path / "out"), vocab_size=300)
    path.write_bytes(whole[: end + 1024])  # exactly whole, the padding after the end mark left out
    assert prepare([str(path)], str(tmp_path / "out"), vocab_size=300).train.documents == 4


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "npy", "npz", "txt", "json"])
def test_hostile_pickle_is_not_executed(tmp_path: Path, extension: str) -> None:
    trap = tmp_path / "executed"
    hostile = pickle.dumps(Hostile(trap))
    pickle.loads(hostile)
    assert trap.exists()  # the trap works
    trap.unlink()
    path = write_tar(tmp_path / "in.tar", [("a.txt", b"text"), (f"b.{extension}", hostile)])
    with pytest.raises(PrepareError, match=rf"in\.tar: .*{extension}"):
        prepare([str(path)], str(tmp_path / "out"))
    assert not trap.exists()


def test_name_that_webdataset_would_run_is_only_a_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_tar(Path("pipe:touch executed; true {0..2} .tar"), [("a.txt", b"some text")])
    assert prepare([str(path)], "out", vocab_size=300).train.documents == 1
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heldout_every=-1), r"heldout_every \(-1\) >= 0"),
        (dict(heldout_every=1), r"heldout_every \(1\) != 1"),
        (dict(heldout_every=12), r"heldout: no document is left for it; .*: 3, heldout_every: 12"),
        (dict(shard_tokens=0), r"shard_tokens \(0\) >= 1"),
        (dict(vocab_size=99), r"vocab_size \(99\) >= 257"),
        (dict(vocab_size=10**20), r"vocab_size \(100000000000000000000\) <= 16777216 does not hold"),
        (dict(end_of_text="</s>"), r"end_of_text \('</s>'\) == '<\|endoftext\|>' does not hold"),
        (dict(tokenizer="absent.json"), r"absent\.json: no such file"),
        (dict(inputs=["absent"]), r"absent: no such file or directory"),
        (dict(inputs=["empty"]), r"empty: no .* file found"),
        (dict(inputs=["blank.txt"]), r"train: no document is left for it"),
    ],
)
def test_impossible_options_are_one_line(tmp_path: Path, monkeypatch, options: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "in", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(PrepareError, match=message):
        prepare(**{"inputs": ["in"], "output": "out", "vocab_size": 300, **options})
    assert leftovers(tmp_path, "in", "empty", "blank.txt")


FULL_DISK = """
import resource
from pi_dist.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
main(["prepare", "in", "--output=out", "--tokenizer={tokenizer}", "--vocab-size=300"])
"""


@pytest.mark.parametrize(
    ("tokenizer", "size", "name"),
    [
        ("null", 1000, "tokenizer.json"),
        ("null", 20_000, "train/shard-000000.tar"),  # while documents are written
        ("t.json", 1000, "train/shard-000000.tar"),  # when it is closed
    ],
)
def test_full_disk_is_one_line_that_names_the_file(
    tmp_path: Path, tokenizer: str, size: int, name: str
) -> None:
    """The kernel refuses to write files beyond a size."""
    write_texts(tmp_path / "in", 40 if size > 1000 else 1)
    train_tokenizer([text_of(1)], 300).save(str(tmp_path / "t.json"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in [os.getcwd(), *sys.path] if p)}
    program = FULL_DISK.format(size=size, tokenizer=tokenizer)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(f"/{name}: cannot be written: File too large\n")
    assert leftovers(tmp_path, "in", "t.json")


KILLED = """
import os, signal
from pi_dist.data.shards import ShardWriter
add = ShardWriter.add

def killed(self, *arguments, **keywords):
    if (self.directory / "shard-000001.tar").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, *arguments, **keywords)

ShardWriter.add = killed
"""


def test_killed_half_way_leaves_no_output(tmp_path: Path) -> None:
    """SIGKILL while the second shard is being written: the output is absent, and the next run makes it."""
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": text_of(n) * 20}) + "\n" for n in range(300))
    )
    train_tokenizer([text_of(n) for n in range(50)], 300).save(str(tmp_path / "t.json"))
    arguments = dict(inputs=["in.jsonl"], output="out", tokenizer="t.json", shard_tokens=20_000)
    program = f"from pi_dist.data.prepare import prepare; prepare(**{arguments!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in [os.getcwd(), *sys.path] if p)}
    killed = subprocess.run([sys.executable, "-c", KILLED + program], cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".out.preparing-*/train/shard-000001.tar"))
    assert not (tmp_path / "out").exists()
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    index = ShardIndex.open(tmp_path / "out" / "train")
    assert index.num_documents == 300 and len(index.shards) > 2


SIGNALLED = """
import os, signal
from pi_dist.cli import main
from pi_dist.data import prepare
read, done = prepare.read_documents, []

def stopped(*arguments):
    done.append(arguments)
    if len(done) == {file}:
        os.kill(os.getpid(), signal.{name})
    return read(*arguments)

prepare.read_documents = stopped
main(["prepare", "in", "--output=out", "--vocab-size=300"])
"""


@pytest.mark.parametrize(
    ("name", "file", "status"),
    [("SIGTERM", 3, 143), ("SIGHUP", 7, 129), ("SIGKILL", 7, -9)],  # 1 to 5: training; 6 to 10: writing
)
def test_signal_leaves_nothing_or_what_the_next_run_removes(
    tmp_path: Path, monkeypatch, capsys, name: str, file: int, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "in", 5)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in [REPOSITORY, *sys.path] if p)}
    done = subprocess.run([sys.executable, "-c", SIGNALLED.format(name=name, file=file)], env=environment)
    assert done.returncode == status
    left = list(tmp_path.glob(".out.preparing-*"))
    assert len(left) == (name == "SIGKILL")
    prepare(["in"], "out", vocab_size=300)
    expected = "".join(f"warning: {path}: removed, left by a prepare that was killed\n" for path in left)
    assert capsys.readouterr().err == expected
    assert leftovers(tmp_path, "in", "out") and leftovers(tmp_path / "out", "train")


def test_only_folders_of_dead_processes_of_this_host_are_removed(tmp_path: Path, capsys) -> None:
    """Another host's lock may not be seen here; a folder without one may be in the making."""
    write_texts(tmp_path / "in", 3)
    hosts = {"dead": socket.gethostname(), "live": socket.gethostname(), "far": "elsewhere", "bare": None}
    folders = {name: tmp_path / f".out.preparing-{n:08x}" for n, name in enumerate(hosts)}
    folders["foreign"] = tmp_path / ".out.preparing-notes"
    for name, folder in folders.items():
        folder.mkdir()
        if host := hosts.get(name):
            (folder / "lock").write_text(host)
    with open(folders["live"] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare([str(tmp_path / "in")], str(tmp_path / "out"), vocab_size=300)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        f"warning: {folders['dead']}: removed",
        f"warning: {folders['far']}: left by a prepare that was killed",
        f"warning: {folders['bare']}: left by a prepare that was killed",
    ]
    assert [name for name, folder in folders.items() if folder.exists()] == ["live", "far", "bare", "foreign"]
