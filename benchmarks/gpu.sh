#!/bin/bash
# What only a GPU can show, in order of importance, within a time limit:
#
#     benchmarks/gpu.sh MINUTES OUT
#
# 1. parity-*.md: the losses of 50 steps on the GPU against fp32 on the CPU, in each precision,
#    compiled and as a CUDA graph
# 2. step_time-*.md and .json: the time of a step in each configuration
# 3. resume-*.txt: a stopped and resumed run against one that was not stopped
# 4. ranks.txt: torchrun with NCCL, on one process and then on all GPUs
# 5. visualize/, <method>/model/: the trainings of `experiments/run.py --scale paper`, with grids
#
# A part that fails or takes too long costs its own result only; summary.txt lists them. Repeat the
# command to continue the training. Needs torch 2.11 or newer and, in DATA_ROOT [datasets/], facades,
# facades_unpaired (datasets/prepare.py split facades facades_unpaired --all) and monet2photo; no
# network. The variables below can be set from outside: a rehearsal on a CPU is
# DEVICE=cpu IMAGE_SIZE=32 CONFIGS=fp32 EXPERIMENTS=--dry-run.

set -u
[[ ${1:-} =~ ^[0-9]+$ && $# == 2 ]] || { echo "usage: benchmarks/gpu.sh MINUTES OUT" >&2; exit 2; }
mkdir -p "$2" || exit 2
out=$(readlink -f "$2")
root=$(dirname "$(dirname "$(readlink -f "$0")")")
DATA_ROOT=$(readlink -f "${DATA_ROOT:-$root/datasets}")
cd "$root" || exit

PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
METHODS=${METHODS:-pix2pix cycleGAN CUT}
CONFIGS=${CONFIGS:-}         # of step_time.py and parity.py [theirs]
IMAGE_SIZE=${IMAGE_SIZE:-256}
STEPS=${STEPS:-50}           # of parity.py
ROUNDS=${ROUNDS:-20}         # of step_time.py
FLAGS=${FLAGS:-}             # for each train.py of parts 1 to 4, such as --ngf 8
EXPERIMENTS=${EXPERIMENTS:-} # for experiments/run.py, such as --dry-run

limit=$((60 * $1)) failed=0 pid=
left() { echo $((limit - SECONDS)); }
trap 'kill -TERM $pid 2>/dev/null; wait $pid; exit 130' INT TERM

# part PERCENT FILE COMMAND...: runs it for at most that share of the time; its output goes to FILE
part() {
  local seconds=$((limit * $1 / 100)) file=$out/$2 status
  ((seconds > $(left))) && seconds=$(left)
  shift 2
  if ((seconds < 1)); then
    echo "not run, the time is over: ${file##*/}" | tee -a "$out/summary.txt"
    return
  fi
  timeout --signal TERM --kill-after 60 $seconds "$@" >"$file" 2>"$file.log" &
  pid=$!
  wait $pid
  status=$?
  ((status == 0 || status == 124 || status == 143)) || failed=1
  case $status in
    0) echo "done: ${file##*/}" ;;
    124 | 143) echo "stopped after $seconds s: ${file##*/}" ;;
    *) echo "failed with status $status: ${file##*/}; $(tail -n 1 "$file.log")" ;;
  esac | tee -a "$out/summary.txt"
}

folder() { [[ $1 == pix2pix ]] && echo facades || echo facades_unpaired; }

# train METHOD FLAGS...: a short training
train() {
  local method=$1
  shift
  $PYTHON "$method/train.py" --data-root "$DATA_ROOT" --data-folder "$(folder "$method")" \
    --image-size "$IMAGE_SIZE" --device "$DEVICE" --output-root "$out/short" $FLAGS "$@"
}

# resume METHOD: 20 steps at once, and 10 and 10; then the losses of both
resume() {
  train "$1" --run-name whole --max-steps 20 --save-model --overwrite >&2 &&
    train "$1" --run-name halves --max-steps 10 --save-model --overwrite >&2 &&
    train "$1" --run-name halves --resume --max-steps 20 >&2 &&
    $PYTHON - "$out/short/visualize/$1" <<'END'
import csv, sys
whole, halves = (
    list(csv.DictReader(open(f"{sys.argv[1]}/{name}/losses.csv")))[-1] for name in ("whole", "halves")
)
names = [name for name in whole if name not in ("epoch", "seconds", "images_per_second")]
for name in names:
    print(f"{name}: {whole[name]} at once, {halves[name]} resumed")
gaps = [abs(float(whole[n]) - float(halves[n])) / max(abs(float(whole[n])), 0.01) for n in names]
print(f"largest relative difference: {max(gaps):.1e}")
sys.exit(max(gaps) > 0.05)
END
}

# ranks N: whether gradients are averaged over N processes, and a short training
ranks() {
  local torchrun="$PYTHON -m torch.distributed.run --standalone --nproc-per-node $1"
  $torchrun benchmarks/parity.py --method pix2pix --device "$DEVICE" --check-nccl &&
    PYTHON=$torchrun train pix2pix --run-name "ranks-$1" --max-steps 5 --overwrite
}

export -f train resume ranks folder
export PYTHON DATA_ROOT DEVICE IMAGE_SIZE FLAGS out

: >"$out/summary.txt"
{
  nvidia-smi
  git describe --always --dirty
  $PYTHON -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
} >"$out/machine.txt" 2>&1

for method in $METHODS; do
  part 8 "parity-$method.md" $PYTHON benchmarks/parity.py --method "$method" --device "$DEVICE" \
    --steps "$STEPS" --data-root "$DATA_ROOT" ${CONFIGS:+--configs $CONFIGS} -- $FLAGS
done
for method in $METHODS; do
  part 8 "step_time-$method.txt" $PYTHON benchmarks/step_time.py --method "$method" \
    --device "$DEVICE" --image-size "$IMAGE_SIZE" --rounds "$ROUNDS" --output "$out/step_time-$method" \
    --minutes "$((limit * 5 / 6000))" ${CONFIGS:+--configs $CONFIGS} -- $FLAGS
done
for method in $METHODS; do
  part 4 "resume-$method.txt" bash -c "resume $method"
done
gpus=$($PYTHON -c 'import torch; print(torch.cuda.device_count())')
part 4 ranks.txt bash -c "ranks 1 && if (($gpus > 1)); then ranks $gpus; fi"
part 100 training.txt $PYTHON experiments/run.py --scale paper --data-root "$DATA_ROOT" \
  --output-root "$out" --minutes "$(($(left) / 60 - 1))" $EXPERIMENTS
exit $failed
