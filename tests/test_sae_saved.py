"""Saved k-SAEs: what is not exactly one is refused; what is loads to the same bits."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_helpers import planted, random_model
from safetensors.torch import load_file, save_file

from revelio.sae import model as model_module
from revelio.sae.config import TrainConfig
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.state import TrainState
from revelio.sae.step import train_step

NAMES = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]


@pytest.fixture
def folder(tmp_path) -> Path:
    model = KSparseAutoencoder(6, 20, 3, activation="jumprelu", trained_on={"layer": "up_ft1"})
    assert model.threshold is not None
    model.threshold.uniform_(0.1, 1)
    model.save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: held.contiguous() for name, held in tensors.items()}, folder / "model.safetensors"
    )


EDITS = {
    "lacks": lambda name: lambda t: t.pop(name),
    "unexpected": lambda name: lambda t: t.update({name + ".old": t[name].clone()}),
    "shape": lambda name: lambda t: t.update({name: t[name][:1]}),
    "shape ": lambda name: lambda t: t.update({name: t[name][None]}),
    "NaN": lambda name: lambda t: t[name].view(-1)[-1:].fill_(float("nan")),
    "infinity": lambda name: lambda t: t[name].view(-1)[:1].fill_(float("-inf")),
    "not float32": lambda name: lambda t: t.update({name: t[name].to(torch.int64)}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", EDITS)
def test_a_folder_without_exactly_its_tensors_is_refused(folder, name, said):
    change(folder, EDITS[said](name))
    with pytest.raises(ValueError, match=said.strip()) as found:
        KSparseAutoencoder.from_pretrained(folder)
    assert "model.safetensors" in str(found.value) and name in str(found.value)


def test_a_threshold_belongs_to_its_activation(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"activation": "topk"}))
    with pytest.raises(ValueError, match="unexpected threshold"):
        KSparseAutoencoder.from_pretrained(folder)


def test_a_cut_or_foreign_file_is_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:7],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"x",
        b"\xff" * 99,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            KSparseAutoencoder.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"no file at .*model\.safetensors"):
        KSparseAutoencoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="no k-SAE at nobody/nothing"):
        KSparseAutoencoder.from_pretrained("nobody/nothing")


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", "[" * 100_000, '{"d": 6, "d": NaN}', '{"n": 4}', '{"d": 4}', "\x00"]
)
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        KSparseAutoencoder.from_pretrained(folder)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(-2, 24)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["topk", "batch-topk", "jumprelu", "fixed", "as_code", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(deadline=None, max_examples=80)
@given(
    key=st.sampled_from([*"dnk", "mode", "format", "activation", "prefixes", "trained_on", "new"]),
    value=json_values,
)
def test_any_value_of_a_setting_is_taken_at_its_word_or_refused(tmp_path_factory, key, value):
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        random_model().save_pretrained(folder)
    config = random_model().settings() | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        found = KSparseAutoencoder.from_pretrained(folder)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert key != "new"
    said = found.settings() | {name: getattr(found, name) for name in ("activation", "prefixes")}
    for name, wanted in config.items():
        # The format is that of what the file holds; prefixes are a tuple; no provenance is an empty one.
        assert name == "format" or said[name] == (
            tuple(wanted) if name == "prefixes" else wanted or {}
        )


def test_half_precision_weights_are_read_as_float32(folder):
    before = load_file(folder / "model.safetensors")
    change(folder, lambda t: t.update({name: held.half() for name, held in t.items()}))
    loaded = KSparseAutoencoder.from_pretrained(folder).state_dict()
    for name, held in before.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], held.half().float())


def test_loading_draws_nothing(folder, monkeypatch):
    monkeypatch.setattr(model_module, "draw_weights", None)
    assert KSparseAutoencoder.from_pretrained(folder).threshold is not None
    assert not KSparseAutoencoder(4, 8, 2, seed=None).W_enc.any()


def test_what_json_cannot_hold_is_not_saved(tmp_path):
    model = random_model()
    model.trained_on["fvu"] = float("nan")
    with pytest.raises(ValueError, match="trained_on"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("mode", ["fixed", "as_paper", "as_code"])
def test_a_fresh_one_learns_in_a_loop_of_ones_own(mode):
    x, _ = planted(400, 12, 20, 3)
    model, options = KSparseAutoencoder(12, 48, 4, mode), TrainConfig(warmup_steps=1)
    kernel, state = SparseKernel(), TrainState.start(model)
    losses = []
    for _ in range(60):
        for batch in x.split(100):
            losses.append(train_step(model, batch, options, state, kernel).loss)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_the_seed_alone_decides_a_fresh_ones_weights():
    one, same, other = (KSparseAutoencoder(6, 40, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.W_dec, same.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)
    torch.testing.assert_close(one.W_dec.detach().norm(dim=1), torch.ones(40))
    assert torch.equal(one.W_dec, one.W_enc)
    draw = torch.random.get_rng_state()
    KSparseAutoencoder(6, 40, 3)
    assert torch.equal(draw, torch.random.get_rng_state())
