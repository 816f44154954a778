"""The same checkpoints under MindSpore: `python -m daedal.ports.mindspore DIRECTORY --prompt TEXT`.

Dense Llama and Qwen models, and latent attention with experts (V2, V3), in PyNative and in graph mode. Nothing here
loads torch; MindSpore itself is loaded by `network` and by what imports it.
"""
