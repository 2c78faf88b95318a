"""`revelio convert-ksae`: every form in, every form out, the same codes; nothing is written over."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_helpers import planted, random_model

from revelio.activations.format import Cells
from revelio.activations.store import write_store
from revelio.cli import main
from revelio.pipelines.convert_sae import convert_sae, read_sae
from revelio.sae.config import Mode, Normalize, TrainConfig
from revelio.sae.inputs import Input, measure
from revelio.sae.io.peers import export_sparsify
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train

FORMS = ("revelio", "saelens", "sparsify", "released")


def place(folder: Path, form: str) -> Path:
    return folder / (f"{form}.pt" if form == "released" else form)


@pytest.mark.parametrize("first", FORMS)
def test_every_form_goes_to_every_other_with_its_codes(first, tmp_path, capsys):
    model, x = random_model(mode="as_code" if first == "released" else "fixed"), torch.randn(9, 6)
    model.save_pretrained(tmp_path / "ours")
    source = place(tmp_path, first)
    main(["convert-ksae", "--source", str(tmp_path / "ours"), "--to", first, "--out", str(source)])
    # Negative values, which the released form keeps, have no place in the folders of others.
    for form in ("revelio", "released") if first == "released" else FORMS[:3]:
        (tmp_path / "to").mkdir(exist_ok=True)
        out = place(tmp_path / "to", form)
        main(["convert-ksae", "--source", str(source), "--to", form, "--out", str(out)])
        assert f"wrote {out}" in capsys.readouterr().out
        again = read_sae(out)
        assert (again.d, again.n, again.k, again.mode) == (6, 20, 3, model.mode)
        for mine, theirs in zip(again.encode(x), model.encode(x), strict=True):
            assert torch.equal(mine, theirs)


def normalized_model(kind: Normalize, mode: Mode = "fixed", stores: int = 1, **more: Any):
    """A k-SAE of random weights on rows far from scale 1, and such rows."""
    draw = torch.Generator().manual_seed(1)
    rows = 100 + 30 * torch.randn(50, 6, generator=draw) * torch.linspace(0.2, 3, 6)
    inputs = [measure({"layer": str(i)}, kind, [rows * (i + 1)]) for i in range(stores)]
    model = KSparseAutoencoder(6, 20, 3, mode, inputs=inputs, **more)
    model.load_state_dict(random_model().state_dict(), strict=False)
    if model.threshold is not None:
        model.threshold.copy_(torch.linspace(0.1, 1.5, len(model.threshold)))
    return model, rows


@pytest.mark.parametrize("kind", ["mean-norm", "per-dimension"])
@pytest.mark.parametrize(
    ("form", "mode", "activation"),
    [
        ("saelens", "fixed", "topk"),
        ("saelens", "fixed", "batch-topk"),
        ("saelens", "fixed", "jumprelu"),
        ("sparsify", "fixed", "topk"),
        ("released", "as_code", "topk"),
    ],
)
def test_a_normalization_goes_into_the_weights_of_others(tmp_path, kind, form, mode, activation):
    model, rows = normalized_model(kind, mode, activation=activation)
    model.save_pretrained(tmp_path / "ours")
    back = read_sae(convert_sae(tmp_path / "ours", place(tmp_path, form), form).path)
    assert not back.inputs and back.mode == mode
    # By hand: normalize, then the same weights without an input.
    numbers = rows.double().numpy()
    scale = np.linalg.norm(numbers, axis=1).mean() / 6**0.5
    shift = 0.0
    if kind == "per-dimension":
        shift, scale = numbers.mean(0), numbers.std(0)
    plain = KSparseAutoencoder(6, 20, 3, mode, activation=activation)
    plain.eval().load_state_dict(model.state_dict())
    normal = torch.from_numpy((numbers - shift) / scale).float()
    wanted = plain(normal).detach().double().numpy() * scale + shift
    np.testing.assert_allclose(back(rows).detach().double().numpy(), wanted, rtol=1e-4, atol=1e-2)
    for mine, theirs in zip(dense(back, rows), dense(plain, normal), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def dense(model: KSparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    codes = model.encode(x)
    return torch.zeros(len(x), model.n).scatter_add_(1, codes.indices, codes.values)


def test_a_form_that_cannot_say_what_is_computed_is_refused(tmp_path, capsys):
    def said(model: KSparseAutoencoder, form: str) -> str:
        source, out = tmp_path / "ours", place(tmp_path / "out", form)
        model.save_pretrained(source)
        text = refused(["--source", str(source), "--to", form, "--out", str(out)], capsys)
        assert not out.exists()
        return text

    for form in ("saelens", "sparsify"):
        assert "2 stores, each in its own way" in said(
            normalized_model("per-dimension", stores=2)[0], form
        )
    two = normalized_model("mean-norm", "as_code", stores=2)[0]
    assert "2 stores, each in its own way" in said(two, "released")
    assert "mode fixed rectifies" in said(random_model(), "released")
    for activation in ("batch-topk", "jumprelu"):
        model = KSparseAutoencoder(6, 20, 3, activation=activation)
        assert f"no {activation}: export to SAELens" in said(model, "released")


def refused(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["convert-ksae", *words])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    return said


def test_mistakes_are_one_line_and_nothing_is_written_over(tmp_path, capsys):
    ours, out = tmp_path / "ours", tmp_path / "out"
    random_model().save_pretrained(ours)
    words = ["--source", str(ours), "--out"]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine.txt").write_text("mine")
    (tmp_path / "file.pt").write_text("mine")
    assert "is there already" in refused([*words, str(tmp_path / "kept")], capsys)
    assert "is there already" in refused(
        [*words, str(tmp_path / "file.pt"), "--to", "released"], capsys
    )
    assert "leave k out" in refused([*words, str(out), "--k", "3"], capsys)
    (tmp_path / "dictionary").mkdir()
    for name in ("ae.pt", "config.json"):
        (tmp_path / "dictionary" / name).write_text("{}")
    assert "dictionary_learning" in refused(
        ["--source", str(tmp_path / "dictionary"), "--out", str(out)], capsys
    )
    (tmp_path / "old").mkdir()
    (tmp_path / "old/cfg.json").write_text('{"d_in": 4, "d_sae": 8}')
    assert "SAELens's first versions" in refused(
        ["--source", str(tmp_path / "old"), "--out", str(out)], capsys
    )
    assert "no folder of a known k-SAE" in refused(
        ["--source", str(tmp_path / "kept"), "--out", str(out)], capsys
    )
    assert not out.exists() and (tmp_path / "file.pt").read_text() == "mine"


def test_a_store_shows_whether_the_k_sae_is_of_this_layer(tmp_path):
    rows, _ = planted(400, 8, 12, 2)
    model = KSparseAutoencoder(8, 64, 4)
    for _ in train(model, rows, TrainConfig(steps=150, learning_rate=1e-2, warmup_steps=1)):
        pass
    model.save_pretrained(tmp_path / "ours")
    for name, held in (("known", rows), ("foreign", 30 + 9 * torch.randn(100, 8))):
        write_store(tmp_path / name, held, [str(i) for i in range(len(held))])
    made = convert_sae(tmp_path / "ours", tmp_path / "theirs", "saelens", store=tmp_path / "known")
    assert made.metrics is not None and made.metrics.rows == 400
    error = (model(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    assert made.metrics.fvu == pytest.approx(error.item(), rel=1e-3)
    with pytest.raises(ValueError, match="of the variance unexplained"):
        convert_sae(tmp_path / "ours", tmp_path / "no", "saelens", store=tmp_path / "foreign")
    assert not (tmp_path / "no").exists()


def reading(kind: str, inputs: Sequence[Input] = ()) -> KSparseAutoencoder:
    """Its latents are the four dimensions and their opposites, of which it keeps one: no bias."""
    model = KSparseAutoencoder(4, 8, 1, inputs=inputs, trained_on={"rows_are": kind}, seed=None)
    with torch.no_grad():
        model.W_enc.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        model.W_dec.copy_(model.W_enc)
    return model


def one_dimension_a_cell() -> torch.Tensor:
    """Grids (40 4 2 3) whose cells are all on an axis, at either side of 0, so that their means are not."""
    draw = torch.Generator().manual_seed(2)
    axis = torch.randint(4, (40, 6), generator=draw)
    size = torch.randn(40, 6, generator=draw)
    return (torch.eye(4)[axis] * size[..., None]).transpose(1, 2).reshape(40, 4, 2, 3)


def test_a_store_measures_a_k_sae_of_cells_on_cells(tmp_path):
    grids, ids = one_dimension_a_cell(), [str(i) for i in range(40)]
    write_store(tmp_path / "grids", grids, ids, settings={"pool": "none"})
    cells = grids.flatten(2).transpose(1, 2)
    drawn = torch.stack([torch.randperm(6)[:2].sort().values for _ in ids])
    write_store(
        tmp_path / "cells",
        cells[torch.arange(40)[:, None], drawn].flatten(0, 1),
        ids,
        cells=Cells(torch.stack([drawn // 3, drawn % 3], 2).flatten(0, 1).to(torch.int16), (2, 3)),
    )
    reading("cells").save_pretrained(tmp_path / "of cells")
    reading("images").save_pretrained(tmp_path / "of images")
    export_sparsify(reading("cells"), tmp_path / "theirs")
    for source, store, rows in (
        ("of cells", "grids", 240),
        ("of cells", "cells", 80),
        ("theirs", "cells", 80),
    ):
        out = tmp_path / f"{source} {store}"
        made = convert_sae(tmp_path / source, out, store=tmp_path / store)
        assert made.metrics is not None and made.metrics.rows == rows
        assert made.metrics.fvu == pytest.approx(0, abs=1e-9)
    # What one dimension leaves of the means, about their mean.
    means = grids.mean((2, 3)).double().numpy()
    left = (means**2).sum() - (means**2).max(1).sum()
    share = left / ((means - means.mean(0)) ** 2).sum()
    made = convert_sae(tmp_path / "of images", tmp_path / "out", store=tmp_path / "grids")
    assert made.metrics is not None and made.metrics.fvu == pytest.approx(share, rel=1e-4)


def test_a_store_measures_a_k_sae_of_several_by_its_own_input(tmp_path):
    cells = one_dimension_a_cell().flatten(2).transpose(1, 2).flatten(0, 1)
    rows, ids = {"up_ft0": cells, "up_ft1": 100 + 7 * cells}, [str(i) for i in range(len(cells))]
    inputs = [
        Input({"layer": "up_ft0"}, "per-dimension", (0.0,) * 4, (1.0,)),
        Input({"layer": "up_ft1"}, "per-dimension", (100.0,) * 4, (7.0,)),
    ]
    reading("images", inputs).save_pretrained(tmp_path / "ours")
    for layer, held in rows.items():
        write_store(tmp_path / layer, held, ids, settings={"layer": layer})
        made = convert_sae(tmp_path / "ours", tmp_path / f"of {layer}", store=tmp_path / layer)
        assert made.metrics is not None and made.metrics.fvu == pytest.approx(0, abs=1e-9)
    write_store(tmp_path / "mid", rows["up_ft0"], ids, settings={"layer": "mid"})
    with pytest.raises(ValueError, match="was given layer mid"):
        convert_sae(tmp_path / "ours", tmp_path / "no", store=tmp_path / "mid")
