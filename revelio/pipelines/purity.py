"""How pure the latents of k-SAEs are, against chance and beside controls, measured and written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.activations.store import ActivationStore
from revelio.analysis.config import MeasurePurityConfig, PurityConfig
from revelio.analysis.controls import CONTROLS, compare
from revelio.analysis.paired import OVER_IMAGES
from revelio.analysis.purity import purity, renamed
from revelio.analysis.similarity import unit_vectors
from revelio.analysis.top_images import TopImages
from revelio.analysis.top_images_files import check_ksae, check_store, load_top_images
from revelio.bounds import check_fields
from revelio.outputs import check_file, has_keys
from revelio.pipelines import Made, Report, counted, silent
from revelio.pipelines.inputs import check_same_source, made_from, open_sae
from revelio.run_dir import versions, write_json
from revelio.sae.model import KSparseAutoencoder
from revelio.wording import plural

__all__ = ["MeasurePurityConfig", "MeasuredPurity", "controls_of", "measure_purity"]

NO_CONTROLS = "no controls: give the stores and k-SAEs to see what control dictionaries reach"


@dataclass(frozen=True)
class MeasuredPurity(Made):
    """What a purity file holds (``entries``: one for each of the top images), and where it is."""

    @property
    def entries(self) -> list[dict[str, Any]]:
        """A k-SAE's purity each."""
        return self.result["entries"]


def measure_purity(config: MeasurePurityConfig, progress: Report = silent) -> MeasuredPurity:
    """Judge the latents by their top images, and write the result.

    Args:
        config: which top images, of which stores and k-SAEs, and how they are judged.
        progress: told which control is at work.

    Raises:
        ValueError: a setting is outside its bounds, `m` is above the number of images, parts do not belong
            together, or something else stands at the file to write: also the purity of other top images.
    """
    check_fields(config)
    _check_numbers(config)
    out = config.out or config.top[0] / "purity.json"
    check_file(out, has_keys("entries", "made_from"), "a result of purity")
    tops = [load_top_images(folder) for folder in config.top]
    for folder, top in zip(config.top, tops, strict=True):
        if config.m > top.images:
            raise ValueError(
                f"purity over m={plural(config.m, 'image')}, but the top images in {folder} are of "
                f"{top.images:,}: give at most so many"
            )
    sources = [top.source for top in tops]
    ours = [made_from(source) for source in sources]

    def check() -> None:
        check_same_source(out, lambda found: [made_from(each) for each in found["made_from"]], ours)

    check()
    entries = [_entry(config, number, top, progress) for number, top in enumerate(tops)]
    if len(entries) > 1:
        names = told_apart(config.ksae or config.top)
        entries = [{"name": name} | entry for name, entry in zip(names, entries, strict=True)]
    result = {key: _common(entries, key) for key in ("mode", "model", "dataset", "images")}
    if config.similarity:
        result |= {"seed": config.seed, "centred": config.centre}
    result |= {"entries": entries, "made_from": sources, "versions": versions()}
    check()  # another run may have ended meanwhile
    write_json(out, result)
    return MeasuredPurity(out, result)


def told_apart(paths: Sequence[str | Path]) -> list[str]:
    """A name for each path: as much of its end as tells it apart, or a number."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def _check_numbers(config: MeasurePurityConfig) -> None:
    count = len(config.top)
    for name, given, needed in (
        ("store", len(config.store), config.similarity or config.ksae),
        ("ksae", len(config.ksae), False),
    ):
        if given not in ((count,) if needed else (0, count)):
            raise ValueError(f"{given} of {name} for {count} of top: give one {name} for each")
    if config.out is None and count > 1:
        raise ValueError("top has several folders: say where to write (out)")


def _entry(
    config: MeasurePurityConfig, number: int, top: TopImages, progress: Report
) -> dict[str, Any]:
    """One k-SAE's purity, with its similarity and controls where they are asked for."""
    if not config.store:
        entry = purity(top, config)
        return _noted(entry, NO_CONTROLS) if top.labels is not None else entry
    store = ActivationStore.open(config.store[number], cells=top.how.over != "pooled")
    check_store(top, store)
    units = None
    if config.similarity:
        chosen = ActivationStore.open(config.embeddings) if config.embeddings else store
        units = unit_vectors(chosen, store.ids, centre=config.centre)
    entry = purity(top, config, embeddings=units)
    if top.labels is None or not entry["latents"]:
        return entry
    if not config.ksae:
        return _noted(entry, NO_CONTROLS)
    model = open_sae(config.ksae[number], config.device, progress)
    check_ksae(top, model)
    return entry | controls_of(model, store, top, config, progress)


def _noted(entry: dict[str, Any], note: str) -> dict[str, Any]:
    return entry | {"notes": [*entry["notes"], note]}


def controls_of(
    model: KSparseAutoencoder,
    store: ActivationStore,
    top: TopImages,
    config: PurityConfig,
    progress: Report,
) -> dict[str, Any]:
    """What a purity entry holds of its controls: `controls`, `verdict`, `controls_method`.

    Their images are chosen by the codes that ``top``, the k-SAE's, were chosen by. The entry's own intervals,
    too, are then over images, which latents share, and not over latents.
    """
    count = counted(progress, "controls", CONTROLS + 1, "model")
    device = next(model.parameters()).device
    found = compare(model, store, config, top.how, device=device, progress=lambda _: count(1))
    kept = {name: found[name] for name in ("controls", "verdict")}
    if found["intervals"]:
        kept |= {
            "intervals": renamed(found["intervals"]),
            "interval": found["intervals"]["sigma"],
            "interval_method": f"95 % {OVER_IMAGES}",
        }
    return kept | {"controls_method": found["interval_method"]}


def _common(entries: list[dict[str, Any]], key: str) -> Any:
    """The value all entries share; a list where they differ."""
    values = [entry.get(key) for entry in entries]
    return values[0] if all(value == values[0] for value in values) else values
