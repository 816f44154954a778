"""What became of drafts is counted under vLLM's names, and not mentioned where nobody drafts."""

from daedal.infer.engine import Engine
from daedal.infer.request import SamplingParams
from daedal.infer.speculative import Speculation
from daedal.serve.state.metrics import Metrics
from tests.tiny import tiny_model


def _counted(engine: Engine) -> dict[str, float]:
    lines = Metrics(engine.stats, "tiny").render().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line.startswith("daedal:spec_decode"))
    return {name: float(value) for name, value in samples}


def test_drafts_are_counted() -> None:
    model = tiny_model("llama")
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logit_bias={7: 50.0})
    engine = Engine(model, speculate=Speculation(method="lookup", draft_tokens=2))
    engine.generate([[7, 7, 7]], params)
    # The prompt brings the first of twelve tokens; eleven come as two right drafts and one more, but for the last two.
    assert _counted(engine) == {
        "daedal:spec_decode_num_drafts_total": 4,
        "daedal:spec_decode_num_draft_tokens_total": 7,
        "daedal:spec_decode_num_accepted_tokens_total": 7,
        'daedal:spec_decode_num_accepted_tokens_per_pos_total{position="0"}': 4,
        'daedal:spec_decode_num_accepted_tokens_per_pos_total{position="1"}': 3,
    }
    assert _counted(Engine(model)) == {}
