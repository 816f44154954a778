"""The size of GPT-2 small, with experts, on one accelerator or eight: see speedrun.sh."""

from daedal.train.recipe import Recipe

recipe = Recipe(
    size=12,  # 12 layers, 768 wide; experts, vocabulary, rate, batch and horizon follow
    text=("runs/speedrun/text",),  # files or directories: .txt, .jsonl, .parquet, also .gz and .xz
    family="deepseek_v3",
    micro_tokens=2**15,  # of one forward pass on one device: as much as its memory takes
    validation=0.005,
    prompt="The history of science",
)
