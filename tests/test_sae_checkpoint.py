import json

import pytest
import torch
from sae_helpers import planted

from revelio.sae.checkpoint import load_checkpoint, save_checkpoint
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.state import TrainSettings
from revelio.sae.train import train


@pytest.mark.parametrize("mode", ["fixed", "as_code"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(mode, tmp_path):
    x, _ = planted(150, 12, 20, 3, noise=0.1)
    # 5 batches an epoch, the last smaller; the stop is in the middle of the eighth.
    settings = TrainSettings(
        steps=60,
        batch_size=32,
        warmup_steps=10,
        auxk=4 if mode == "fixed" else 0,
        dead_after=200,
        early_stop=0.001,
        early_stop_window=30,
    )
    whole = KSparseAutoencoder(12, 96, 3, mode)
    losses = [step.loss for step in train(whole, x, settings)]
    stopped = KSparseAutoencoder(12, 96, 3, mode)
    for step in train(stopped, x, settings):
        if step.step == 37:
            save_checkpoint(tmp_path, stopped, step.state)
            break
    resumed = KSparseAutoencoder(12, 96, 3, mode)
    state = load_checkpoint(tmp_path, resumed)
    assert [step.loss for step in train(resumed, x, settings, state)] == losses[37:]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    model = KSparseAutoencoder(4, 8, 2)
    for step in train(model, planted(20, 4, 6, 2)[0], TrainSettings(steps=1)):
        save_checkpoint(tmp_path, model, step.state)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_of_another_model_or_damaged_is_refused(tmp_path):
    model = KSparseAutoencoder(4, 8, 2)
    for step in train(model, planted(20, 4, 6, 2)[0], TrainSettings(steps=1)):
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
