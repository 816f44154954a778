"""Which layout a checkpoint directory has, told by the names in its files and by nothing else.

Also what may lie beside a model without belonging to it, and what tells a DSpark draft from V4's own drafting modules
(config.json is the same for both). Opens no file.
"""

import re
from collections.abc import Container, Iterable, Mapping

from daedal.config import ModelConfig
from daedal.errors import CheckpointError
from daedal.layouts import deepseek_v4
from daedal.layouts.tensors import DEEPSEEK, TRANSFORMERS

# Names of layers tell: as published, as transformers writes published names, as its modules are called.
_MARKS = (
    (DEEPSEEK, re.compile(r"layers\.\d+\.")),
    (DEEPSEEK, re.compile(r"model\.layers\.\d+\.(attn|ffn|attn_norm|ffn_norm|hc_attn_\w+|hc_ffn_\w+)(\.|$)")),
    (TRANSFORMERS, re.compile(r"model\.layers\.\d+\.")),
)
# Rotary tables and masks that old exporters wrote out.
_BESIDE = re.compile(r".*\.rotary_emb\.inv_freq|.*\.masked_bias|.*\.attn\.bias")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_COPY = re.compile(
    r"((model\.)?mtp\.\d+|model\.layers\.\d+)\.(embed|embed_tokens|head|lm_head|shared_head\.head)\.weight"
)
_MODULE = re.compile(r"(model\.)?mtp\.")
_DSPARK = re.compile(r"(model\.)?mtp\..*(dspark|markov_head|main_proj|main_norm|confidence_head)")


def detect(names: Iterable[str], config: ModelConfig) -> str:
    """The layout of files that hold `names`. CheckpointError for a mixture, or for none."""
    if not config.is_compressed:
        return TRANSFORMERS
    found: dict[int, str] = {}
    for name in names:
        for kind, (_, mark) in enumerate(_MARKS):
            if mark.match(name):
                found.setdefault(kind, name)
                break
    if len(found) > 1:
        first, second = sorted(found.values())[:2]
        raise CheckpointError(f"tensors {first} and {second} follow different layouts: keep to one")
    if not found:
        raise CheckpointError("no tensor is named layers.0.… or model.layers.0.…: check that these are V4's files")
    return _MARKS[next(iter(found))][0]


def spellings(names: Iterable[str], layout: str) -> Mapping[str, str]:
    """From the name that `pieces` gives a tensor to its name in the files. CheckpointError where two mean the same."""
    if layout != DEEPSEEK:
        return {name: name for name in names}
    found: dict[str, str] = {}
    for name in names:
        published = deepseek_v4.as_published(name)
        if published in found:
            raise CheckpointError(f"tensors {found[published]} and {name} are both {published}: keep one of them")
        found[published] = name
    return found


def is_beside(name: str, config: ModelConfig, names: Container[str], *, drafting: bool) -> bool:
    """Whether `name`, one of `names`, is known not to be needed. drafting: the drafting modules are wanted, so of
    theirs only the copies of what is the backbone's may be left.

    V3's drafting module is stored as one more layer; its `eh_proj` tells it from a layer that config.json forgot.
    """
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    if ".mlp.shared_experts." in name and not config.n_shared_experts:
        return True
    layer = _LAYER.match(name)
    if layer is not None and int(layer[1]) >= config.num_hidden_layers:
        of_drafting = f"{layer[0]}eh_proj.weight" in names
    else:
        of_drafting = _MODULE.match(name) is not None
    if of_drafting:
        return not drafting or _COPY.fullmatch(name) is not None
    return _BESIDE.fullmatch(name) is not None


def dspark_sign(names: Iterable[str], config: ModelConfig) -> str | None:
    """What shows that the drafting tensors are a DSpark draft: a tensor or a field of config.json; None if nothing."""
    for name in names:
        if _DSPARK.match(name):
            return f"tensor {name}"
    fields = (field for field, value in config.published.items() if "dspark" in field.lower() and value is not None)
    return next((f"field {field} of config.json" for field in fields), None)


def has_drafting(names: Iterable[str], config: ModelConfig) -> bool:
    """Whether files that hold `names` have drafting modules, of whatever kind."""
    layer = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    return any(name == layer or _MODULE.match(name) for name in names)
