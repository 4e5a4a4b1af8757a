#!/usr/bin/env bash
# The wheel in two fresh environments, away from the clone: with [recipes] a study, a training and what is done with
# them; without extras every help, doctor and report. The sdist's own tests, where `tests` is said.
#
#   tools/fresh.sh [folder] [tests ...]       tools/fresh.sh /tmp/fresh tests/encodings tests/test_packaging.py
#
# Two environments hold torch twice: some gigabytes, or minutes of copying. The folder must not exist; it is left.
set -euo pipefail
cd "$(dirname "$0")/.."

clone=$PWD
place=${1:-$(mktemp -d)/fresh}
shift || true
mkdir "$place"
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore VIT2DPE_CACHE=$place/cache

python3 -m venv "$place/build"
"$place/build/bin/pip" install -q --no-compile build
"$place/build/bin/python" -m build -o "$place" . > "$place/build.log"
wheel=$(echo "$place"/*.whl)
mkdir "$place/away"
cd "$place/away"

says() { # status, words: the command's status and words that it prints
    local status=$1 words=$2 got=0
    shift 2
    "$@" > said.txt 2>&1 || got=$?
    if [[ $got != "$status" ]] || ! grep -qF -- "$words" said.txt; then
        cat said.txt
        echo "FAILED: $* (status $got, wanted $status and: $words)"
        exit 1
    fi
    echo "ok  ${*/#$place/...}"
}

every_help() {
    local name names
    names=$("$1/bin/python" -c 'from vit2dpe.cli.commands import COMMANDS; print(*COMMANDS, sep="\n")')
    while read -r name; do
        says 0 "usage: vit2dpe $name" "$1/bin/vit2dpe" $name --help < /dev/null
    done <<< "${names:?no command is known}"
}

echo "without extras"
python3 -m venv "$place/bare"
"$place/bare/bin/pip" install -q --no-compile "$wheel"
run=$place/bare/bin/vit2dpe
every_help "$place/bare"
says 0 'pip install "vit2dpe[recipes]"' "$run" doctor
says 0 "vit2dpe train --recipe digits_quick" "$run" recipes
says 0 "report.html" "$run" report "$clone/recipes/results/study_digits" --out report.html
says 2 'pip install "vit2dpe[recipes]"' "$run" show rope
says 2 'pip install "vit2dpe[recipes]"' "$run" study --quick
says 2 'pip install "vit2dpe[recipes]"' "$run" train --recipe digits_quick
says 2 "runs in a clone" "$run" bench

echo "with [recipes]"
python3 -m venv "$place/full"
"$place/full/bin/pip" install -q --no-compile "$wheel[recipes]"
run=$place/full/bin/vit2dpe
every_help "$place/full"
says 0 "[recipes] installed" "$run" doctor
says 0 "report.html" "$run" study --quick --run.out study
says 0 "page.html" "$run" report study --out page.html
says 0 "summary" "$run" train --recipe digits_quick --smoke --run.out smoke
says 0 "summary" "$run" train --recipe digits_quick --run.out digits
says 0 "encodings.png" "$run" show --run digits
"$place/full/bin/python" -c "from PIL import Image; Image.new('L', (16, 16), 200).save('a.png')"
says 0 "a.png" "$run" predict digits a.png
says 0 "" "$run" text train --recipe shakespeare_char --preset cpu --smoke --data.path "$clone/README.md" --run.out text

if (($#)); then
    echo "the sdist's tests"
    tar xf "$place"/*.tar.gz -C "$place"
    cd "$place"/vit2dpe-*/
    "$place/full/bin/pip" install -q --no-compile ".[test]"
    "$place/full/bin/python" -m pytest -q "$@"
fi
echo "all ok: $wheel"
