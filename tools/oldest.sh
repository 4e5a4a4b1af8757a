#!/usr/bin/env bash
# The suite's core with the oldest versions that pyproject.toml allows, in an environment of their own.
#
#   tools/oldest.sh [folder] [pytest's arguments]       tools/oldest.sh /tmp/oldest tests/encodings -k rope
#
# What the package and its extra recipes require is installed at its floor, what only tests use as it is today.
# Without arguments: all rooms, but for what other installed packages test (torchao wants a newer torch).
set -euo pipefail
cd "$(dirname "$0")/.."

place=${1:-$(mktemp -d)}
shift || true
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore OMP_NUM_THREADS=1

python3 -m venv "$place"
floors=$("$place/bin/python" - << 'END'
import re
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = project["dependencies"] + project["optional-dependencies"]["recipes"]
print(" ".join(re.sub(r">=", "==", line) for line in lines))
END
)
echo "$floors"
"$place/bin/pip" install -q --no-compile $floors pytest pytest-xdist hypothesis \
    "transformers>=5.0" sacrebleu rotary-embedding-torch x-transformers onnx onnxscript onnxruntime peft nbclient nbformat ipykernel tensorboard
"$place/bin/pip" install -q --no-compile --no-deps -e .
"$place/bin/pip" list 2> /dev/null | grep -iE "^($(tr ' ' '\n' <<< "$floors" | sed 's/==.*//' | paste -sd'|')) " || true

if (($# == 0)); then
    set -- tests/encodings tests/attention tests/resolution tests/models tests/interop tests/stock tests/data \
        tests/training tests/study tests/plots tests/cli tests/test_contexts.py tests/test_signal.py tests/test_positions.py \
        --deselect tests/models/test_tools_packages.py --deselect tests/training/test_trackers.py
fi
exec "$place/bin/python" -m pytest -q -p no:cacheprovider -W ignore::DeprecationWarning "$@" # of old packages
