"""Judge k-SAEs on held-out images, each beside its controls."""

from collections.abc import Mapping
from dataclasses import fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from revelio.analysis.config import OverCells
from revelio.analysis.paired import method
from revelio.analysis.top_images import own_over
from revelio.bounds import check_fields
from revelio.config import read_yaml, structure
from revelio.evaluation.config import EvalSAEConfig
from revelio.evaluation.controls import (
    RANDOM_WEIGHTS,
    TRAINED,
    control_dictionaries,
    trained_control,
)
from revelio.evaluation.identity import (
    directions_of_controls,
    live_directions,
    planted_recovery,
    planted_together,
    stabilities,
)
from revelio.evaluation.judge import judge, over_trainings
from revelio.evaluation.loss_recovered import ENDS
from revelio.evaluation.page import page, section, with_section
from revelio.files import write_folder, write_whole
from revelio.hub import CARD
from revelio.outputs import check_replaceable, claimed, replace_files
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.eval_stores import EvalData, eval_data, opened_for
from revelio.pipelines.inputs import (
    check_same_source,
    open_sae,
    place_of,
    sae_folder,
    weights_sha256,
)
from revelio.run_dir import versions, write_json
from revelio.sae.config import TrainSAEConfig
from revelio.sae.inputs import find
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import printable, read_text
from revelio.wording import plural

if TYPE_CHECKING:
    from revelio.pipelines.eval_downstream import InModel

MAKER = "eval-ksae"
RESULT, PAGE = "evaluation.json", "evaluation.md"


def eval_sae(config: EvalSAEConfig, progress: Report = silent) -> dict[str, Any]:
    """Measure every k-SAE of the config and write `evaluation.json` and `evaluation.md`.

    Args:
        config: which k-SAEs, images and controls.
        progress: told each model before it is measured or trained.

    Returns:
        What `evaluation.json` holds: ``ksaes``, by folder: the measures beside the controls;
        ``over_trainings`` and ``stability`` of several k-SAEs; ``planted``; ``notes``.

    Raises:
        ValueError: a value is outside its bounds; stores and k-SAEs do not fit together; held-out images are
            training images; too few images; or something else's files are in the way.
    """
    check_fields(config)
    out = config.out or place_of(config.ksae[0], "evaluation")
    config = replace(config, out=out)
    check_replaceable(out, MAKER, (RESULT, PAGE))
    with claimed(out):
        models = {path: open_sae(path, "cpu", progress) for path in config.ksae}
        config = replace(config, over=_over(config, models))
        _check_recipes(config)
        data = eval_data(config, models)
        check_same_source(out / RESULT, lambda found: found.get("store_sha256"), data.store.sha256)
        inside = None
        if config.loss_images:
            from revelio.pipelines.eval_downstream import InModel

            inside = InModel(config, data.store, data.rows)
        entries = {
            path: _judged(config, path, model, data, inside, progress)
            for path, model in models.items()
        }
        result = {
            "store": config.store.resolve().name,
            "store_sha256": data.store.sha256,
            "images": data.store.images,
            "over": config.over,
            "interval_method": method(config.confidence),
            "ksaes": entries,
            **_together(config, models, entries, data),
            **_planted(config, data, progress),
            "notes": [*data.notes, *_in_model_notes(entries)],
            "made_from": {path: weights_sha256(path) for path in models},
            "versions": versions(),
        }
        replace_files(out, MAKER, lambda folder: _write(folder, result))
    progress(Progress(f"wrote {out / RESULT}, {out / PAGE}"))
    if config.card:
        for path in config.ksae:
            _show(path, result, progress)
    return result


NOT_IN_MODEL = (
    "loss recovered and ablations were not measured: they need the backbone (loss_images)"
)


NO_SCALE = (
    "loss recovered is left out: the model's loss is no higher with the mean activation than with the true "
    "one"
)


def _in_model_notes(entries: Mapping[str, Any]) -> list[str]:
    inside = [entry["in_model"] for entry in entries.values() if "in_model" in entry]
    if not inside:
        return [NOT_IN_MODEL]
    return [NO_SCALE] if any(one["loss_scale"]["interval"][0] <= 0 for one in inside) else []


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    write_json(folder / RESULT, result)
    (folder / PAGE).write_text(page(result), encoding="utf-8")


def _show(path: str, result: Mapping[str, Any], progress: Report) -> None:
    """Put the result into the k-SAE's model card, where it has one on disk."""
    folder = sae_folder(path)
    if folder is None or not (folder / CARD).is_file():
        return
    try:
        card = read_text(folder / CARD)
        write_whole(folder / CARD, with_section(card, section(result, path)))
    except (OSError, ValueError) as error:  # the result is written; a card is not worth losing it
        progress(Progress(f"the card of {printable(path)} stays as it is: {printable(error)}"))
    else:
        progress(Progress(f"wrote the result into {folder / CARD}"))


def _over(config: EvalSAEConfig, models: Mapping[str, KSparseAutoencoder]) -> OverCells:
    """What an image's code is of, the same for all k-SAEs, or a ValueError that says what they differ in."""
    own: dict[str, OverCells] = {path: own_over(model) for path, model in models.items()}
    if config.over is None and len(set(own.values())) > 1:
        cells = next(path for path, over in own.items() if over != "pooled")
        raise ValueError(
            f"{printable(cells)} was trained on cells, others on pooled rows: choose `over`"
        )
    return config.over or next(iter(own.values()))


def _judged(
    config: EvalSAEConfig,
    path: str,
    model: KSparseAutoencoder,
    data: EvalData,
    inside: "InModel | None",
    progress: Report,
) -> dict[str, Any]:
    kind = (model.d, model.n, model.k, _normalization(model, data.source_about))
    if kind not in data.dictionaries:
        controls = control_dictionaries(model, data.source, config.seed, data.source_about)
        data.dictionaries[kind] = controls, {}, {}
    dictionaries, taken, seen = data.dictionaries[kind]
    models, known = {"k-SAE": model} | dictionaries, dict(taken)
    if config.trained_controls:
        key = _key(config, path, model, data.source_sha256, data.source_about)
        for name in TRAINED:
            models[name] = _trained(config, path, model, data, name, key, progress)
    others = {}
    if data.random is not None and config.random_train_store is not None:
        store = opened_for(config.random_train_store, config.over)
        key = _key(config, path, model, store.sha256, store.manifest)
        control = _trained(config, path, model, data, RANDOM_WEIGHTS, key, progress)
        others[RANDOM_WEIGHTS] = (control, data.random[0])
    entry = judge(
        models,
        data.rows,
        data.store.labels,
        confidence=config.confidence,
        seed=config.seed,
        source=data.store.manifest,
        over=_of_cells(config),
        others=others,
        known=known,
        progress=lambda name: progress(Progress(f"{path}: measuring {name}")),
    )
    taken |= {name: known[name] for name in dictionaries}
    if inside is not None:
        progress(Progress(f"{path}: {plural(len(inside.downstream), 'image')} through the model"))
        in_model = dict(seen)
        more = inside.measure(models, data.source.mean(0), in_model)
        seen |= {name: in_model[name] for name in (*ENDS, *dictionaries)}
        entry["measures"] |= more.pop("measures")
        entry |= more
    return entry


def _of_cells(config: EvalSAEConfig) -> Literal["max", "mean"]:
    return "mean" if config.over == "mean" else "max"


def _normalization(model: KSparseAutoencoder, about: Mapping[str, Any]) -> str:
    """What a k-SAE does to the rows of a store, as text; empty: nothing."""
    found = find(model.inputs, about)
    return "" if found is None else f" {found.kind} {found.shift} {found.scale}"


def _key(
    config: EvalSAEConfig,
    path: str,
    model: KSparseAutoencoder,
    trained_on: str,
    about: Mapping[str, Any],
) -> str:
    """Of a trained control: the k-SAE that it stands beside, and what it sees."""
    parts = f"{weights_sha256(path)} {trained_on} {config.over != 'pooled'}{_normalization(model, about)}"
    return blake2b(parts.encode(), digest_size=6).hexdigest()


def _trained(
    config: EvalSAEConfig,
    path: str,
    model: KSparseAutoencoder,
    data: EvalData,
    name: str,
    key: str,
    progress: Report,
) -> KSparseAutoencoder:
    """A control that is trained; one that lies in the output folder already is read."""
    assert config.out is not None
    kept = config.out / "controls" / f"{name.replace(' ', '-')}-{key}"
    if not kept.exists():

        def told(done: int, total: int) -> None:
            progress(Progress("", done, total, "step", (("control", name),)))

        rows = data.source
        if name == RANDOM_WEIGHTS:
            assert data.random is not None
            rows = data.random[1]
        control = trained_control(name, model, rows, _recipe(path), told, source=data.source_about)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_folder(kept, control.save_pretrained)
    return open_sae(str(kept), "cpu")


def _check_recipes(config: EvalSAEConfig) -> None:
    """Refuse now what would fail after the work: what is to be trained again must say how."""
    every = config.trained_controls or config.random_store
    for path in config.ksae if every else config.ksae[: bool(config.planted)]:
        _recipe(path)


def _recipe(path: str) -> TrainSAEConfig:
    """How a k-SAE was trained, from its run folder.

    Raises:
        ValueError: it is no run folder.
    """
    file = (sae_folder(path) or Path(path)).parent / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{path} is not in a run folder (no {file}): its training is not known")
    known = {one.name for one in fields(TrainSAEConfig)}
    # The command's own settings are in the file, too.
    return structure(TrainSAEConfig, {k: v for k, v in read_yaml(file).items() if k in known})


def _together(
    config: EvalSAEConfig,
    models: Mapping[str, KSparseAutoencoder],
    entries: Mapping[str, Any],
    data: EvalData,
) -> dict[str, Any]:
    """What several trainings of one recipe say together; nothing of a single one or of different recipes."""
    sizes = {
        (one.d, one.n, one.k, one.mode, one.activation, one.prefixes) for one in models.values()
    }
    if len(models) < 2 or len(sizes) > 1:
        return {}
    first = next(iter(models.values()))
    directions = [
        live_directions(model, data.rows, data.store.manifest, _of_cells(config))
        for model in models.values()
    ]
    seeds = list(range(config.seed, config.seed + len(models)))
    every = {"k-SAE": directions}
    every |= directions_of_controls(first, data.source, seeds, data.source_about)
    return {
        "over_trainings": over_trainings(
            [entry["measures"] for entry in entries.values()], config.confidence
        ),
        **stabilities(every, config.confidence),
    }


def _planted(config: EvalSAEConfig, data: EvalData, progress: Report) -> dict[str, Any]:
    if not config.planted:
        return {}
    recipe = _recipe(config.ksae[0])
    found = [
        planted_recovery(
            recipe,
            data.store.row_shape[0],
            len(data.source),
            seed=config.seed + number,
            progress=lambda done, total: progress(Progress("", done, total, "step")),
        )
        for number in range(config.planted)
    ]
    return planted_together(found, config.confidence)
