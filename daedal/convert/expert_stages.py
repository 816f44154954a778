"""The stages that deal feed-forward parts out to experts: split, all of them active; router, fewer of them.

Both start from a checkpoint with latent attention and dense feed-forward parts: that of the stage norm, or a student
that came along, healed perhaps. How, `expert_layers` knows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from daedal.checkpoint.load import load
from daedal.convert.attention_stages import CHECKPOINT, NORM, Outcome, write_stock
from daedal.convert.exactness import EXACT, furthest_logit
from daedal.convert.expert_layers import ConvertedLayer, exact_layers, routed_layers, with_experts
from daedal.convert.expert_statistics import output_metrics
from daedal.convert.experts import ExpertReport, ExpertSettings
from daedal.convert.scene import Scene
from daedal.errors import ConfigError
from daedal.model.transformer import Transformer

SPLIT, ROUTER = "split", "router"

# The metric of a layer has fewer numbers to find than one window of 1024 tokens has, and is evened out besides.
_METRIC_WINDOWS = 8
_EXACT_WINDOWS, _EXACT_TOKENS = 4, 256  # of the held-out text, to compare in float64


def split(scene: Scene, directory: Path) -> Outcome:
    """Every expert active: the same function, which is checked."""
    settings = _settings(scene)
    model, whole = _latent(scene), replace(settings, active=settings.routed)
    made = with_experts(model, whole, _told(scene, exact_layers(model, whole)))
    windows = [given[0][:_EXACT_TOKENS] for given in scene.texts.held_out.values()][:_EXACT_WINDOWS]
    watch = scene.counting("comparing in float64", sum(len(ids_T) for ids_T in windows))
    furthest = furthest_logit(model, made, windows, watch)
    assert furthest <= EXACT, f"the split moves a logit by {furthest:.3g} in float64, {EXACT:g} at most is exact"
    return write_stock(scene, directory, made.config, made.state_dict()), {"furthest_in_float64": furthest}


def router(scene: Scene, directory: Path) -> Outcome:
    """Fewer experts for each token, chosen by an analytic router."""
    settings, windows, model = _settings(scene), scene.texts.calibration, _latent(scene)
    # Healing leads what lies between the layers away from the original's, so a student is its own measure there.
    dense = scene.model if scene.student is None else model
    weighed = windows[:_METRIC_WINDOWS]  # texts take turns in them
    told = scene.counting("weighing errors", sum(len(ids_T) for ids_T in weighed))
    metrics = output_metrics(dense, weighed, seed=scene.settings.seed, watch=told)
    layers = list(_told(scene, routed_layers(model, windows, metrics, settings, teacher=dense)))
    made = with_experts(model, settings, layers)
    reports = [layer.report for layer in layers if layer.report is not None]
    return write_stock(scene, directory, made.config, made.state_dict()), _shares(reports)


def _settings(scene: Scene) -> ExpertSettings:
    if scene.settings.experts is None:
        raise ConfigError("no experts were asked for: give their number, or stop at the norm")
    return scene.settings.experts


def _latent(scene: Scene) -> Transformer:
    return load(scene.student or scene.work / NORM / CHECKPOINT, device="cpu", dtype=torch.float32)


def _told(scene: Scene, layers: Iterable[ConvertedLayer]) -> Iterator[ConvertedLayer]:
    tell = scene.counting("dealing out neurons", scene.config.num_hidden_layers)
    for layer in layers:
        yield layer
        tell(1)


def _shares(reports: list[ExpertReport]) -> dict[str, float]:
    """Of the dense layers' output energy on held-out tokens, means over layers: what the router's choice keeps, what
    the best choice would.
    """
    count = len(reports)
    return {
        "output_energy_kept": sum(report.router for report in reports) / count,
        "output_energy_of_an_oracle": sum(report.oracle for report in reports) / count,
    }
