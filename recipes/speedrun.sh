#!/bin/sh
# The same story as tiny_cpu.sh at the size of GPT-2 small, for one accelerator or eight:
#
#     TEXT=/data/fineweb GPUS=8 sh recipes/speedrun.sh
#
# TEXT: a directory of documents (.jsonl, .parquet, .txt). Twenty tokens for each active parameter want about two
# billion tokens, some 9 GB of English. GPUS: processes, one a device. OUT: where the run goes.
set -eu

OUT=${OUT:-runs/speedrun}
GPUS=${GPUS:-1}
PYTHON=${PYTHON:-python}
TEXT=${TEXT:?name a directory of documents, as TEXT=/data/fineweb}

# A run that was stopped goes on by itself when this script is started again.
RESUME=
if [ -d "$OUT/checkpoints" ]; then RESUME=--resume; fi

# torchrun starts one process for each device and tells each its rank. Every process has all layers and experts, shards
# their weights with the others (FSDP), and reads samples of its own. The losses are those of one process: the batch is
# counted in tokens over all of them, never per device.
#   --standalone             one machine; for several, see torchrun's --rdzv-endpoint
#   --nproc-per-node         processes on it
#   -m daedal train          what each of them runs
#   --set text               the documents; a tokenizer is trained on them, then they become shards of ids, both once
#   --set expert_processes   eight devices may also share the experts: --set expert_processes=8
#   --set precision=fp8      products in FP8 with blocks of 128, as DeepSeek-V3; bfloat16 without it
#   --out                    tokenizer, shards, checkpoints, metrics.jsonl, tensorboard and at last the model
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m daedal train recipes/speedrun.py \
    --set "text=$TEXT" --out "$OUT" $RESUME

# Loss, bits per byte, tokens/s, MFU and MaxVio of every step, in a browser (while the run goes on, too):
#   tensorboard --logdir runs/speedrun/tensorboard

# What came out is a stock DeepSeek checkpoint: bits per byte of held-out text, and what its drafting module is worth.
"$PYTHON" recipes/evaluate.py "$OUT"

# Let it continue a text; `daedal serve runs/speedrun/model` serves it, transformers loads it.
echo "The history of science" | "$PYTHON" -m daedal chat "$OUT/model" --max-tokens 200 --speculate mtp
