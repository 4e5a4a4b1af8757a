#!/usr/bin/env bash
# What only a GPU can tell, in stages that each have a time limit, for a machine that is there for a few minutes.
#
#   bash benchmarks/gpu.sh [MINUTES] [DIR]        12 and runs/gpu, if they are not given
#
# Into DIR: doctor.txt, checks.jsonl, speed.jsonl, study/. What DIR holds already is not done again, so that the same
# command goes on where it was stopped; KEPT=FOLDER first copies the results of an earlier run into DIR.
#   STAGES="checks speed"    some of: doctor checks speed study
#   DATA=FOLDER              train/ and test/ (or a .tar.gz of one folder with them) for the study; else the digits
#   EPOCHS=30 SEEDS=2 JOBS=3 BATCH=512        of the study
#   DEVICE=cpu SMALL=1       everything once, tiny, to try this script without a GPU
# Needed: torch, torchvision, timm, einops, safetensors; for the study jsonargparse, matplotlib, scikit-learn. PYTHONPATH
# may name wheels; nothing is installed, and vit2dpe is that of this clone.
set -uo pipefail
minutes=${1:-12}
out=$(mkdir -p "${2:-runs/gpu}" && cd "${2:-runs/gpu}" && pwd)
data=${DATA:+$(realpath "$DATA")}
kept=${KEPT:+$(realpath "$KEPT")}
cd "$(dirname "$0")/.."
end=$((SECONDS + minutes * 60))
device=${DEVICE:-cuda}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:${PYTHONPATH:-}"
scratch=${TMPDIR:-/tmp}
[[ -n $kept ]] && cp -rn "$kept/." "$out/"

left() { echo $((end - SECONDS)); }

# stage NAME LEAST MOST: whether it is asked for and LEAST seconds are left; `limit` is then MOST, or what is left.
stage() {
    [[ " ${STAGES:-doctor checks speed study} " == *" $1 "* ]] || return 1
    limit=$(($(left) < $3 ? $(left) : $3))
    if ((limit < $2)); then
        echo "== $1: left out, $(left) s are left" && return 1
    fi
    echo "== $1, at most $limit s"
}

unpack=
if [[ $data == *.tar.gz ]]; then # beside the checks
    mkdir -p "$scratch/vit2dpe-data"
    tar xzf "$data" -C "$scratch/vit2dpe-data" --strip-components=1 &
    unpack=$! data=$scratch/vit2dpe-data
fi

if [[ ! -s $out/doctor.txt ]] && stage doctor 5 60; then
    timeout "$limit" python3 -m vit2dpe doctor --out "$out" 2>&1 | tee "$out/doctor.txt"
fi
if stage checks 30 150; then
    timeout "$((limit + 15))" python3 -m benchmarks.gpu_checks --device "$device" --out "$out/checks.jsonl" \
        --seconds "$limit" ${SMALL:+--small}
fi
if stage speed 30 180; then
    timeout "$((limit + 30))" python3 -m benchmarks.gpu_speed --device "$device" --out "$out/speed.jsonl" \
        --seconds "$limit" ${SMALL:+--small}
fi
[[ -n $unpack ]] && wait "$unpack"
if [[ ! -s $out/study/summary.md ]] && stage study 30 "$(($(left) - 20))"; then
    images=(--data digits --train-size 16 --sizes 16,24,32)
    if [[ -n $data ]]; then
        images=(--data folder --root "$data" --train-size 32 --sizes 32,48,64,96 --limit-test 5000)
    fi
    model=(--patch 4 --width 192 --depth 9 --heads 3 --drop-path 0.1 --lr 0.002)
    encodings=none,learned,sincos,relative,alibi,rope,rope_mixed
    if [[ -n ${SMALL:-} ]]; then
        images+=(--limit-train 64 --limit-test 20) model=(--patch 4 --width 16 --depth 1 --heads 2) encodings=none,rope
    fi
    timeout --signal=INT --kill-after=15 "$limit" python3 -m vit2dpe study "${images[@]}" "${model[@]}" \
        --encodings $encodings --modes scale --policies extrapolate,interpolate,resize --out "$out/study" \
        --device "$device" --epochs "${EPOCHS:-30}" --batch-size "${BATCH:-512}" --seeds "${SEEDS:-2}" --jobs "${JOBS:-3}"
fi
echo "== done, $(left) s are left"
