#!/usr/bin/env bash
# Makes .venv at the top of the repository and installs everything into it. Returns at once when that is done.
#
#   bash launch/install.sh [extras]      e.g. bash launch/install.sh test,plot    (extras: see pyproject.toml)
#
# Needs Python >= 3.11 and pip. Versions are those of launch/constraints.txt. An importable torch >= 2.11 is used as it
# is, with its triton and numpy: .venv then points at the folder that holds it. pip's own configuration (mirrors, wheels
# on disk, proxies) holds. An installation that was cut off, or whose folder has moved, is made anew.
# Afterwards use .venv/bin/python, or `source .venv/bin/activate`.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
mkdir -p "$root/.venv"
venv="$(cd -- "$root/.venv" >/dev/null && pwd -P)" # .venv may be a link
python="$venv/bin/python"
state="$venv/pi-dist" # root: where .venv was made; unfinished: a step is running; done-EXTRA: what is complete
extras="$(tr -s ', ' '[\n*]' <<<"$*" | sort -u)"
wanted="$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" "$root/launch/install.sh" | cksum) $root"

fail() {
    printf 'install: %s\n' "$*" >&2
    exit 1
}

# Every extra asked for is installed, from the files as they are now, and can still be found.
is_complete() {
    local extra
    for extra in base $extras; do
        [[ "$(cat "$state/done-$extra" 2>/dev/null)" == "$wanted" ]] || return 1
    done
    [[ ! -e "$state/unfinished" ]] && "$python" -P -c 'import importlib.util as u, sys
sys.exit(not all(map(u.find_spec, ("torch", "deepspeed", "pi_dist"))))' 2>/dev/null
}

# One line on the screen. A step that fails is tried once more (downloads do fail), then its log is shown.
step() {
    local label="$1" start=$SECONDS
    shift
    printf '  %s ... ' "$label"
    touch "$state/unfinished"
    if ! "$@" >"$work/log" 2>&1 && { sleep 2; ! "$@" >"$work/log" 2>&1; }; then
        rm -f "$state/unfinished"
        printf 'failed\n' >&2
        cat "$work/log" >&2
        fail "failed at: $label"
    fi
    rm -f "$state/unfinished"
    printf '%d s\n' $((SECONDS - start))
}

pip_install() { "$python" -m pip install --quiet --constraint "$work/constraints.txt" "$@"; }

# has_torch PYTHON: it imports torch >= 2.11.
has_torch() {
    "$1" -P -c 'import importlib.util, sys
if importlib.util.find_spec("torch") is None: sys.exit(1)
import torch
sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' >/dev/null 2>&1
}

# Sets base: the Python to make .venv from. One that has torch goes before the others.
find_python() {
    local name path old=""
    base=""
    for name in python3 python3.13 python3.12 python3.11 python; do
        path="$(command -v "$name")" || continue
        if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            if has_torch "$path"; then
                base="$path"
                return
            fi
            base="${base:-$path}"
        else
            old+=" $path"
        fi
    done
    [[ -n "$base" ]] || fail "no Python >= 3.11 found on PATH (too old or broken:${old:- none found}). Install one, for
  example with apt install python3 python3-venv, dnf install python3.12, or brew install python@3.12"
}

# Makes an empty .venv from $base; its pip comes from ensurepip or, where the system left that out, from $base's pip.
make_venv() {
    "$base" -c 'import venv' 2>/dev/null ||
        fail "$base has no venv module. Install it, for example with: apt install python3-venv"
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m venv "$venv"
    elif "$base" -m pip --version >/dev/null 2>&1; then
        "$base" -m venv --without-pip "$venv"
        "$base" -m pip --python "$python" install --quiet pip
    else
        fail "$base has neither ensurepip nor pip. Install one, for example with: apt install python3-venv"
    fi
}

# Lets .venv see the torch of $base, with its numpy and triton: a .pth file names the folders that hold them. (The venv
# option --system-site-packages does not do it where $base itself lives in a virtual environment.)
share_torch() {
    "$base" -P -c 'import importlib.util as u, pathlib
specs = filter(None, map(u.find_spec, ("torch", "numpy", "triton")))
print(*dict.fromkeys(str(pathlib.Path(spec.origin).parent.parent) for spec in specs), sep="\n")' \
        >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pi-dist-torch.pth"
    has_torch "$python" || fail "$base imports torch, a .venv made from it does not"
}

# Writes $work/{requirements,deepspeed,constraints}.txt. Constraints: torch, numpy and triton stay as they are; another
# package that .venv sees but does not hold may stay, or rise to the version tried, and so may what such a torch needs;
# the rest are the versions tried.
write_requirements() {
    "$python" -P - "$root" "$work" "$extras" <<'PY'
import importlib.metadata, re, sys, tomllib
from pathlib import Path
from pip._vendor.packaging.version import Version

root, work, extras = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split()
project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
wanted = project["dependencies"] + sum((project["optional-dependencies"][extra] for extra in extras), [])
name_of = lambda requirement: re.match(r"[\w-]+", requirement)[0]
apart = {"torch", "triton", "deepspeed"}
(work / "requirements.txt").write_text("".join(f"{r}\n" for r in wanted if name_of(r) not in apart))
(work / "deepspeed.txt").write_text("".join(f"{r}\n" for r in wanted if name_of(r) == "deepspeed"))

def is_outside(found):
    return not Path(found.locate_file("")).resolve().is_relative_to(Path(sys.prefix).resolve())

torch = importlib.metadata.distribution("torch")
movable = {name_of(r).lower() for r in torch.requires or ()} if is_outside(torch) else set()
lines = []
for line in (root / "launch/constraints.txt").read_text("utf-8").split("\n"):
    name, equals, tried = line.partition("==")
    if not equals:
        continue
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        lines += [line] * (name != "triton")  # torch may want its own
        continue
    if name in ("torch", "triton") or (name == "numpy" and is_outside(found)):
        lines.append(f"{name}=={found.version}")
    elif name in movable or is_outside(found):
        lines.append(f"{name}<={max(Version(found.version), Version(tried)).public}")
    else:
        lines.append(line)
(work / "constraints.txt").write_text("\n".join(lines) + "\n")
PY
}

pinned() { sed -n "s/^$1==//p" "$root/launch/constraints.txt"; }

for extra in $extras; do
    grep -q "^$extra = \[" "$root/pyproject.toml" || fail "there is no extra named '$extra' in pyproject.toml"
done
is_complete && exit 0

# Several nodes may start on one shared folder: the first installs, the others wait. Without flock, all install.
exec 9<"$root"
if command -v flock >/dev/null; then flock 9 || true; fi
is_complete && exit 0

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
started=$SECONDS

works() { "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if [[ -d "$state" ]] && { [[ -e "$state/unfinished" || "$(cat "$state/root" 2>/dev/null)" != "$venv" ]] || ! works; }; then
    echo "install: .venv was left unfinished, or has moved: making it anew"
    find "$venv" -mindepth 1 -delete
fi
if [[ -z "$(ls -A "$venv")" ]]; then
    find_python
    mkdir "$state"
    touch "$state/unfinished"
    printf '%s\n' "$venv" >"$state/root"
    echo "install: making .venv with $base"
    make_venv
    if has_torch "$base"; then share_torch; fi
    rm "$state/unfinished"
elif ! works; then
    fail "$venv has no working Python >= 3.11 with pip, and was not made here: remove it and run this again"
fi
if [[ ! -d "$state" ]]; then # somebody's own .venv
    mkdir "$state"
    printf '%s\n' "$venv" >"$state/root"
fi

if has_torch "$python"; then
    "$python" -P -c 'import torch; print(f"  torch {torch.__version__} is there and is used as it is")'
else
    grep -v '^triton==' "$root/launch/constraints.txt" >"$work/constraints.txt"
    step "torch $(pinned torch), the largest download" pip_install "torch==$(pinned torch)"
fi
write_requirements
step "build tools" pip_install torch wheel ninja numpy "setuptools>=77"
step "deepspeed" env DS_BUILD_OPS=0 "$python" -m pip install --quiet --constraint "$work/constraints.txt" \
    --no-build-isolation --requirement "$work/deepspeed.txt"
step "other dependencies" pip_install --requirement "$work/requirements.txt"
if [[ "$(uname -s)" == Linux ]] && ! "$python" -P -c 'import triton' 2>/dev/null; then
    step "triton" pip_install --no-deps "triton==$(pinned triton)"
fi
step "pi-dist itself" pip_install --no-deps --no-build-isolation --editable "$root"

for extra in base $extras; do
    printf '%s\n' "$wanted" >"$state/done-$extra"
done
echo "install: done in $((SECONDS - started)) s"
