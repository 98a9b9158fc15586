#!/bin/sh
# nano with 10, 25 and 40 % fewer parameters of language model and tower: cut, measured, distilled, measured, side by side.
# sh recipes/nano/compress.sh            what is there already is not made again
# STEPS=0 sh recipes/nano/compress.sh    cuts alone, without distillation, which takes a core half an hour for each
# SHARES="75" STEPS=20 SAMPLES=5 CONVERSATIONS=4 sh recipes/nano/compress.sh     a small trial
set -eu
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/nano/compressed}
measure() { $PYTHON -m minicpmv evaluate nanobench -m "$1" --samples "${SAMPLES:-300}" --output "$2" ${ROWS:+--rows "$ROWS"}; }
for share in ${SHARES:-90 75 60}; do
    # Weighed and fitted on what nano was taught: other tasks, which it answers wrongly, would outweigh them.
    [ -d "$OUT/$share" ] || $PYTHON -m minicpmv compress -m nano --output "$OUT/$share" --samples 0 \
        --conversations "${CONVERSATIONS:-64}" --data recipes/nano/distill_data.yaml \
        --target-parameters "llm=$share%" --target-parameters "tower=$share%"
    measure "$OUT/$share" "$OUT/$share-nanobench"
    if [ "${STEPS:-1}" -gt 0 ]; then
        $PYTHON -m minicpmv train distill --config recipes/nano/distill.yaml --model_name_or_path "$OUT/$share" \
            --output_dir "$OUT/$share-distilled" ${STEPS:+--max_steps "$STEPS"}
        measure "$OUT/$share-distilled" "$OUT/$share-distilled-nanobench"
    fi
done
measure nano "$OUT/100-nanobench"
