"""`pi-dist eval`: the loss of a checkpoint on prepared data."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from pi_dist.commands.shared import check_written, print_or_write


def parser() -> ArgumentParser:
    p = ArgumentParser(
        description="Loss of a checkpoint on prepared data; "
        "under torchrun the data are split over the ranks.",
        exit_on_error=False,
    )
    p.add_argument("checkpoint", type=str, help="a run directory (its newest checkpoint) or a checkpoint")
    p.add_argument("--data", type=str, required=True, help="directory of prepared shards")
    p.add_argument(
        "--context", type=int | None, default=None, help="tokens of a sequence; default: as trained"
    )
    p.add_argument("--sp-degree", type=int, default=1, help="ranks that share a sequence")
    p.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    p.add_argument(
        "--json", type=str | None, default=None, help="write the result there; - is standard output"
    )
    return p


def run(arguments: Namespace) -> int:
    import torch.distributed as dist

    from pi_dist.data.shards import unigram_entropy
    from pi_dist.measure.reach import report
    from pi_dist.training.evaluate import evaluate_checkpoint

    check_written("json", arguments.json, printed=True)
    result = evaluate_checkpoint(
        arguments.checkpoint, arguments.data, arguments.context, arguments.sp_degree, arguments.device
    )
    if dist.get_rank() == 0:
        reach = report(result.pop("model"), result["context"]).reach_in_context
        result |= {"reach": reach, "unigram_entropy": unigram_entropy(arguments.data)}
        words = (
            f"{result['loss']:.4f} nats/token (perplexity {result['perplexity']:.2f}) "
            f"at context {result['context']}, reach {result['reach']}; "
            f"the text's own unigram entropy is {result['unigram_entropy']:.4f}"
        )
        print_or_write(result, arguments.json, words)
    return 0
