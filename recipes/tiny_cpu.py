"""Text to a small model that writes English, in five minutes on two cores: see tiny_cpu.sh."""

from daedal.train.recipe import Recipe

recipe = Recipe(
    size=3,
    text=("runs/tiny_cpu/text",),
    family="deepseek_v3",  # as good as V4 for each token here, in half the time
    vocabulary=2048,
    context=256,
    batch=8192,
    tokens=1_600_000,
    rate=8e-3,
    validation=0.03,
    evaluate_tokens=2**14,
    prompt="Fellow citizens,",
)
