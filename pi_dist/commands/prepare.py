"""`pi-dist prepare`: text to shards of tokens."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="Turn text into webdataset tar shards of tokens with an index of counts and hashes.",
        exit_on_error=False,
    )
    p.add_argument(
        "inputs", nargs="+", help=".txt (one document each), .jsonl, webdataset .tar, or directories"
    )
    p.add_argument("--output", type=str, required=True, help="new directory; gets train/ and heldout/")
    p.add_argument(
        "--tokenizer", type=str | None, default=None, help="a tokenizer.json to use; default: train one"
    )
    p.add_argument("--vocab-size", type=int, default=8192, help="tokens of a newly trained byte-level BPE")
    p.add_argument("--heldout-every", type=int, default=0, help="hold out one document of so many; 0: none")
    p.add_argument("--shard-tokens", type=int, default=50_000_000, help="tokens of one shard")
    p.add_argument("--text-field", type=str, default="text", help="field of JSON objects that holds the text")
    p.add_argument(
        "--end-of-text", type=str, default="<|endoftext|>", help="token of the tokenizer that ends a document"
    )
    return p


def run(arguments: Namespace) -> int:
    from pi_dist.data.prepare import prepare

    options = arguments.as_dict()
    summary = prepare(options.pop("inputs"), options.pop("output"), **options)
    if summary.reused:
        print("made already from the same inputs and options; nothing to do")
    for split in filter(None, (summary.train, summary.heldout)):
        print(
            f"{split.directory}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"the longest document {split.longest_document:,}"
        )
    empty = f", {summary.empty_documents} empty documents left out" if summary.empty_documents else ""
    print(f"vocabulary {summary.vocab_size:,}{empty}")
    return 0
