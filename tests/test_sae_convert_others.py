"""k-SAEs of dictionary_learning, Gemma Scope and saev against their formulas in numpy; others refused."""

import io
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sae_helpers import random_model
from safetensors.torch import save_file

from revelio.pipelines.convert_sae import convert_sae, read_sae
from revelio.sae.io.peers import export_saelens
from revelio.sae.io.released import import_ksae
from revelio.unpickle import read_arrays

D, N, K = 6, 20, 3
DRAW = np.random.default_rng(0)
ROWS = DRAW.normal(size=(50, D)).astype(np.float32)
W_ENC = DRAW.normal(size=(N, D)).astype(np.float32)
B_ENC = DRAW.normal(size=N).astype(np.float32)
W_DEC = DRAW.normal(size=(N, D)).astype(np.float32)
B_DEC = DRAW.normal(size=D).astype(np.float32)
THRESHOLD = np.abs(DRAW.normal(size=N)).astype(np.float32)
LEVEL = 0.7


def tensors(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def linear(**more: object) -> dict[str, object]:
    """As `nn.Linear` modules hold them."""
    held = {
        "encoder.weight": W_ENC,
        "encoder.bias": B_ENC,
        "decoder.weight": W_DEC.T,
        "b_dec": B_DEC,
    }
    return tensors(**held) | more


def matrices(**more: object) -> dict[str, object]:
    return tensors(W_enc=W_ENC.T, b_enc=B_ENC, W_dec=W_DEC, b_dec=B_DEC) | more


def dictionary(folder: Path, name: str, state: dict[str, object], **trainer: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "ae.pt")
    settings = {"trainer": {"dict_class": name, "lr": 1e-4} | trainer, "buffer": {"d_submodule": D}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def topk(pre: np.ndarray) -> np.ndarray:
    code = np.zeros_like(pre)
    for row, values in zip(code, pre, strict=True):
        chosen = np.argsort(-values)[:K]
        row[chosen] = values[chosen]
    return code


def write_topk(folder: Path) -> Path:
    more = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    return dictionary(folder, "AutoEncoderTopK", linear(**more))


def write_batch_topk(folder: Path) -> Path:
    more = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(LEVEL)}
    state = {f"_orig_mod.{name}": value for name, value in linear(**more).items()}
    return dictionary(folder, "BatchTopKSAE", state)


def write_matryoshka(folder: Path) -> Path:
    more = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(LEVEL)}
    more |= {"group_sizes": torch.tensor([4, 6, 10])}
    return dictionary(folder, "MatryoshkaBatchTopKSAE", matrices(**more))


def write_jumprelu(folder: Path) -> Path:
    return dictionary(
        folder, "JumpReluAutoEncoder", matrices(threshold=torch.from_numpy(THRESHOLD))
    )


def write_gemma_scope(folder: Path, save=np.savez) -> Path:
    folder.mkdir(exist_ok=True)
    arrays = {
        "W_enc": W_ENC.T,
        "b_enc": B_ENC,
        "W_dec": W_DEC,
        "b_dec": B_DEC,
        "threshold": THRESHOLD,
    }
    save(folder / "params.npz", **arrays)
    return folder / "params.npz"


def write_saev(folder: Path, schema: object = 2, cls: str = "TopK", **cfg: object) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"d_vit": D, "exp_factor": 4, "normalize_w_dec": True, "seed": 1}
    settings |= {"activation": {"cls": cls, "params": {"top_k": K}}} | cfg
    header = {"schema": schema, "cfg": settings, "commit": "x", "lib": "0.1"}
    buffer = io.BytesIO()
    torch.save(matrices(), buffer)
    (folder / "sae.pt").write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())
    return folder / "sae.pt"


CENTRED, PLAIN = (ROWS - B_DEC) @ W_ENC.T + B_ENC, ROWS @ W_ENC.T + B_ENC
# Each form: what writes it, its codes of ROWS by its own formula.
FORMS = {
    "dictionary_learning TopK": (write_topk, topk(np.maximum(CENTRED, 0))),
    "BatchTopK": (write_batch_topk, np.where(CENTRED > LEVEL, CENTRED, 0)),
    "Matryoshka": (write_matryoshka, np.where(CENTRED > LEVEL, CENTRED, 0)),
    "JumpReLU": (write_jumprelu, np.where(PLAIN > THRESHOLD, PLAIN, 0)),
    "Gemma Scope": (write_gemma_scope, np.where(PLAIN > THRESHOLD, PLAIN, 0)),
    "saev": (write_saev, topk(PLAIN)),
}


@pytest.mark.parametrize("form", FORMS)
def test_another_librarys_k_sae_computes_what_it_did(tmp_path: Path, form: str) -> None:
    write, code = FORMS[form]
    path = write(tmp_path / "theirs")
    model = convert_sae(path, tmp_path / "ours").model
    again = read_sae(tmp_path / "ours")
    for each in (model, again):
        found = each.encode(torch.from_numpy(ROWS))
        dense = torch.zeros(len(ROWS), N).scatter_add(1, found.indices.long(), found.values)
        np.testing.assert_allclose(dense.detach().numpy(), code, atol=2e-5)
        np.testing.assert_allclose(
            each.decode(found).detach().numpy(), code @ W_DEC + B_DEC, atol=2e-4
        )
    assert model.prefixes == ((4, 10) if form == "Matryoshka" else ())
    assert read_sae(path, k=2).k == 2


def test_compressed_and_foreign_byte_orders_are_read_and_the_rest_refused(tmp_path: Path) -> None:
    path = write_gemma_scope(tmp_path, np.savez_compressed)
    assert torch.equal(import_ksae(tmp_path).W_dec, torch.from_numpy(W_DEC))  # its folder, too
    odd = {
        "big": W_ENC.astype(">f4"),
        "columns": np.asfortranarray(W_ENC),
        "n": np.arange(3),
        "one": 5,
    }
    np.savez(path, **odd)
    found = read_arrays(path)
    for name, value in odd.items():
        np.testing.assert_array_equal(found[name].numpy(), value)
    np.savez(path, W_enc=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="holds no numbers"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(1 << 24))
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_arrays(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"params\.npz can't be read as arrays"):
        import_ksae(path)
    np.savez(path, W_enc=W_ENC)
    with pytest.raises(ValueError, match="lacks b_enc, W_dec, b_dec, threshold"):
        import_ksae(path)


def test_old_saelens_folders_name_topk_beside_standard(tmp_path: Path) -> None:
    export_saelens(random_model(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["k"]
    cfg |= {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
    }
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    found, wanted = import_ksae(tmp_path), random_model()
    assert found.k == K and torch.equal(found.W_enc, wanted.W_enc) and found.activation == "topk"
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"activation_fn_str": "relu"}))
    with pytest.raises(ValueError, match="architecture 'standard'"):
        import_ksae(tmp_path)


@pytest.mark.parametrize("name", ["AutoEncoder", "GatedAutoEncoder", "CrossCoder", None])
def test_other_classes_of_dictionary_learning_are_refused_by_name(tmp_path: Path, name) -> None:
    dictionary(tmp_path, name, linear())
    with pytest.raises(ValueError, match=f"dictionary_learning's class {name}: AutoEncoderTopK, "):
        import_ksae(tmp_path)


def test_what_their_files_lack_is_said(tmp_path: Path) -> None:
    state = linear(threshold=torch.tensor(-1.0))
    dictionary(tmp_path, "BatchTopKSAE", state, k=K)
    with pytest.raises(ValueError, match="no threshold yet"):
        import_ksae(tmp_path)
    dictionary(tmp_path, "AutoEncoderTopK", state)
    with pytest.raises(ValueError, match="pass k"):
        import_ksae(tmp_path)
    assert import_ksae(tmp_path, 5).k == 5
    dictionary(tmp_path, "AutoEncoderTopK", state, k=K)
    assert import_ksae(tmp_path).k == K
    dictionary(tmp_path, "AutoEncoderTopK", linear(W_skip=torch.ones(D, D)), k=K)
    with pytest.raises(ValueError, match="W_skip"):
        import_ksae(tmp_path)


def test_other_saev_files_are_refused(tmp_path: Path) -> None:
    for named, said in (
        ({"schema": 1}, "another schema than 2"),
        ({"cls": "Relu"}, "activation Relu"),
        ({"cls": "BatchTopK"}, "activation BatchTopK"),
        ({"reinit_blend": 0.5}, "reinit_blend = 0.5"),
    ):
        with pytest.raises(ValueError, match=said):
            import_ksae(write_saev(tmp_path, **named))
    (tmp_path / "sae.pt").write_bytes(b"{" * 99)
    with pytest.raises(ValueError, match="first line of"):
        import_ksae(tmp_path / "sae.pt")


@pytest.mark.parametrize(("activation", "why"), [("TopK", "normalizes each row"), ("ReLU", "no k")])
def test_openais_are_refused_by_name(tmp_path: Path, activation: str, why: str) -> None:
    state = {"pre_bias": torch.zeros(D), "latent_bias": torch.zeros(N), "activation": activation}
    state |= tensors(**{"encoder.weight": W_ENC, "decoder.weight": W_DEC.T})
    state |= {"activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    torch.save(state, tmp_path / "0.pt")
    with pytest.raises(ValueError, match=f"openai/sparse_autoencoder, which is not read: .*{why}"):
        import_ksae(tmp_path / "0.pt")


def test_overcompletes_are_refused_by_name_and_nothing_is_imported(
    tmp_path: Path, monkeypatch
) -> None:
    module = ModuleType("overcomplete.sae.topk_sae")

    class TopKSAE(torch.nn.Linear):
        pass

    TopKSAE.__module__, TopKSAE.__qualname__ = module.__name__, "TopKSAE"
    module.TopKSAE = TopKSAE
    above = ("overcomplete", "overcomplete.sae")
    for name in above:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(TopKSAE(D, N), tmp_path / "whole.pt")
    torch.save({"dictionary._weights": torch.zeros(N, D)}, tmp_path / "state.pt")
    for name in (*above, module.__name__):
        monkeypatch.delitem(sys.modules, name)
    for name in ("whole.pt", "state.pt"):
        with pytest.raises(
            ValueError, match="a k-SAE of overcomplete, which is not read: its encoder"
        ):
            import_ksae(tmp_path / name)
    assert module.__name__ not in sys.modules


def test_weights_alone_do_not_say_what_they_do(tmp_path: Path) -> None:
    save_file(matrices(), tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=r"weights alone.*give the folder with its cfg\.json"):
        import_ksae(tmp_path / "sae.safetensors")
