#!/usr/bin/env bash
# What only a GPU can tell, in stages that each have a time limit, for a machine that is there for a few minutes.
#
#   bash benchmarks/gpu.sh [MINUTES] [DIR]        12 and runs/gpu, if they are not given; it ends within the minutes
#
# Into DIR: doctor.txt, checks.jsonl, speed/, study/, and kept.tar.gz, which holds all of it but weights. What DIR holds is
# not done again, so that the same command goes on where it was stopped, within rows and trials too; KEPT=kept.tar.gz (or
# a folder) first takes over what an earlier run left.
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
if [[ -d $kept ]]; then
    cp -rn "$kept/." "$out/"
elif [[ -n $kept ]]; then
    tar xzf "$kept" -C "$out" --skip-old-files
fi

left() { echo $((end - SECONDS)); }

# What another run goes on with: rows, trials, pictures; no weights.
keep() {
    find "$out" -type f -size -2M ! -name 'kept.tar.gz*' ! -name '*.part' ! -path '*/last/*.safetensors' ! -path '*/best/*.safetensors' \
        -printf '%P\0' | tar czf "$out/kept.tar.gz.part" -C "$out" --null -T - && mv "$out/kept.tar.gz.part" "$out/kept.tar.gz"
}
trap keep EXIT

# stage NAME LEAST MOST: whether it is asked for and LEAST seconds are left; `limit` is then MOST, or what is left.
stage() {
    [[ " ${STAGES:-doctor checks speed study} " == *" $1 "* ]] || return 1
    limit=$(($(left) - 10 < $3 ? $(left) - 10 : $3))
    if ((limit < $2)); then
        echo "== $1: left out, $(left) s are left" && return 1
    fi
    echo "== $1, at most $limit s"
}

# At the end of its time a stage begins nothing more; what does not end then is ended.
bounded() { timeout --signal=INT --kill-after=5 "$limit" "$@"; }

unpack=
if [[ $data == *.tar.gz ]]; then # beside the checks
    mkdir -p "$scratch/vit2dpe-data"
    tar xzf "$data" -C "$scratch/vit2dpe-data" --strip-components=1 &
    unpack=$! data=$scratch/vit2dpe-data
fi

if [[ ! -s $out/doctor.txt ]] && stage doctor 5 90; then
    bounded python3 -m vit2dpe doctor --out "$out" 2>&1 | tee "$out/doctor.part" && mv "$out/doctor.part" "$out/doctor.txt"
fi
if stage checks 30 150; then
    bounded python3 -m benchmarks.gpu_checks --device "$device" --out "$out/checks.jsonl" --seconds $((limit - 15)) ${SMALL:+--small}
    keep
fi
if stage speed 30 $((minutes * 27)); then # 45% of all
    bounded python3 -m benchmarks.gpu_speed --device "$device" --out "$out/speed" --seconds $((limit - 15)) ${SMALL:+--small}
    keep
fi
[[ -n $unpack ]] && wait "$unpack"
if [[ ! -s $out/study/summary.md ]] && stage study 30 "$(left)"; then
    images=(--data digits --train-size 16 --sizes 16,24,32)
    if [[ -n $data ]]; then
        images=(--data folder --root "$data" --train-size 32 --sizes 32,48,64,96 --limit-test 5000)
    fi
    model=(--patch 4 --width 192 --depth 9 --heads 3 --drop-path 0.1 --lr 0.002)
    encodings=none,learned,sincos,relative,alibi,rope,rope_mixed
    if [[ -n ${SMALL:-} ]]; then
        images+=(--limit-train 64 --limit-test 20) model=(--patch 4 --width 16 --depth 1 --heads 2) encodings=none,rope
    fi
    bounded python3 -m vit2dpe study "${images[@]}" "${model[@]}" \
        --encodings $encodings --modes scale --policies extrapolate,interpolate,resize --out "$out/study" \
        --device "$device" --epochs "${EPOCHS:-30}" --batch-size "${BATCH:-512}" --seeds "${SEEDS:-2}" --jobs "${JOBS:-3}"
fi
echo "== done, $(left) s are left"
