"""What is installed, what lies where, who may import whom; launch scripts refuse what cannot work."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {"pyproject.toml", "pi_dist", "launch", "kernels", "tests", "slurm", "README.md", "LICENSE"}
ROOMS = (
    "kernels",
    "config",
    "ops",
    "parallel",
    "model",
    "data",
    "training",
    "inference",
    "measure",
    "launching",
    "commands",
    "cli",
)
DEEPSPEED_FILE = "pi_dist/training/deepspeed_engine.py"


def _git_files(*options: str) -> list[str]:
    """Paths as git lists them; a link is one path."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for path in listing.stdout.split("\0") if path and os.path.lexists(ROOT / path)]


def _tracked_files() -> list[str]:
    return _git_files()


def _all_files() -> list[str]:
    """Tracked files, and new ones that git does not ignore."""
    return _git_files("--cached", "--others", "--exclude-standard")


def _package_sources(files: list[str]) -> set[str]:
    """Python files of the installed package, `kernels/x.py` as `pi_dist/kernels/x.py`."""
    through_link = [f"pi_dist/{path}" for path in files if path.startswith("kernels/")]
    return {path for path in files + through_link if path.startswith("pi_dist/") and path.endswith(".py")}


def _imports(source: str, package: str) -> Iterator[str]:
    """Full dotted names that a module of `package` imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _imports_by_file() -> dict[str, set[str]]:
    return {
        path: set(_imports((ROOT / path).read_text("utf-8"), ".".join(Path(path).parent.parts)))
        for path in sorted(_package_sources(_all_files()))
    }


def _room(dotted: str) -> str | None:
    """The room of a dotted name below pi_dist, None for the package itself and what lies outside."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "pi_dist" and len(parts) > 1 and parts[1] in ROOMS else None


def test_imports_are_found_in_every_form():
    source = (
        "import a.b\nfrom . import c\nfrom .d import e\nfrom ..f import g\ndef h():\n    from i import j\n"
    )
    assert set(_imports(source, "pi_dist.x")) == {
        "a.b",
        "pi_dist.x.c",
        "pi_dist.x.d.e",
        "pi_dist.f.g",
        "i.j",
    }


def test_wheel_holds_pi_dist_only_and_all_of_it(tmp_path: Path):
    files = _all_files()
    copy = tmp_path / "source"  # setuptools writes build/ and *.egg-info beside the sources
    for path in files:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    built = subprocess.run([*command, "-w", str(tmp_path), str(copy)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = tmp_path.glob("pi_dist-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {"pi_dist", info}
    assert {name for name in names if name.endswith(".py")} == _package_sources(files)
    records = {
        path for path in files if re.fullmatch(r"pi_dist/measure/(records|profiles)/[^/]*\.json", path)
    }
    assert records | {"pi_dist/slurm/train.sbatch"} <= set(names)
    assert "pi_dist.cli:main" in zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in names


def test_configuration_pattern_and_reach_need_no_heavy_library():
    blocked = ("deepspeed", "triton", "webdataset", "mpi4py", "tensorboard")
    modules = ("pi_dist", "pi_dist.config", "pi_dist.ops.pattern", "pi_dist.measure.reach")
    code = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "try:\n    import deepspeed\nexcept ImportError:\n    print('blocked')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "blocked\n"), run.stderr


def test_top_level_holds_only_the_agreed_names():
    top = {path.split("/")[0] for path in _tracked_files()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_kernels_and_tests_are_no_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [path for path in _all_files() if path.startswith("tests/") and path.endswith("__init__.py")]


def test_every_room_imports_from_the_left_only():
    wrong = []
    for path, names in _imports_by_file().items():
        own = _room(".".join(Path(path).with_suffix("").parts))
        for name in names:
            other = _room(name)
            if own and other and other != "config" and ROOMS.index(other) > ROOMS.index(own):
                wrong.append(f"{path} ({own}) imports {name} ({other})")
    assert not wrong, "\n".join(wrong)


def test_only_known_rooms_exist():
    rooms = {path.split("/")[1].removesuffix(".py") for path in _package_sources(_all_files())}
    assert rooms - {"__init__", "__main__"} <= set(ROOMS)


def test_only_the_engine_and_its_own_method_import_deepspeed():
    users = {
        path
        for path, names in _imports_by_file().items()
        if any(n.split(".")[0] == "deepspeed" for n in names)
    }
    assert users == {DEEPSPEED_FILE, "pi_dist/parallel/ulysses.py"}


def _requirements() -> list[Requirement]:
    """All requirements of pyproject.toml, those of extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def test_every_library_imported_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in _requirements()}
    declared |= {"pi_dist", "yaml", "cudnn"}  # import names of pyyaml and nvidia-cudnn-frontend
    for path, names in _imports_by_file().items():
        foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - declared
        assert not foreign, f"{path} imports {sorted(foreign)}, which pyproject.toml does not declare"


def test_every_dependency_has_an_exact_version_that_fits():
    lines = (ROOT / "launch" / "constraints.txt").read_text("utf-8").splitlines()
    tried = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in _requirements():
        assert requirement.specifier.contains(tried[canonicalize_name(requirement.name)]), str(requirement)


def test_shell_scripts_parse():
    scripts = [path for path in _all_files() if path.endswith((".sh", ".sbatch"))] + [".ci/run"]
    for script in scripts:
        checked = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        assert re.search(r"^set -[a-z]*eu[a-z]* ", (ROOT / script).read_text("utf-8"), re.M), (
            f"{script}: no set -eu"
        )


def test_no_file_names_a_registry_or_a_machine():
    registry = (
        r"\b(pypi|pythonhosted|pytorch|anaconda)\.(org|com)/(simple|whl|packages)|index[-_]url|find[-_]links"
    )
    machine = r"(?<![\w.}$])/(work|root|home|Users|mnt|scratch|opt|tmp/[a-z])[/\w]*"
    forbidden = re.compile(f"{registry}|{machine}", re.I)
    found = []
    for path in _tracked_files():
        if (ROOT / path).is_dir():  # the link to kernels/
            continue
        text = (ROOT / path).read_text("utf-8", errors="replace")
        found += [f"{path}: {match[0]}" for match in forbidden.finditer(text)]
    assert not found, "\n".join(found)


def _launch(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("given", [{}, {"NODE_RANK": "1"}, {"NODE_RANK": "1", "MASTER_ADDR": "node0"}])
def test_torchrun_refuses_several_nodes_without_the_address_of_the_first(given: dict[str, str]):
    unset = dict.fromkeys(("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"), "")
    run = _launch(ROOT / "launch/torchrun.sh", "2", "none.yaml", **unset | {"NNODES": "2"} | given)
    missing = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")[len(given)]
    assert run.returncode == 2 and f"{missing} must be set" in run.stderr


def test_deepspeed_refuses_a_hostfile_without_hosts_and_a_rank_without_address(tmp_path: Path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# none\n")
    run = _launch(ROOT / "launch/deepspeed.sh", "2", "none.yaml", HOSTFILE=str(hosts))
    assert run.returncode == 2 and "has no line 'NAME slots=2'" in run.stderr
    hosts.write_text("a slots=2\nb slots=2\n")
    given = {"HOSTFILE": str(hosts), "NODE_RANK": "1", "MASTER_ADDR": ""}
    run = _launch(ROOT / "launch/deepspeed.sh", "2", "none.yaml", **given)
    assert run.returncode == 2 and "MASTER_ADDR must be too" in run.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh", "deepspeed.sh"])
@pytest.mark.parametrize("arguments", [(), ("2",), ("0", "c.yaml"), ("c.yaml", "2")])
def test_launchers_show_their_usage(script: str, arguments: tuple[str, ...]):
    run = _launch(ROOT / "launch" / script, *arguments)
    assert run.returncode == 2 and run.stderr.startswith(f"usage: bash launch/{script} NPROC CONFIG")


def test_install_refuses_old_pythons_and_unknown_extras(tmp_path: Path):
    copy = tmp_path / "a copy"
    for name in ("pyproject.toml", "launch/install.sh", "launch/constraints.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        (old / name).write_text("#!/bin/sh\nexit 1\n")
        (old / name).chmod(0o755)
    path = f"{old}:{os.environ['PATH']}"

    unknown = _launch(copy / "launch/install.sh", "test,nonsense", PATH=path)
    assert unknown.returncode == 1 and "no extra named 'nonsense'" in unknown.stderr
    too_old = _launch(copy / "launch/install.sh", PATH=path)
    assert too_old.returncode == 1 and "no Python >= 3.11 found" in too_old.stderr
    assert not list((copy / ".venv").iterdir())
