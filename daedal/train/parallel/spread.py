"""From a model that every process holds whole to the learner of a layout: sharded, with spread experts, in stages.

What happens before: random weights or a checkpoint's, the same on every process; the arithmetic of each part
(`precision.apply`), `compute_dtype` and `recompute`. What happens after: optimisers, made of the learner's `model`, and
whatever is loaded into it from a training checkpoint.
"""

from daedal.model.transformer import Transformer
from daedal.train.learner import Learner
from daedal.train.parallel.layout import Place
from daedal.train.parallel.pipeline import Pipelined
from daedal.train.parallel.sharding import Sharded


def spread(model: Transformer, place: Place) -> Learner:
    """All processes of `place` call this at once. ConfigError where the model cannot be laid out so."""
    return Pipelined(model, place) if place.layout.stages > 1 else Sharded(model, place)
