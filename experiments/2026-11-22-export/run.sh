#!/usr/bin/env bash
# Makes this record again: bash experiments/2026-11-22-export/run.sh DIRECTORY
set -euo pipefail
OUT=${1:?where to}
mkdir -p "$OUT"
python -m pytest -m long tests/tools/test_export.py -k zoo -o junit_family=xunit1 --junitxml="$OUT/zoo.xml"
python experiments/2026-11-22-export/table.py "$OUT/zoo.xml" > "$OUT/zoo.csv"
