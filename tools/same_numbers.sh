#!/usr/bin/env bash
# Does a change leave every number as it was? Small studies, trainings and pretrainings of commit BASE and of HEAD, in one
# environment (the current `python`), compared bit for bit:
#
#   tools/same_numbers.sh BASE [DIR]
#
# Exit status: 0 "equal: N files, M tensors", 1 different (the first difference of every file is named), 2 nothing was
# compared, because a run failed or BASE is no commit.
#
# HEAD is what is committed: both commits are checked out as worktrees under DIR, and other edits do not count. Under DIR
# (default: runs/same_numbers) the runs of BASE are kept, by commit, so that the next comparison with it needs those of
# HEAD alone; an interrupted script goes on likewise. HEAD always runs anew, hence BASE = HEAD asks whether runs repeat.
# Two runs at a time, one thread each, no GPU, no download; about four and a half minutes of processor time for both
# commits, half of it where the runs of BASE are kept.
#
# Only command lines of `vit2dpe` are used, since modules may move between the two commits. How runs are compared, and
# what may differ: same_numbers.py.
set -euo pipefail

# The runs. Each has a folder of its own and is small: what is asked is whether numbers are the same, not whether they
# are good. --device cpu and one thread, because the order of sums would differ else.

study() { vit2dpe study --device cpu --jobs 1 --threads 1 "$@"; }
alone=(--run.device cpu --run.threads 1)
small=(--data.limit_train 320 --data.limit_test 100 --optim.epochs 2 --optim.warmup_epochs 1)
letters=(--data.path text.txt --data.context 64 --model.width 32 --model.depth 2 --model.heads 2 --optim.epochs 2
  --optim.batch_size 8 --steps_per_epoch 50)

run_images() { # an encoding of each kind, a sum, a rectangle, every policy; weights are also finetuned at the rectangle
  study --encodings none,learned,relative,alibi,rope_mixed,sincos+rope --train-size 16 --sizes 16,20x28 \
    --temperatures none,log --epochs 2 --warmup-epochs 1 --limit-train 320 --limit-test 100 --finetune 1 --out study
}

run_swin() {
  study --arch swin --encodings learned,relative,rope --window 2 --patch 2 --width 32 --heads 2 --train-size 16 \
    --sizes 16,24 --epochs 1 --limit-train 128 --limit-test 50 --out study
}

run_text_study() {
  write_text
  study --task text --root text.txt --encodings none,learned,t5,fire,rope --train-length 64 --lengths 64,128 \
    --width 32 --depth 2 --heads 2 --epochs 1 --batch-size 8 --limit-test 1000 --out study
}

run_sequences() {
  study --task copy --encodings learned,rope --train-length 8 --width 32 --epochs 1 --batch-size 32 --out copy
  study --task reverse --encodings sincos,learned,none --depths 1,2 --train-length 8 --lengths 8,12 --width 32 \
    --epochs 1 --batch-size 32 --out reverse
}

run_train() { # once as the recipe says, once with what it leaves out; then the first at other sizes
  vit2dpe train --config "$tree/recipes/digits_quick.yaml" "${small[@]}" "${alone[@]}" --run.out recipe
  vit2dpe train --data digits "${small[@]}" "${alone[@]}" --run.out more --model.position relative \
    --model.drop_path 0.1 --augment.policy trivial --augment.mixup 0.2 --augment.cutmix 1 --augment.erase 0.2 \
    --augment.train_sizes 16,16x24 --data.val_fraction 0.2 --optim.ema 0.9 --optim.accumulate 2 --optim.layer_decay 0.8
  vit2dpe evaluate --model recipe --data digits --sizes 16,24x20 --limit 100 --device cpu --out evaluate
}

run_pretrain() {
  vit2dpe pretrain --data digits "${small[@]}" "${alone[@]}" --run.out mae
  vit2dpe probe --run mae --device cpu --threads 1
  vit2dpe train --data digits --init mae --model.position sincos+rope "${small[@]}" "${alone[@]}" --run.out finetuned
}

run_simmim() {
  vit2dpe pretrain --data digits --objective simmim "${small[@]}" "${alone[@]}" --run.out simmim
}

run_text() {
  write_text
  vit2dpe text train "${letters[@]}" "${alone[@]}" --run.out causal
  vit2dpe text train --objective masked --model.position t5 "${letters[@]}" "${alone[@]}" --run.out masked
  vit2dpe text train --objective spans --model.position sincos "${letters[@]}" "${alone[@]}" --run.out spans
}

runs="images swin train text pretrain sequences text_study simmim" # the longest first

write_text() { # 24,000 letters with something to learn in them
  local i a b
  for ((i = 1; i <= 1200; i++)); do
    a=$((i * 37 % 101)) b=$((i * 53 % 97))
    echo "$a times $b is $((a * b))."
  done >text.txt
}

# How they are run.

vit2dpe() { python -P -m vit2dpe "$@"; } # -P: of the tree that PYTHONPATH names, wherever this is called

one() { # tree, folder of its runs, name of a run: the folder holds the run when it is finished, never before
  tree=$1 name=$3 side=${2##*/}
  side=${side%%[-.]*}
  part=$(mktemp -d "${2%/*}/unfinished-$name.XXXXXX")
  export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH}
  trap failed EXIT # in an `if` bash would pass over a command that fails
  trap 'trap - EXIT; rm -rf "$part"; exit 255' INT TERM
  cd "$part"
  SECONDS=0
  "run_$name" >log.txt 2>&1
  trap - EXIT
  echo "$SECONDS s  $name of $side"
  if [[ -e $2/$name ]]; then rm -rf "$part"; else mv "$part" "$2/$name"; fi # another script may have been quicker
}

failed() {
  tail -n 20 "$part/log.txt" >&2
  echo "same_numbers: $name of $side failed, its log is $part/log.txt" >&2
  exit 255 # xargs starts no more
}

if [[ ${1-} == --one ]]; then
  shift
  one "$@"
  exit
fi

refuse() {
  echo "same_numbers: $1" >&2
  exit 2
}

(($# == 1 || $# == 2)) || refuse "usage: tools/same_numbers.sh BASE [DIR]"
here=$(cd "$(dirname "$0")" && pwd -P)
root=$(git -C "$here" rev-parse --show-toplevel)
base=$(git -C "$root" rev-parse --verify --quiet "$1^{commit}") || refuse "$1 is no commit of $root"
head=$(git -C "$root" rev-parse HEAD)
git -C "$root" diff --quiet HEAD || echo "note: edits that are not committed do not count"
mkdir -p "${2:-$root/runs/same_numbers}"
dir=$(cd "${2:-$root/runs/same_numbers}" && pwd -P)

# Bytecode lies under DIR, since starting takes most of the time where packages were installed without it.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$dir/bytecode OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 VIT2DPE_DEBUG=1

# Runs are kept for these runs, packages and this processor: with others, other bits are no fault of a change.
packages=$(python -c '
import sys
from importlib.metadata import version
print(sys.version, *map(version, ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")))
') || refuse "python cannot say its versions of torch, timm, ...: activate the environment that vit2dpe is installed in"
processor=$(grep -m 2 -E '^(model name|flags)' /proc/cpuinfo 2>/dev/null || uname -a)
commands=$(declare -p alone small letters && declare -f vit2dpe study write_text $(printf 'run_%s ' $runs))
key=$(echo "$commands $packages $processor" | git hash-object --stdin)
kept=$dir/base-${base:0:12}-${key:0:8}
mkdir -p "$kept"
fresh=$(mktemp -d "$dir/head-${head:0:12}.XXXXXX")
trees=$(mktemp -d "$dir/trees.XXXXXX")

clean() {
  for side in base head; do
    if [[ -e $trees/$side ]]; then git -C "$root" worktree remove --force "$trees/$side"; fi
  done
  rm -rf "$trees" "$dir/bytecode$trees"
  if [[ ! $different ]]; then rm -rf "$fresh"; fi
}
different=""
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

check_out() { # commit, side
  git -C "$root" worktree add --quiet --detach "$trees/$2" "$1"
  local found
  found=$(cd "$trees" && PYTHONPATH=$trees/$2${PYTHONPATH:+:$PYTHONPATH} python -P -c 'import vit2dpe; print(vit2dpe.__file__)')
  [[ $found == "$trees/$2/"* ]] || refuse "vit2dpe is imported from $found, not from the checkout of $1"
}

missing=""
for name in $runs; do
  if [[ ! -e $kept/$name ]]; then missing+=" $name"; fi
done
if [[ $missing ]]; then check_out "$base" base; fi
check_out "$head" head
SECONDS=0
for name in $runs; do
  if [[ " $missing " == *" $name "* ]]; then printf '%s\0' "$trees/base" "$kept" "$name"; fi
  printf '%s\0' "$trees/head" "$fresh" "$name"
done | xargs -0 -P 2 -n 3 "$BASH" "$here/same_numbers.sh" --one || refuse "a run failed, nothing is compared"
echo "$SECONDS s  all of them"

python "$here/same_numbers.py" "$kept" "$fresh" || different=yes
if [[ $different ]]; then
  echo "the runs: $kept and $fresh"
  exit 1
fi
