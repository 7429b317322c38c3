"""The command `pi-dist`: parse, then one call. Bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from pi_dist.commands import calibrate, paper, plan, savings
from pi_dist.commands.shared import config_of, print_or_write, sizes
from pi_dist.config import Config, ConfigError, ModelConfig, UserError, check, check_model, resolve

BAD_INPUT = 2
UNFINISHED = 75  # EX_TEMPFAIL: `pi-dist train --status` of a run that has steps left


def _train_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Train a π-Transformer, or resume the run of --run_dir. Start it with torchrun (or "
        "launch/torchrun.sh) for several ranks; alone it is one rank.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", help="YAML with any of the fields below; later flags override it"
    )
    parser.add_argument(
        "--record", type=str | None, default=None, help="write times and memory there, as JSON"
    )
    parser.add_argument(
        "--check",
        type=int | None,
        default=None,
        metavar="RANKS",
        help="only check configuration and data for so many ranks, and leave",
    )
    parser.add_argument(
        "--status",
        action="store_true",
        help=f"only tell how far the run is, and leave: exit status 0 if it is complete, {UNFINISHED} if not "
        "(a run that a signal stopped has saved its state and ends with exit status 0 too)",
    )
    parser.add_argument(
        "--ranks",
        type=int | None,
        default=None,
        help="refuse to start unless there are so many ranks",
    )
    parser.add_class_arguments(Config)
    return parser


def read_config(flags: list[str]) -> Config:
    """The configuration that `pi-dist train` makes of these flags.

    Raises:
        argparse.ArgumentError: an unknown key or a value of another type.
    """
    return config_of(_train_parser().parse_args(flags))


def run_directory(flags: list[str]) -> str:
    """Where `pi-dist train` with these flags puts its run."""
    return read_config(flags).run_dir


def _train(arguments: Namespace) -> int:
    if arguments.record is not None and not os.path.isdir(os.path.dirname(arguments.record) or "."):
        raise ConfigError(f"record: {os.path.dirname(arguments.record)} is not a directory")
    if arguments.check is not None:
        _check(config_of(arguments), arguments.check)
        return 0
    if arguments.status:
        return _status(config_of(arguments))
    import torch.distributed as dist

    from pi_dist.parallel.process_group import check_world_size
    from pi_dist.training.trainer import train

    if arguments.ranks is not None:
        check_world_size(arguments.ranks)

    config, outcome = train(config_of(arguments))
    if dist.get_rank() == 0:
        print(_closing(config, outcome))
        if arguments.record is not None and outcome.losses:
            from pi_dist.measure.record import training_record, write

            write(training_record(config, dist.get_world_size(), outcome), arguments.record)
    return 0


def _check(config: Config, ranks: int) -> None:
    """Raise ConfigError or ShardError unless the run can be trained on so many ranks."""
    from pi_dist.data.shards import open_splits

    check(config, ranks)
    index, _ = open_splits(config.data)
    resolve(config, index.vocab_size)


def _status(config: Config) -> int:
    from pi_dist.training.checkpoint import newest_step

    step = newest_step(config.run_dir)
    print(f"{config.run_dir}: step {step} of {config.training.steps} is saved")
    return 0 if step >= config.training.steps else UNFINISHED


def _closing(config: Config, outcome: Any) -> str:
    from pi_dist.data.shards import unigram_entropy
    from pi_dist.measure.reach import report

    if outcome.stopped_by is not None:
        return (
            f"stopped by {outcome.stopped_by} after step {outcome.step}; checkpoint {outcome.checkpoint}\n"
            "run the same command again to go on"
        )
    lines = [
        "" if outcome.losses else f"the run is done already: {outcome.step} of {config.training.steps} steps"
    ]
    if outcome.heldout_loss is not None:
        entropy = unigram_entropy(config.data.heldout)
        lines.append(
            f"held-out loss      {outcome.heldout_loss:.3f} nats/token, "
            f"{abs(entropy - outcome.heldout_loss):.3f} "
            f"{'below' if outcome.heldout_loss < entropy else 'above'} the text's own unigram entropy of "
            f"{entropy:.3f}"
        )
    reach = report(config.model, config.training.context)
    lines += [
        f"reach              {reach.reach:,} tokens to the left at a context of {config.training.context:,}; "
        f"the last token can see {reach.covered_share:.1%} of what is before it",
        f"checkpoint         {outcome.checkpoint}",
        f"TensorBoard        tensorboard --logdir {shlex.quote(config.run_dir + '/tensorboard')}",
    ]
    return "\n".join(lines)


def _prepare_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Turn text into webdataset tar shards of tokens with an index of counts and hashes.",
        exit_on_error=False,
    )
    parser.add_argument(
        "inputs", nargs="+", help=".txt (one document each), .jsonl, webdataset .tar, or directories"
    )
    parser.add_argument("--output", type=str, required=True, help="new directory; gets train/ and heldout/")
    parser.add_argument(
        "--tokenizer", type=str | None, default=None, help="a tokenizer.json to use; default: train one"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="tokens of a newly trained byte-level BPE"
    )
    parser.add_argument(
        "--heldout-every", type=int, default=0, help="hold out one document of so many; 0: none"
    )
    parser.add_argument("--shard-tokens", type=int, default=50_000_000, help="tokens of one shard")
    parser.add_argument(
        "--text-field", type=str, default="text", help="field of JSON objects that holds the text"
    )
    parser.add_argument(
        "--end-of-text", type=str, default="<|endoftext|>", help="token of the tokenizer that ends a document"
    )
    return parser


def _prepare(arguments: Namespace) -> int:
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


def _eval_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Loss of a checkpoint on prepared data; "
        "under torchrun the data are split over the ranks.",
        exit_on_error=False,
    )
    parser.add_argument(
        "checkpoint", type=str, help="a run directory (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("--data", type=str, required=True, help="directory of prepared shards")
    parser.add_argument(
        "--context", type=int | None, default=None, help="tokens of a sequence; default: as trained"
    )
    parser.add_argument("--sp-degree", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument(
        "--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute"
    )
    parser.add_argument(
        "--json", type=str | None, default=None, help="write the result there; - is standard output"
    )
    return parser


def _eval(arguments: Namespace) -> int:
    import torch.distributed as dist

    from pi_dist.data.shards import unigram_entropy
    from pi_dist.training.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        arguments.checkpoint, arguments.data, arguments.context, arguments.sp_degree, arguments.device
    )
    if dist.get_rank() == 0:
        result |= {"unigram_entropy": unigram_entropy(arguments.data)}
        words = (
            f"{result['loss']:.4f} nats/token (perplexity {result['perplexity']:.2f}) "
            f"at context {result['context']}, reach {result['reach']}; "
            f"the text's own unigram entropy is {result['unigram_entropy']:.4f}"
        )
        print_or_write(result, arguments.json, words)
    return 0


def _generate_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Continue a text with a trained model.", exit_on_error=False)
    parser.add_argument(
        "checkpoint", type=str, help="a run directory (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("--prompt", type=str, required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="stop after so many tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument(
        "--top-k", type=int, default=50, help="draw among the likeliest so many; 0: among all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    return parser


def _generate(arguments: Namespace) -> int:
    import torch

    from pi_dist.data.tokenizer import encode_texts, load_tokenizer, vocabulary_size
    from pi_dist.inference.generate import generate
    from pi_dist.training.checkpoint import load_model, open_checkpoint

    checkpoint = open_checkpoint(arguments.checkpoint)
    model, _ = load_model(checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(checkpoint.path / "tokenizer.json")
    prompt = next(encode_texts(tokenizer, [("prompt", arguments.prompt)]))[1].tolist()
    new = generate(
        model,
        prompt,
        arguments.max_new_tokens,
        vocab_size=vocabulary_size(tokenizer),
        end_of_text=checkpoint.state["end_of_text"],
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    print(arguments.prompt + tokenizer.decode(list(new)))
    return 0


def _reach_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="How far back a stack of π-attention layers can see, and what share of it.",
        exit_on_error=False,
    )
    parser.add_argument("--layers", type=int, default=12, help="layers of the stack")
    parser.add_argument("--heads", type=int, default=12, help="query heads (matters for per_head)")
    parser.add_argument("--window", type=int, default=4, help="k: neighbours on a side, itself not counted")
    parser.add_argument("--stride", type=int, default=16, help="π: base stride in tokens")
    parser.add_argument("--num-skips", type=int, default=1, help="M: skip targets i-π … i-Mπ")
    parser.add_argument(
        "--schedule",
        type=Literal["fixed", "doubling", "per_head"],
        default="fixed",
        help="strides of the layers",
    )
    parser.add_argument(
        "--num-strides", type=int | None, default=None, help="c; default: all strides below the context"
    )
    parser.add_argument("--context", type=int, default=32768, help="tokens of the sequence")
    parser.add_argument(
        "--json", type=str | None, default=None, help="write JSON there instead; - is standard output"
    )
    return parser


def _reach(arguments: Namespace) -> int:
    from pi_dist.measure.reach import MAX_LAYERS, describe, report, to_json

    if not 1 <= arguments.layers <= MAX_LAYERS:
        raise ConfigError(f"layers: 1 <= layers ({arguments.layers}) <= {MAX_LAYERS} does not hold")
    if arguments.heads < 1:
        raise ConfigError(f"heads: heads ({arguments.heads}) >= 1 does not hold")
    if arguments.context < 1:
        raise ConfigError(f"context: context ({arguments.context}) >= 1 does not hold")
    model = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=64 * arguments.heads,
        num_heads=arguments.heads,
        window=arguments.window,
        stride=arguments.stride,
        num_skips=arguments.num_skips,
        schedule=arguments.schedule,
        num_strides=arguments.num_strides,
    )
    check_model(model)
    found = report(model, arguments.context)
    print_or_write(to_json(found), arguments.json, describe(found))
    return 0


def _doctor_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="What this machine has for training, and what is missing; exit status 1 if it cannot "
        "train. Under torchrun or mpirun also whether ranks see each other, and how fast neighbours do.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--json", type=str | None, default=None, help="write JSON there instead; - is standard output"
    )
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds after which a rank that does not answer is named"
    )
    return parser


def _doctor(arguments: Namespace) -> int:
    from pi_dist.measure.doctor import Diagnosis, describe, diagnose, to_json
    from pi_dist.parallel.process_group import world_size_from_launcher

    diagnosis = diagnose()
    if world_size_from_launcher() > 1:
        from pi_dist.measure.links import examine

        found = examine(arguments.timeout)
        diagnosis = Diagnosis((*diagnosis.findings, *found))
        if os.environ["RANK"] != "0":  # it speaks only of what rank 0 does not hear of
            print("".join(f"{finding.detail}\n" for finding in found), end="", file=sys.stderr)
            return 1 if found else 0
    print_or_write(to_json(diagnosis), arguments.json, describe(diagnosis))
    return 0 if diagnosis.ok else 1


def _bench_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Measure on this machine. kernel: the operator beside its floor and other kernels. "
        "blocks: tile sizes of the kernels, written to the table that they are read from. "
        "sp: training steps of every method on the ranks of the launcher "
        "(torchrun --nproc-per-node 2 -m pi_dist bench sp ...), and with one rank their baseline. "
        "step: a step of each preset on one device, what it is spent on, and how far chunks carry.",
        exit_on_error=False,
    )
    parser.add_argument("what", type=Literal["kernel", "blocks", "sp", "step"], help="what to measure")
    parser.add_argument(
        "--json",
        type=str | None,
        default=None,
        help="the record to make, or to go on with; blocks: another table",
    )
    parser.add_argument(
        "--head-dim", type=int, default=64, help="blocks: the head_dim to choose tile sizes for"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="kernel, sp, step: stop after so long; run again to go on"
    )
    parser.add_argument(
        "--plot",
        type=str | None,
        default=None,
        help="kernel, step: draw the record there; sp: what ran when, of --trace (.svg, .png)",
    )
    parser.add_argument(
        "--presets",
        type=str | None,
        default=None,
        help="tiny, small, medium, large, with commas; default: small,medium (sp), and large (step)",
    )
    parser.add_argument(
        "--contexts",
        type=str | None,
        default=None,
        help="tokens of a sequence, over all ranks, with commas; default: 32k to 1M (sp), 8k to 1M (step)",
    )
    parser.add_argument(
        "--streamed",
        type=str,
        default="1048576,4194304,16777216,134217728",
        help="step: contexts to train in chunks, with commas",
    )
    parser.add_argument(
        "--methods",
        type=str,
        default="pi,window,ring,ulysses,dense",
        help="sp: which methods; dense runs on one rank, ring and ulysses on several",
    )
    parser.add_argument(
        "--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="sp, step: as parallel.device"
    )
    parser.add_argument(
        "--trace",
        type=str | None,
        default=None,
        help="sp: write the kernels of the first measured step there (JSON)",
    )
    return parser


def _bench(arguments: Namespace) -> int:
    if arguments.what == "blocks":
        from pi_dist.measure.kernel_tuning import tune

        tune(arguments.head_dim, arguments.json)
        return 0
    if arguments.json is None:
        raise ConfigError(
            f"bench {arguments.what}: --json FILE is needed; the record is written there row by row"
        )
    if arguments.what == "sp":
        if arguments.plot is not None and arguments.trace is None:
            raise ConfigError("bench sp: --plot FILE needs --trace FILE, which it draws")
        from pi_dist.measure.sp_bench import bench as bench_sp
        from pi_dist.measure.sp_bench import is_last_rank

        complete = bench_sp(
            arguments.json,
            (arguments.presets or "small,medium").split(","),
            sizes("contexts", arguments.contexts or "32768,65536,131072,262144,1048576"),
            arguments.methods.split(","),
            minutes=arguments.minutes,
            device=arguments.device,
            trace=arguments.trace,
        )
        if arguments.plot is not None and is_last_rank():  # which wrote the trace
            from pi_dist.measure.figures import draw_timeline

            draw_timeline(arguments.trace, arguments.plot)
        return 0 if complete else 3
    if arguments.what == "step":
        from pi_dist.measure.step_bench import bench as bench_step

        complete = bench_step(
            arguments.json,
            (arguments.presets or "small,medium,large").split(","),
            sizes("contexts", arguments.contexts or "8192,32768,131072,1048576"),
            sizes("streamed", arguments.streamed),
            minutes=arguments.minutes,
            device=arguments.device,
        )
        if arguments.plot is not None:
            from pi_dist.measure.figures import draw_steps

            draw_steps(arguments.json, arguments.plot)
        return 0 if complete else 3
    from pi_dist.measure.kernel_bench import bench

    complete = bench(arguments.json, arguments.minutes)
    if arguments.plot is not None:
        from pi_dist.measure.figures import draw_kernels

        draw_kernels(arguments.json, arguments.plot)
    return 0 if complete else 3


def _submit_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Check a run, then submit it to SLURM: one torchrun on each node, saved and requeued "
        "before the time limit and when preempted. Overrides of the configuration follow after --.",
        exit_on_error=False,
    )
    parser.add_argument("--config", type=str, required=True, help="YAML as `pi-dist train` takes it")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="GPUs to ask for on each; 0: none")
    parser.add_argument(
        "--ranks-per-node",
        type=int | None,
        default=None,
        help="ranks on each node; default: one for each GPU",
    )
    parser.add_argument(
        "--cpus-per-node", type=int | None, default=None, help="default: whole nodes, with all they have"
    )
    parser.add_argument(
        "--time", type=str, required=True, help="limit as sbatch takes it: H:M:S, D-H, minutes"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=300,
        help="so many seconds before the limit the run saves and is requeued",
    )
    parser.add_argument("--max-requeues", type=int, default=20, help="the job ends after so many")
    parser.add_argument("--partition", type=str | None, default=None, help="default: the cluster's")
    parser.add_argument("--account", type=str | None, default=None, help="default: the user's")
    parser.add_argument("--qos", type=str | None, default=None, help="default: the user's")
    parser.add_argument("--constraint", type=str | None, default=None, help="features of nodes; default: any")
    parser.add_argument("--job-name", type=str | None, default=None, help="default: the run directory's")
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("overrides", nargs="*", default=[], help="after --: as `pi-dist train` takes them")
    return parser


def _submit(arguments: Namespace) -> int:
    import time
    from pathlib import Path

    from pi_dist.launching.submit import Job, batch_script, check_job, submit

    asked = arguments.as_dict()
    config = read_config([f"--config={asked.pop('config')}", *asked.pop("overrides")])
    dry_run, name, run_dir = asked.pop("dry_run"), asked.pop("job_name"), Path(config.run_dir).absolute()
    if asked["ranks_per_node"] is None:
        asked["ranks_per_node"] = asked["gpus_per_node"]
    name, stamp = run_dir.name if name is None else name, time.strftime("%Y%m%d-%H%M%S")
    job = Job(name=name, run_dir=run_dir, work_dir=Path.cwd(), stamp=stamp, **asked)
    check_job(job)
    _check(config, job.ranks)
    if dry_run:
        print(batch_script(job), end="")
        return 0
    number = submit(job, config)
    print(
        f"submitted job {number}: {job.nodes} nodes with {job.ranks_per_node} ranks each, {job.script}\n"
        f"  follow   tail -F {shlex.quote(str(run_dir / f'job-{number}.log'))}\n"
        f"  state    squeue --jobs={number}\n"
        f"  cancel   scancel {number}"
    )
    return 0


COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], int], str]] = {
    "prepare": (_prepare_parser, _prepare, "text, JSONL or directories to shards of tokens"),
    "train": (_train_parser, _train, "train or resume a run"),
    "eval": (_eval_parser, _eval, "loss of a checkpoint on prepared data"),
    "generate": (_generate_parser, _generate, "continue a text with a trained model"),
    "submit": (_submit_parser, _submit, "check a run and submit it to SLURM"),
    "reach": (_reach_parser, _reach, "how far back a configuration can see"),
    "bench": (_bench_parser, _bench, "time kernels beside their floor, or training steps of every method"),
    "savings": (savings.parser, savings.run, "the fewest GPUs of every method for a context"),
    "plan": (plan.parser, plan.run, "memory and time of a run before it is queued"),
    "paper": (paper.parser, paper.run, "the paper's table of efficiency and its claims, measured here"),
    "calibrate": (calibrate.parser, calibrate.run, "fit the cost model to this machine's GPU"),
    "doctor": (_doctor_parser, _doctor, "what this machine has, and what is missing"),
}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> None:
    """Entry point of `pi-dist` and `python -m pi_dist`; leaves with an exit status."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # PyTorch 2.13 renames collectives that DeepSpeed (and PyTorch 2.11) knows by their old names only
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*deprecated", category=FutureWarning)
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: pi-dist COMMAND ...   (pi-dist COMMAND --help tells more)\n")
        print("\n".join(f"  {name:{width}}  {help_text}" for name, (_, _, help_text) in COMMANDS.items()))
        sys.exit(0 if argv else BAD_INPUT)
    if argv[0] not in COMMANDS:
        print(f"pi-dist: error: {argv[0]!r} is not one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    make_parser, run, _ = COMMANDS[argv[0]]
    parser = make_parser()
    parser.prog = f"pi-dist {argv[0]}"
    try:
        status = run(parser.parse_args(argv[1:]))
    except (ArgumentError, UserError, OSError) as error:
        print(f"pi-dist {argv[0]}: error: {_one_line(error)}", file=sys.stderr)
        status = BAD_INPUT
    _leave(status)


def _leave(status: int) -> None:
    """Exit; a process that holds a process group leaves without destructors, in which DeepSpeed may abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        if status == 0 and "mpi4py.MPI" in sys.modules:  # else mpirun takes the exit for a crash
            sys.modules["mpi4py.MPI"].Finalize()
        os._exit(status)
    sys.exit(status)
