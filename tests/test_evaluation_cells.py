"""Measures of k-SAEs of cells: against loops over (image, cell), and through `eval-ksae`."""

import numpy as np
import pytest
import torch
from sae_helpers import loop_decode, loop_encode, random_model

from revelio.activations.store import write_store
from revelio.analysis.paired import image_subsets
from revelio.evaluation.config import EvalSAEConfig
from revelio.evaluation.encoded import encoded
from revelio.evaluation.judge import measures_of
from revelio.evaluation.measures import held_out
from revelio.pipelines.eval_sae import eval_sae
from revelio.pipelines.train_sae import train_sae
from revelio.sae.config import TrainSAEConfig


@pytest.mark.parametrize("over", ["max", "mean"])
def test_codes_and_errors_of_cells_equal_loops(over) -> None:
    model = random_model()
    cells = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))
    codes = encoded(model, cells, over=over)
    dense = np.stack([loop_encode(model, image) for image in cells])
    np.testing.assert_allclose(codes.matrix.toarray(), getattr(dense, over)(1), atol=1e-6)
    x = cells.flatten(0, 1).double().numpy()
    made = np.concatenate([loop_decode(model, image) for image in dense])
    errors = ((made - x) ** 2).sum(1).reshape(5, 7).sum(1)
    np.testing.assert_allclose(codes.errors.numpy(), errors, rtol=1e-5)
    a, b = made - x.mean(0), x - x.mean(0)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(codes.cosines.numpy(), cosines.reshape(5, 7).mean(1), rtol=1e-4)
    found = measures_of(codes, held_out(cells, None, image_subsets(5, 0), 0))
    whole = errors.sum() / ((x - x.mean(0)) ** 2).sum()
    assert found["fvu"].whole == pytest.approx(whole, rel=1e-5)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Grids whose class is at one cell alone, which the mean over cells hides under noise."""
    folder = tmp_path_factory.mktemp("grids")
    draw = torch.Generator().manual_seed(0)
    grids, labels = torch.randn(450, 8, 3, 3, generator=draw), torch.arange(450) % 4
    at = torch.randint(3, (450, 2), generator=draw)
    grids[torch.arange(450), labels, at[:, 0], at[:, 1]] += 8
    for name, part in (("train", slice(0, 300)), ("test", slice(300, 450))):
        ids = [f"i{i}" for i in range(450)][part]
        about = {"dataset": "d", "split": None, "classes": list("abcd"), "layer": "l", "model": "m"}
        write_store(folder / name, grids[part], ids, labels[part].tolist(), settings=about)
    return folder


def trained(folder, rows: str) -> str:
    config = TrainSAEConfig(
        store=(folder / "train",), out=folder / rows, rows=rows, resume=True, k=2, expansion=2, steps=60,
        batch_size=256, learning_rate=1e-2, warmup_steps=1, held_out=0.0,
    )  # fmt: skip
    return str(train_sae(config)[0].path)


def test_eval_ksae_judges_cells_as_the_ksae_was_trained(stores, tmp_path) -> None:
    config = {"store": stores / "test", "train_store": stores / "train"}
    cells, pooled = trained(stores, "cells"), trained(stores, "images")
    of_cells = eval_sae(EvalSAEConfig(**config, ksae=(cells,), out=tmp_path / "cells"))
    of_pooled = eval_sae(EvalSAEConfig(**config, ksae=(pooled,), out=tmp_path / "pooled"))
    assert (of_cells["over"], of_pooled["over"]) == ("max", "pooled")
    probe = [
        found["ksaes"][run]["measures"]["probe 5"]["value"]
        for found, run in ((of_cells, cells), (of_pooled, pooled))
    ]
    assert probe[0] > 0.9 > probe[1]
    assert "the max over its cells" in (tmp_path / "cells" / "evaluation.md").read_text()
    both = EvalSAEConfig(**config, ksae=(pooled, cells), out=tmp_path / "both")
    with pytest.raises(ValueError, match="cells was trained on cells, others on pooled rows"):
        eval_sae(both)


def test_a_store_of_vectors_is_refused_where_cells_are_asked(stores, tmp_path) -> None:
    cells = trained(stores, "cells")
    write_store(tmp_path / "flat", torch.randn(120, 8), [f"v{i}" for i in range(120)])
    with pytest.raises(ValueError, match="holds one vector an image, no cells"):
        eval_sae(EvalSAEConfig(store=tmp_path / "flat", ksae=(cells,), out=tmp_path / "out"))


def test_controls_of_several_trainings_are_measured_once_and_are_the_same(stores, tmp_path) -> None:
    cells, said = trained(stores, "cells"), []
    config = EvalSAEConfig(
        store=stores / "test", train_store=stores / "train", ksae=(cells,), out=tmp_path / "one"
    )
    alone = eval_sae(config, lambda step: said.append(step.message))["ksaes"][cells]
    once = len([line for line in said if "measuring" in line])
    other = str(stores / "cells" / "final")
    both = eval_sae(
        EvalSAEConfig(**vars(config) | {"ksae": (other, cells), "out": tmp_path / "two"}),
        lambda step: said.append(step.message),
    )
    assert both["ksaes"][cells] == alone == both["ksaes"][other]
    assert len([line for line in said if "measuring" in line]) == 2 * once + 1
