"""`eval-ksae` from stores to its page, its card and its refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones_helpers import picture, tiny_sd
from evaluation_helpers import classes_in_channels, judged

from revelio.activations.config import ExtractRunConfig
from revelio.activations.store import ActivationStore, write_store
from revelio.analysis.config import TopImagesConfig
from revelio.analysis.top_images import top_images
from revelio.backbones.config import BackboneConfig
from revelio.data.config import DataConfig
from revelio.evaluation.config import EvalSAEConfig
from revelio.evaluation.controls import TRAINED
from revelio.evaluation.page import END, START
from revelio.pipelines.eval_sae import NO_SCALE, NOT_IN_MODEL, eval_sae
from revelio.pipelines.eval_stores import NO_TRAIN_STORE, OWN_STORE, UNLABELLED
from revelio.pipelines.extract import extract_to
from revelio.pipelines.train_sae import train_sae
from revelio.sae.config import Rows, TrainSAEConfig
from revelio.sae.model import KSparseAutoencoder


def _stores(folder: Path, *, labels: bool = True, scale: float = 1.0) -> tuple[Path, Path]:
    rows, classes = classes_in_channels(500)
    rows = scale * rows
    for name, part in (("train", slice(0, 300)), ("test", slice(300, 500))):
        ids = [f"i{i}" for i in range(500)][part]
        write_store(
            folder / name,
            rows[part],
            ids,
            classes[part].tolist() if labels else None,
            settings={"dataset": "d", "split": None, "classes": list("abcd") if labels else []},
        )
    return folder / "train", folder / "test"


def _trained(
    folder: Path, store: Path, seeds: tuple[int, ...], rows: Rows = "images"
) -> tuple[str, ...]:
    return tuple(
        str(train_sae(
            TrainSAEConfig(
                store=(store,), out=folder / f"k{s}", k=2, expansion=4, steps=40, batch_size=64, seed=s,
                learning_rate=1e-2, warmup_steps=1, held_out=0.0, rows=rows,
            )
        )[0].path)
        for s in seeds
    )  # fmt: skip


def test_an_evaluation_from_stores_to_a_page(tmp_path: Path) -> None:
    train, test = _stores(tmp_path)
    runs = _trained(tmp_path, train, (0, 1, 2))
    config = EvalSAEConfig(
        store=test, train_store=train, ksae=runs, out=tmp_path / "out", planted=2
    )
    result = eval_sae(config)
    assert set(result["ksaes"]) == set(runs)
    assert {"over_trainings", "stability", "distinct_stability", "planted"} <= set(result)
    assert set(result["distinct_stability_verdict"]) == {"0.7", "0.9"}
    assert set(result["stability_verdict"]) == set(result["planted_verdict"]) == {"0.7", "0.9"}
    assert result["notes"] == [NOT_IN_MODEL]
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert all(f"| {name} |" in page for name in ("fvu", "probe 5", "coverage 0.8"))
    assert "near-duplicates above the cosine counted once" in page
    # Beside each table, of how many latents its means are: counted here from the codes.
    rows = torch.cat([batch for _, batch in ActivationStore.open(test).batches(64)])
    said = page.split("active on more than 10 images")[1:]
    assert len(said) == len(runs)
    for run, line in zip(runs, said, strict=True):
        model = KSparseAutoencoder.from_pretrained(Path(run) / "final")
        pre = (rows - model.b_dec) @ model.W_enc.T + model.b_enc
        kept = torch.zeros_like(pre).scatter(1, pre.topk(2).indices, 1.0)
        live = int(((kept * pre > 0).sum(0) > 10).sum())
        assert line.startswith(f"): k-SAE {live},")
        assert ("**Few: with" in line) == (live < 20)
    _, other = _stores(tmp_path / "other", scale=2.0)
    with pytest.raises(ValueError, match=r"evaluation\.json is the result of another store"):
        eval_sae(replace(config, store=other, train_store=None, planted=0))
    assert (tmp_path / "out" / "evaluation.md").read_text() == page


def _of_random_weights(folder: Path, train: Path, test: Path) -> dict[str, Path]:
    """Stores of the same images in another order, as of another model: noise without classes."""
    made = {}
    for name, path in (("random_train_store", train), ("random_store", test)):
        store = ActivationStore.open(path)
        rows = torch.rand(len(store), 8, generator=torch.Generator().manual_seed(len(store)))
        made[name] = folder / name / "test"
        settings = {"model": "m (random weights 0)"}
        write_store(made[name], rows.flip(0), list(store.ids)[::-1], settings=settings)
    return made


def test_the_same_recipe_on_random_weights_is_a_control(tmp_path: Path) -> None:
    train, test = _stores(tmp_path)
    runs = _trained(tmp_path, train, (0,))
    given = _of_random_weights(tmp_path, train, test)
    config = EvalSAEConfig(store=test, train_store=train, ksae=runs, out=tmp_path / "out", **given)
    measures = eval_sae(config)["ksaes"][runs[0]]["measures"]
    # Activations of noise: the classes, which the k-SAE's own activations show, are not in them.
    control = measures["probe 1"]["controls"]["random weights"]
    assert control["value"] < 0.65 < measures["probe 1"]["value"]
    assert control["difference"]["interval"][0] > 0
    [kept] = (tmp_path / "out" / "controls").iterdir()
    model = KSparseAutoencoder.from_pretrained(kept)
    # Paired by id: the control's FVU is that of its own rows, in the order of the held-out images.
    rows = torch.rand(200, 8, generator=torch.Generator().manual_seed(200))
    _, own = judged(model, rows, None)
    assert measures["fvu"]["controls"]["random weights"]["value"] == pytest.approx(own["fvu"].whole)
    for change, message in (
        ({"random_train_store": None}, "belong together"),
        ({"random_store": test}, "are of the same model"),
        ({"random_store": given["random_train_store"]}, "200 of the 200 images .* are not in"),
    ):
        with pytest.raises(ValueError, match=message):
            eval_sae(replace(config, **change))


def test_k_saes_of_several_normalized_stores_are_measured_to_the_end(tmp_path: Path) -> None:
    rows, classes = classes_in_channels(500)
    for number, scale in ((0, 1.0), (1, 50.0)):
        for name, part in (("train", slice(0, 300)), ("test", slice(300, 500))):
            settings = {"dataset": "d", "timestep": number, "classes": list("abcd")}
            ids = [f"i{i}" for i in range(500)][part]
            write_store(
                tmp_path / name / f"{number}",
                scale * rows[part],
                ids,
                classes[part].tolist(),
                settings=settings,
            )
    stores = (tmp_path / "train" / "0", tmp_path / "train" / "1")
    runs = tuple(
        str(train_sae(
            TrainSAEConfig(
                store=stores, out=tmp_path / f"k{s}", k=2, expansion=4, steps=40, batch_size=64, seed=s,
                learning_rate=1e-2, warmup_steps=1, held_out=0.0, normalize="per-dimension",
            )
        )[0].path)
        for s in range(2)
    )  # fmt: skip
    found = [
        eval_sae(
            EvalSAEConfig(
                store=tmp_path / "test" / f"{number}", train_store=tmp_path / "train" / f"{number}",
                ksae=runs, out=tmp_path / f"out{number}", trained_controls=True,
            )
        )
        for number in (0, 1)
    ]  # fmt: skip
    # The two differ in scale alone, which is normalized away: so do k-SAE and controls.
    first, second = ([one["ksaes"][run]["measures"] for run in runs] for one in found)
    for one, other in zip(first, second, strict=True):
        for name, entry in one.items():
            assert entry["value"] == pytest.approx(other[name]["value"], abs=0.02)
            for control in TRAINED:
                assert entry["controls"][control]["value"] == pytest.approx(
                    other[name]["controls"][control]["value"], abs=0.05
                ), (name, control)
    write_store(
        tmp_path / "else", rows[300:], [f"i{i}" for i in range(200)], settings={"timestep": 7}
    )
    with pytest.raises(ValueError, match="normalizes by store"):
        eval_sae(EvalSAEConfig(store=tmp_path / "else", ksae=runs, out=tmp_path / "other"))


def test_the_card_shows_the_result_and_keeps_what_else_it_says(tmp_path: Path) -> None:
    train, test = _stores(tmp_path, labels=False)
    runs = _trained(tmp_path, train, (0,))
    card = Path(runs[0]) / "README.md"
    if not card.is_file():
        card = Path(runs[0]) / "final" / "README.md"
    card.write_text(before := card.read_text() + "\nWritten by hand | <!-- and kept -->.\n")
    config = EvalSAEConfig(store=test, train_store=train, ksae=runs)
    result = eval_sae(config)
    after = card.read_text()
    assert after.startswith(before.rstrip()) and after.count(START) == after.count(END) == 1
    for name, entry in result["ksaes"][runs[0]]["measures"].items():
        assert f"| {name} | {entry['value']:.3f} |" in after and f"| {entry['verdict']} |" in after
    card.write_text(after + "More below.\n")
    eval_sae(replace(config, card=False))
    assert card.read_text() == after + "More below.\n"
    eval_sae(replace(config, seed=1))
    assert card.read_text().startswith(before.rstrip()) and card.read_text().endswith(
        "More below.\n"
    )
    assert card.read_text().count(START) == 1 and card.read_text() != after + "More below.\n"
    # By default the result lies in the run.
    assert (tmp_path / "k0" / "evaluation" / "evaluation.json").is_file()
    card.unlink()
    eval_sae(replace(config, seed=1))
    assert not card.exists()


def test_trained_controls_are_kept_and_not_trained_again(tmp_path: Path) -> None:
    train, test = _stores(tmp_path, labels=False)
    runs = _trained(tmp_path, train, (0,))
    config = EvalSAEConfig(
        store=test, train_store=train, ksae=runs, out=tmp_path / "out", trained_controls=True
    )
    result = eval_sae(config)
    assert set(result["ksaes"][runs[0]]["measures"]["fvu"]["controls"]) > set(TRAINED)
    kept = sorted((tmp_path / "out" / "controls").rglob("model.safetensors"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == len(TRAINED)
    assert eval_sae(config)["ksaes"] == result["ksaes"]
    assert [path.stat().st_mtime_ns for path in kept] == times
    # On another training store they are others, and both are kept.
    other, _ = _stores(tmp_path / "other", labels=False, scale=2.0)
    eval_sae(replace(config, train_store=other))
    assert len(list((tmp_path / "out" / "controls").rglob("model.safetensors"))) == 2 * len(kept)


def test_training_images_among_the_held_out_are_refused_or_said(tmp_path: Path) -> None:
    train, _ = _stores(tmp_path)
    runs = _trained(tmp_path, train, (0,))
    config = {"store": train, "train_store": train, "ksae": runs, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"300 of the 300 images .* are in .* too: hold out other"):
        eval_sae(EvalSAEConfig(**config))
    notes = eval_sae(EvalSAEConfig(**config, overlap="allow"))["notes"]
    assert notes == ["300 of 300 images are training images", NOT_IN_MODEL]


def test_the_same_pictures_in_a_data_set_of_another_name_are_found(tmp_path: Path) -> None:
    train, test = _stores(tmp_path)
    runs = _trained(tmp_path, train, (0,))
    rows = torch.cat(
        [ActivationStore.open(test).tensor()[:150], ActivationStore.open(train).tensor()[:50]]
    )
    ids = [f"i{i}" for i in (*range(300, 450), *range(50))]
    rows[150:] *= 1 + 1e-4  # of another batch
    write_store(tmp_path / "b" / "test", rows, ids, settings={"dataset": "other"})
    config = EvalSAEConfig(store=tmp_path / "b" / "test", train_store=train, ksae=runs)
    with pytest.raises(ValueError, match="50 of the 200 images"):
        eval_sae(config)
    rows[150:] = torch.rand(50, 8)  # other pictures of the same names
    write_store(tmp_path / "c" / "test", rows, ids, settings={"dataset": "other"})
    notes = eval_sae(replace(config, store=tmp_path / "c" / "test", out=tmp_path / "out"))["notes"]
    assert not any("training images" in note for note in notes)


@pytest.mark.parametrize(("key", "value"), [("model", "n"), ("layer", "down")])
def test_a_store_of_another_model_or_layer_is_no_test(tmp_path: Path, key: str, value: str) -> None:
    rows, classes = classes_in_channels(300)
    about = {"model": "m", "layer": "up", "timestep": 25, "classes": list("abcd")}
    for name, more in (("train", {}), ("test", {key: value}), ("later", {"timestep": 900})):
        ids = [f"{name}{i}" for i in range(300)]
        write_store(tmp_path / name, rows, ids, classes.tolist(), settings=about | more)
    runs = _trained(tmp_path, tmp_path / "train", (0,))
    config = EvalSAEConfig(store=tmp_path / "test", ksae=runs, out=tmp_path / "out")
    wrong = r"test is of model .*, and the k-SAE was trained on model m, layer up: give"
    with pytest.raises(ValueError, match=wrong):
        eval_sae(config)
    how = TopImagesConfig(m=5)
    model = KSparseAutoencoder.from_pretrained(Path(runs[0]) / "final")
    with pytest.raises(ValueError, match=wrong):
        top_images(model, ActivationStore.open(tmp_path / "test"), how)
    for odd in (5, "x", [3], {}, [{}]):  # as of somebody else's file
        model.trained_on, kept = {"stores": odd}, model.trained_on
        top_images(model, ActivationStore.open(tmp_path / "test"), how)
        model.trained_on = kept
    with pytest.warns(UserWarning, match="later is of timestep 900, .*trained on timestep 25"):
        top_images(model, ActivationStore.open(tmp_path / "later"), how)


def test_without_labels_and_with_too_few_images(tmp_path: Path) -> None:
    train, test = _stores(tmp_path, labels=False)
    runs = _trained(tmp_path, train, (0,))
    result = eval_sae(EvalSAEConfig(store=test, ksae=runs, out=tmp_path / "out"))
    assert set(result["ksaes"][runs[0]]["measures"]) == {"fvu", "cosine"}
    assert result["notes"] == [NO_TRAIN_STORE, UNLABELLED, NOT_IN_MODEL]
    write_store(tmp_path / "few", torch.rand(20, 8), [f"f{i}" for i in range(20)])
    with pytest.raises(ValueError, match="holds 20 images: measures need 100 up"):
        eval_sae(EvalSAEConfig(store=tmp_path / "few", ksae=runs, out=tmp_path / "few-out"))


def test_means_over_draws_are_not_measured_in_the_model(tmp_path: Path) -> None:
    train, test = _stores(tmp_path)
    runs = _trained(tmp_path, train, (0,))
    about = json.loads((test / "manifest.json").read_text()) | {"draw": [0, 1]}
    (test / "manifest.json").write_text(json.dumps(about))
    config = EvalSAEConfig(store=test, ksae=runs, out=tmp_path / "out")
    assert "fvu" in eval_sae(config)["ksaes"][runs[0]]["measures"]
    with pytest.raises(ValueError, match=r"means over 2 noise draws.* or leave loss_images out"):
        eval_sae(replace(config, loss_images=60, out=tmp_path / "other"))


@pytest.mark.parametrize("rows", ["images", "cells"])
def test_loss_recovered_of_an_extraction(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Passes of the model are what this test takes: eight ablated latents a k-SAE, not twenty.
    monkeypatch.setattr("revelio.evaluation.ablation.LATENTS", 8)
    model = tiny_sd(tmp_path / "sd")
    (tmp_path / "photos").mkdir()
    for number in range(100):
        picture(number).save(tmp_path / "photos" / f"{number:03d}.png")
    data = DataConfig(source=str(tmp_path / "photos"))
    backbone = BackboneConfig(name=str(model), device="cpu")
    [store] = extract_to(
        ExtractRunConfig(
            out=tmp_path / "a", layers=("up_ft0",), timesteps=(200,), data=data, backbone=backbone,
            pool="none",
        )
    )  # fmt: skip
    runs = _trained(tmp_path, store.path, (0, 1), rows)
    config = EvalSAEConfig(
        store=store.path,
        ksae=runs,
        out=tmp_path / "o",
        loss_images=40,
        batch_size=40,
        data=data,
        backbone=backbone,
        overlap="allow",
    )
    result = eval_sae(config)
    assert OWN_STORE in result["notes"]
    with pytest.raises(ValueError, match="is what the k-SAE was trained on"):
        eval_sae(replace(config, overlap="stop"))
    entry = result["ksaes"][runs[0]]
    losses = entry["in_model"]["loss"]
    scale = entry["in_model"]["loss_scale"]
    assert scale["value"] == pytest.approx(losses["mean"] - losses["true"])
    # A model of random weights predicts no better with the true activation.
    assert scale["interval"][0] <= 0 and "loss recovered" not in entry["measures"]
    assert NO_SCALE in result["notes"]
    assert entry["measures"]["output recovered"]["value"] < 1
    assert "effect" in entry["measures"] and NOT_IN_MODEL not in result["notes"]
    # The second k-SAE stands beside the same controls, which are not run again: as if it stood alone.
    alone = eval_sae(replace(config, ksae=runs[1:], out=tmp_path / "alone"))["ksaes"][runs[1]]
    assert result["ksaes"][runs[1]]["in_model"] == alone["in_model"]
    assert alone["in_model"]["loss"]["k-SAE"] != losses["k-SAE"]
    assert "| output recovered |" in (tmp_path / "o" / "evaluation.md").read_text()
    with pytest.raises(ValueError, match="loss_images is 5: intervals need 10 images up"):
        eval_sae(replace(config, loss_images=5))
    other = BackboneConfig(name=str(tiny_sd(tmp_path / "other", seed=1)), device="cpu")
    with pytest.raises(ValueError, match="needs the store's own model"):
        eval_sae(replace(config, backbone=other))
    # Unless others are given, the store's own model and pictures are taken, where they are known by name.
    own = EvalSAEConfig(store=store.path, ksae=runs)
    with pytest.raises(ValueError, match=r"is of a model \(sd\) that is no known one: give it"):
        eval_sae(replace(config, backbone=own.backbone))
    with pytest.raises(ValueError, match=r"does not say where its images \(photos\) are"):
        eval_sae(replace(config, data=own.data))
