import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sae_helpers import planted, random_model
from safetensors.torch import load_file, save_file

from revelio.sae.config import TrainConfig
from revelio.sae.io.peers import export_saelens, export_sparsify
from revelio.sae.io.released import check_reconstruction, export_released, import_ksae
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train
from revelio.unpickle import read_tensors


@dataclass
class TrainerConfig:
    """Like the released checkpoint's config: a class that the reader does not have."""

    d_in: int = 6
    k: object = 3
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    path: Path = Path("checkpoints")


def released(path: Path, model: KSparseAutoencoder, cfg: object) -> None:
    state = {
        "W_enc": model.W_enc.detach().T.contiguous(),
        "b_enc": model.b_enc.detach(),
        "W_dec": model.W_dec.detach(),
        "b_dec": model.b_dec.detach(),
    }
    torch.save({"cfg": cfg, "state_dict": state}, path)


def equal(a: KSparseAutoencoder, b: KSparseAutoencoder) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("k", [3, (3,)])
def test_a_released_checkpoint_with_a_pickled_config_is_read(tmp_path, k):
    model = random_model(mode="as_code")
    released(tmp_path / "sae.pt", model, TrainerConfig(k=k))
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "sae.pt", weights_only=True)
    found = import_ksae(tmp_path / "sae.pt")
    assert found.k == 3
    assert found.mode == "as_code"
    assert equal(found, model)


def test_tensors_read_equal_torch_load(tmp_path):
    base = torch.arange(12.0)
    content = {
        "strided": base.view(3, 4).T[1:],
        "half": base.half(),
        "brain": base.bfloat16(),
        "whole": torch.arange(5),
        "flag": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(base),
        "nested": [1, 2.5, "text", None, (base, {"a": base})],
    }
    torch.save(content, tmp_path / "x.pt")
    found, wanted = read_tensors(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt")
    for name in ("strided", "half", "brain", "whole", "flag", "parameter"):
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name], wanted[name])
    assert found["nested"][:4] == [1, 2.5, "text", None]
    assert torch.equal(found["nested"][4][1]["a"], base)


def test_a_steerers_folder_is_read(tmp_path):
    model = random_model()
    state = {
        "encoder.weight": model.W_enc.detach(),
        "decoder.weight": model.W_dec.detach().T.contiguous(),
        "pre_bias": model.b_dec.detach(),
        "latent_bias": model.b_enc.detach(),
        "stats_last_nonzero": torch.zeros(20, dtype=torch.int64),
    }
    torch.save({"state_dict": state}, tmp_path / "state_dict.pth")
    config = {"n_dirs_local": 20, "d_model": 6, "k": 3, "auxk": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = import_ksae(tmp_path)
    assert (found.d, found.n, found.k, found.mode) == (6, 20, 3, "fixed")
    assert equal(found, model)
    assert import_ksae(tmp_path, k=5).k == 5


def test_export_and_import_give_the_model_back(tmp_path):
    model = random_model(mode="as_code")
    export_released(model, tmp_path / "sae.pt")
    assert torch.load(tmp_path / "sae.pt", weights_only=True)["cfg"]["k"] == 3
    assert equal(import_ksae(tmp_path / "sae.pt"), model)


class Malicious:
    """Runs a command when it is unpickled by a reader that trusts the file."""

    def __init__(self, marker: Path, call=os.mkdir) -> None:
        self.marker, self.call = str(marker), call

    def __reduce__(self):
        return self.call, (self.marker,)


@pytest.mark.parametrize("call", [os.mkdir, os.system, eval, getattr, torch.load])
def test_a_file_that_wants_something_called_is_refused_and_nothing_runs(tmp_path, call):
    marker = tmp_path / "marker"
    released(tmp_path / "sae.pt", random_model(), Malicious(marker, call))
    with pytest.raises(ValueError, match="refused"):
        import_ksae(tmp_path / "sae.pt")
    assert not marker.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "sae.pt"
    with pytest.raises(ValueError, match="no file"):
        import_ksae(path)
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="no zip archive"):
        import_ksae(path)
    torch.save({"state_dict": {"W_enc": torch.zeros(2, 4)}}, path)
    with pytest.raises(ValueError, match="lacks b_enc, W_dec, b_dec"):
        import_ksae(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state_dict"):
        import_ksae(path)
    bad = random_model(mode="as_code")
    bad.W_enc.data[0, 0] = float("nan")
    released(path, bad, {})
    with pytest.raises(ValueError, match="NaN"):
        import_ksae(path, k=3)


def test_an_import_is_checked_on_activations(tmp_path):
    x, _ = planted(300, 12, 10, 2)
    model = KSparseAutoencoder(12, 48, 4, "as_code")
    for _ in train(model, x, TrainConfig(steps=150, learning_rate=1e-2, warmup_steps=1)):
        pass
    released(tmp_path / "sae.pt", model, {"k": 4})
    found = import_ksae(tmp_path / "sae.pt")
    own = check_reconstruction(found, x).fvu
    assert own < 0.5
    other, _ = planted(300, 12, 10, 2, seed=7)
    with pytest.raises(ValueError, match="unexplained"):
        check_reconstruction(found, other, worst_fvu=1.5 * own)


def dense_topk(x: torch.Tensor, W_enc, b_enc, W_dec, b_dec, k: int) -> torch.Tensor:
    """A TopK autoencoder by the file's own tensors, W_enc (d n): ReLU, then the k largest."""
    pre = torch.relu((x - b_dec) @ W_enc + b_enc)
    best = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values) @ W_dec + b_dec


def inputs() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(3)) * 2


def test_saelens_topk_goes_out_and_comes_back(tmp_path):
    model = random_model()
    export_saelens(model, tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert tensors["W_enc"].shape == (6, 20)
    wanted = dense_topk(inputs(), k=3, **tensors)
    torch.testing.assert_close(model(inputs()), wanted)
    found = import_ksae(tmp_path)
    assert (found.k, found.mode, found.activation) == (3, "fixed", "topk")
    assert equal(found, model)


def test_saelens_options_are_folded_in(tmp_path):
    model = random_model()
    model.W_dec.data *= torch.linspace(0.5, 2, 20)[:, None]
    export_saelens(model, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config |= {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    file = load_file(tmp_path / "sae_weights.safetensors")
    norm = file["W_dec"].norm(dim=1)
    pre = torch.relu(inputs() @ file["W_enc"] + file["b_enc"]) * norm
    best = pre.topk(3, dim=1)
    code = torch.zeros_like(pre).scatter(1, best.indices, best.values)
    wanted = (code / norm) @ file["W_dec"] + file["b_dec"]
    torch.testing.assert_close(import_ksae(tmp_path)(inputs()), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["jumprelu", "batch-topk"])
def test_thresholds_go_to_saelens_and_back(tmp_path, activation):
    model = KSparseAutoencoder(6, 20, 3, activation=activation)
    model.load_state_dict(random_model().state_dict(), strict=False)
    assert model.threshold is not None
    model.threshold.copy_(torch.linspace(-0.2, 1.5, len(model.threshold)) + 0.3)
    export_saelens(model.eval(), tmp_path)
    file = load_file(tmp_path / "sae_weights.safetensors")
    pre = (inputs() - file["b_dec"]) @ file["W_enc"] + file["b_enc"]
    wanted = (torch.relu(pre) * (pre > file["threshold"])) @ file["W_dec"] + file["b_dec"]
    torch.testing.assert_close(model(inputs()), wanted, atol=1e-5, rtol=1e-5)
    found = import_ksae(tmp_path)
    assert found.activation == "jumprelu"
    torch.testing.assert_close(found(inputs()), wanted, atol=1e-5, rtol=1e-5)


def test_sparsify_goes_out_and_comes_back(tmp_path):
    model = random_model()
    export_sparsify(model, tmp_path)
    file = load_file(tmp_path / "sae.safetensors")
    renamed = {
        "W_enc": file["encoder.weight"].T,
        "b_enc": file["encoder.bias"],
        "W_dec": file["W_dec"],
        "b_dec": file["b_dec"],
    }
    torch.testing.assert_close(model(inputs()), dense_topk(inputs(), k=3, **renamed))
    assert equal(import_ksae(tmp_path), model)
    assert import_ksae(tmp_path, k=5).k == 5


@pytest.mark.parametrize(
    ("export", "change", "named"),
    [
        (export_saelens, {"architecture": "gated"}, "'gated'"),
        (export_saelens, {"normalize_activations": "layer_norm"}, "layer_norm"),
        (export_saelens, {"k": None}, "whole number `k`"),
        (export_sparsify, {"transcode": True}, "transcode"),
        (export_sparsify, {"activation": "groupmax"}, "groupmax"),
    ],
)
def test_what_revelio_cannot_do_is_refused(tmp_path, export, change, named):
    export(random_model(), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=named):
        import_ksae(tmp_path)


def test_what_others_cannot_do_is_not_exported(tmp_path):
    for export in (export_saelens, export_sparsify):
        with pytest.raises(ValueError, match="negative"):
            export(random_model(mode="as_code"), tmp_path)
    with pytest.raises(ValueError, match="no jumprelu"):
        export_sparsify(KSparseAutoencoder(6, 20, 3, activation="jumprelu"), tmp_path)
    (tmp_path / "cfg.json").write_text('{"architecture": "topk", "k": 3}')
    with pytest.raises(ValueError, match=r"no file at .*sae_weights"):
        import_ksae(tmp_path)


def steerers(folder: Path, **config: object) -> None:
    model = random_model()
    state = {
        "encoder.weight": model.W_enc.detach(),
        "decoder.weight": model.W_dec.detach().T.contiguous(),
        "pre_bias": model.b_dec.detach(),
        "latent_bias": model.b_enc.detach(),
    }
    torch.save({"state_dict": state}, folder / "state_dict.pth")
    plain = {"n_dirs_local": 20, "d_model": 6, "k": 3, "auxk": 256, "dead_steps_threshold": 9}
    (folder / "config.json").write_text(json.dumps(plain | config))


def peer(export):
    def write(folder: Path, **config: object) -> None:
        export(random_model(), folder)
        own = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(own | config))

    return write


def pickled(folder: Path, **config: object) -> None:
    released(folder / "sae.pt", random_model(mode="as_code"), {"k": (3,), "lr": 4e-4} | config)


FORMS = {
    "steerers": steerers,
    "saelens": peer(export_saelens),
    "sparsify": peer(export_sparsify),
    "released": pickled,
}
CHANGES = {
    "input_unit_norm": True,
    "normalize_activations": "layer_norm",
    "layer_norm": True,
    "normalize_inputs": 1.5,
    "signed": True,
    "batch_topk": True,
    "sample_topk": True,
    "skip_connection": True,
    "transcode": True,
    "is_transcoder": True,
    "reshape_activations": "hook_z",
    "finetuning_scaling_factor": True,
    "scaling_factor": 0.5,
    "use_error_term": True,
    "activation_fn_str": "relu",
    "activation_fn": "tanh-relu",
    "activation_fn_kwargs": {"k": 3, "use_abs": True},
    "architecture": "gated",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_the_computation_is_refused_by_its_name(tmp_path, form, name):
    FORMS[form](tmp_path, **{name: CHANGES[name]})
    with pytest.raises(ValueError, match=name) as found:
        import_ksae(tmp_path / "sae.pt" if form == "released" else tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_setting_that_is_off_or_of_the_training_alone_is_read_over(tmp_path, form):
    off = {name: None for name in CHANGES if name != "architecture"}
    if form == "saelens":
        off |= {
            "hook_name": "blocks.3",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 3},
        }
    if form == "released":
        off |= {"normalize_decoder": True, "max_grad_norm": 2.0, "noise_scale": 0.5, "untied": True}
        off |= {
            "architecture": "standard",
            "activation_fn_str": ("topk",),
            "lr_scheduler_name": "x",
        }
    FORMS[form](tmp_path, **off)
    found = import_ksae(tmp_path / "sae.pt" if form == "released" else tmp_path)
    assert found.k == 3
    assert equal(found, random_model())


@pytest.mark.parametrize("form", FORMS)
def test_an_unknown_setting_of_a_folder_is_refused_and_no_k_is_never_guessed(tmp_path, form):
    place = tmp_path / "sae.pt" if form == "released" else tmp_path
    for k in (None, True, 0, "3", 2.0):
        FORMS[form](tmp_path, k=k)
        with pytest.raises(ValueError, match="pass k"):
            import_ksae(place)
        assert import_ksae(place, k=4).k == 4
    if form != "released":
        FORMS[form](tmp_path, something_new=7)
        with pytest.raises(ValueError, match="something_new = 7"):
            import_ksae(place)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("steerers", "d_model"),
        ("steerers", "n_dirs_local"),
        ("saelens", "d_in"),
        ("saelens", "d_sae"),
        ("sparsify", "d_in"),
        ("sparsify", "num_latents"),
        ("released", "d_in"),
        ("released", "d_sae"),
    ],
)
def test_a_size_that_is_not_that_of_the_tensors_is_refused(tmp_path, form, name):
    FORMS[form](tmp_path, **{name: 7})
    with pytest.raises(ValueError, match=f"{name} is 7"):
        import_ksae(tmp_path / "sae.pt" if form == "released" else tmp_path)


def test_a_class_as_activation_and_further_tensors_are_refused(tmp_path):
    pickled(tmp_path, activation_fn=torch.nn.ReLU)
    with pytest.raises(ValueError, match=r"activation_fn .*ReLU"):
        import_ksae(tmp_path / "sae.pt")
    content = torch.load(tmp_path / "sae.pt", weights_only=False)
    content["cfg"] = {"k": 3}
    content["state_dict"]["scaling_factor"] = torch.ones(20)
    torch.save(content, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match="scaling_factor"):
        import_ksae(tmp_path / "sae.pt")
    for export, file in ((export_saelens, "sae_weights"), (export_sparsify, "sae")):
        export(random_model(), tmp_path / file)
        path = tmp_path / file / f"{file}.safetensors"
        save_file(load_file(path) | {"W_skip": torch.ones(6, 6)}, path)
        with pytest.raises(ValueError, match="unexpected W_skip"):
            import_ksae(tmp_path / file)
