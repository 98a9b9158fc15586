#!/bin/sh
# nano with 10, 25 and 40 % fewer parameters of language model and tower: cut, distilled, measured, side by side.
# sh recipes/nano/compress.sh            what is there already is not made again
# SHARES="75" STEPS=20 SAMPLES=5 CONVERSATIONS=4 sh recipes/nano/compress.sh     a small trial
set -eu
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/nano/compressed}
for share in ${SHARES:-90 75 60}; do
    [ -d "$OUT/$share" ] || $PYTHON -m minicpmv compress -m nano --output "$OUT/$share" --samples 0 \
        --conversations "${CONVERSATIONS:-64}" --target-parameters "llm=$share%" --target-parameters "tower=$share%"
    $PYTHON -m minicpmv train distill --config recipes/nano/distill.yaml --model_name_or_path "$OUT/$share" \
        --output_dir "$OUT/$share-distilled" --max_steps "${STEPS:-5000}"
    $PYTHON -m minicpmv evaluate nanobench -m "$OUT/$share-distilled" --samples "${SAMPLES:-300}" \
        --output "$OUT/$share-nanobench"
done
$PYTHON -m minicpmv evaluate nanobench -m nano --samples "${SAMPLES:-300}" --output "$OUT/100-nanobench"
