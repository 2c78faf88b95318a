"""Import and export checked against SAELens and sparsify themselves, in an environment of their own.

They are no dependencies, and may bring another PyTorch, so this file is not collected by default. What
`benchmarks/ksae_cuda.py` times of them, and of dictionary_learning, takes its steps here on the CPU:

    python -m venv peers && peers/bin/pip install sae-lens eai-sparsify dictionary-learning pytest jaxtyping \
        pyyaml cattrs
    export SPARSIFY_DISABLE_TRITON=1 PYTHONPATH=.:tests
    peers/bin/python -m pytest -c /dev/null --rootdir . tests/optional/check_peers.py
"""

import json
from pathlib import Path

import pytest
import torch
from sae_helpers import planted, random_model
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sparsify import SparseCoder, SparseCoderConfig

from revelio.sae.config import TrainConfig
from revelio.sae.io.peers import export_saelens, export_sparsify
from revelio.sae.io.released import import_ksae
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train

D, N, K = 12, 48, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def rows() -> torch.Tensor:
    return planted(300, D, 20, 3, noise=0.1)[0] + 1


def trained(**options) -> KSparseAutoencoder:
    model = KSparseAutoencoder(D, N, K, **options)
    settings = TrainConfig(steps=60, batch_size=64, learning_rate=5e-3, warmup_steps=5)
    list(train(model, rows(), settings))
    return model


def fill(module: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("activation", ["topk", "batch-topk", "jumprelu"])
def test_saelens_reads_what_is_exported(tmp_path, activation):
    model = trained(activation=activation)
    export_saelens(model, tmp_path)
    theirs = SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(theirs(rows()), model(rows()), **CLOSE)
        active = (theirs.encode(rows()) > 0).sum()
    assert int(active) == int((model.encode(rows()).values > 0).sum())


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
def test_saelens_topk_is_read(tmp_path, rescale, subtract):
    config = TopKSAEConfig(
        d_in=D, d_sae=N, k=K, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=subtract
    )
    theirs = TopKSAE(config)
    fill(theirs)
    theirs.save_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(import_ksae(tmp_path)(rows()), theirs(rows()), **CLOSE)


def test_saelens_jumprelu_is_read(tmp_path):
    theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=N))
    fill(theirs)
    theirs.save_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(import_ksae(tmp_path)(rows()), theirs(rows()), **CLOSE)


def test_sparsify_reads_what_is_exported(tmp_path):
    model = trained()
    export_sparsify(model, tmp_path)
    theirs = SparseCoder.load_from_disk(tmp_path)
    with torch.no_grad():
        out = theirs(rows())
        torch.testing.assert_close(out.sae_out, model(rows()), **CLOSE)
        error = model(rows()) - rows()
        own = float(error.square().sum() / (rows() - rows().mean(0)).square().sum())
    assert float(out.fvu) == pytest.approx(own, rel=1e-4)


def test_sparsify_is_read(tmp_path):
    theirs = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K))
    fill(theirs)
    theirs.save_to_disk(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(import_ksae(tmp_path)(rows()), theirs(rows()).sae_out, **CLOSE)


def test_the_fields_exported_are_theirs(tmp_path):
    export_saelens(random_model(), tmp_path)
    ours = json.loads((tmp_path / "cfg.json").read_text())
    TopKSAE(TopKSAEConfig(d_in=6, d_sae=20, k=3)).save_model(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs/cfg.json").read_text())
    assert set(ours) <= set(theirs)


@pytest.mark.parametrize("how", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("name", ["sparsify", "SAELens", "dictionary_learning"])
def test_the_benchmark_s_steps_learn(name, how, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import ksae_peers

    assert name in ksae_peers.installed()
    monkeypatch.setattr(ksae_peers, "RATE", 1e-2)
    step = ksae_peers.PEERS[name][1](ksae_peers.Setup(D, N, K, rows(), 64, how))
    losses = [float(step()) for _ in range(100)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
