import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_helpers import planted
from safetensors.torch import load_file, save_file

from revelio.sae.checkpoint import load_checkpoint, save_checkpoint
from revelio.sae.config import TrainConfig
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train


@pytest.mark.parametrize("mode", ["fixed", "as_code"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(mode, tmp_path):
    x, _ = planted(150, 12, 20, 3, noise=0.1)
    # 5 batches an epoch, the last smaller; the stop is in the middle of the eighth.
    options = TrainConfig(
        steps=60,
        batch_size=32,
        warmup_steps=10,
        auxk=4 if mode == "fixed" else 0,
        dead_after=200,
        early_stop=0.001,
        early_stop_window=30,
    )
    whole = KSparseAutoencoder(12, 96, 3, mode)
    losses = [step.loss for step in train(whole, x, options)]
    stopped = KSparseAutoencoder(12, 96, 3, mode)
    for step in train(stopped, x, options):
        if step.step == 37:
            save_checkpoint(tmp_path, stopped, step.state)
            break
    resumed = KSparseAutoencoder(12, 96, 3, mode)
    state = load_checkpoint(tmp_path, resumed)
    assert [step.loss for step in train(resumed, x, options, state)] == losses[37:]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    model = KSparseAutoencoder(4, 8, 2)
    for step in train(model, planted(20, 4, 6, 2)[0], TrainConfig(steps=1)):
        save_checkpoint(tmp_path, model, step.state)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_of_another_model_or_damaged_is_refused(tmp_path):
    model = KSparseAutoencoder(4, 8, 2)
    for step in train(model, planted(20, 4, 6, 2)[0], TrainConfig(steps=1)):
        save_checkpoint(tmp_path, model, step.state)
    with pytest.raises(ValueError, match="has k 2, not 3"):
        load_checkpoint(tmp_path, KSparseAutoencoder(4, 8, 3))
    (tmp_path / "W_enc.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"W_enc\.safetensors is damaged"):
        load_checkpoint(tmp_path, model)
    header = json.loads((tmp_path / "state.json").read_text())
    del header["samples"]
    (tmp_path / "state.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="lacks samples"):
        load_checkpoint(tmp_path, model)
    with pytest.raises(ValueError, match="no k-SAE checkpoint"):
        load_checkpoint(tmp_path / "elsewhere", model)


def fresh() -> KSparseAutoencoder:
    return KSparseAutoencoder(4, 8, 2, activation="jumprelu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint after five steps."""
    folder, model = tmp_path_factory.mktemp("saved"), fresh()
    for step in train(model, planted(20, 4, 6, 2)[0], TrainConfig(steps=5, batch_size=10)):
        if step.step == 5:
            save_checkpoint(folder, model, step.state)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


def of_an_earlier_version(folder: Path, **changes: object) -> None:
    """The same checkpoint as versions before sums wrote it, with some values of its state changed."""
    header = json.loads((folder / "state.json").read_text())
    del header["files"], header["sha256"]
    (folder / "state.json").write_text(json.dumps(header | changes))


FILES = [f"{name}{part}" for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
         for part in ("", ".mean", ".square")] + ["last", "fired_at"]  # fmt: skip


def test_every_file_is_known_to_the_tables_below(saved):
    found = {path.name for path in saved.iterdir()}
    assert found == {"state.json", *(f"{name}.safetensors" for name in FILES)}


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from([*FILES, "state"]), draw=st.randoms(), bit=st.integers(0, 7))
def test_no_flipped_bit_is_resumed_from(saved, tmp_path_factory, name, draw, bit):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    path = folder / ("state.json" if name == "state" else f"{name}.safetensors")
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << bit
    path.write_bytes(content)
    if name == "state":
        try:  # 1e-05 and 1E-05 are the same number
            same = json.loads(content) == json.loads((saved / "state.json").read_text())
        except ValueError:
            same = False
        if same:
            return
    with pytest.raises(ValueError, match="flipped"):
        load_checkpoint(folder, fresh())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:1],
        lambda t: t[None],
        lambda t: t[:0],
        lambda t: t.repeat(2, *[1] * (t.ndim - 1)),
        lambda t: t.int(),
        lambda t: t.double(),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_never_spread_or_cast(copied, name, change):
    of_an_earlier_version(copied)
    path = copied / f"{name}.safetensors"
    save_file({name: change(load_file(path)[name]).contiguous()}, path)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged \(it holds .*, not"):
        load_checkpoint(copied, fresh())


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_renamed_or_a_link_is_refused(copied, name):
    path = copied / f"{name}.safetensors"
    held = load_file(path)[name]
    save_file({name + "x": held}, path)
    with pytest.raises(ValueError, match=f"lacks {name}"):
        load_checkpoint(copied, fresh())
    path.unlink()
    with pytest.raises(ValueError, match="no file"):
        load_checkpoint(copied, fresh())
    save_file({name: held}, copied / "elsewhere")
    path.symlink_to(copied / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        load_checkpoint(copied, fresh())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("step", "epoch", "batch", "samples")
          for value in (-1, 1.5, True, None, "3", 1 << 70)),
        ("step", 1_000_000_000),
        ("samples", 4),
        ("stopped", 0),
        ("variance", -1.0),
        ("variance", "1"),
        ("window_sum", None),
        ("window_sum", [1]),
        ("window_best", "best"),
    ],
)  # fmt: skip
def test_an_impossible_counter_is_refused(copied, name, value):
    of_an_earlier_version(copied, **{name: value})
    with pytest.raises(ValueError, match=r"state\.json is damaged|after the last"):
        load_checkpoint(copied, fresh())


@pytest.mark.parametrize(
    ("name", "value"),
    [("last", 6), ("last", -6), ("last", -(1 << 63)), ("fired_at", -1), ("fired_at", 51)],
)
def test_a_time_outside_the_training_is_refused(copied, name, value):
    of_an_earlier_version(copied)
    path = copied / f"{name}.safetensors"
    tensor = load_file(path)[name]
    tensor[3] = value
    save_file({name: tensor}, path)
    with pytest.raises(ValueError, match="after the last"):
        load_checkpoint(copied, fresh())


def test_a_checkpoint_of_an_earlier_version_is_resumed(copied):
    first, second = fresh(), fresh()
    state = load_checkpoint(copied, first)
    of_an_earlier_version(copied)
    other = load_checkpoint(copied, second)
    assert (state.step, state.samples) == (other.step, other.samples) == (5, 50)
    assert torch.equal(state.moments.W_enc.square, other.moments.W_enc.square)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
