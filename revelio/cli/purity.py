"""How pure the latents are: how alike the labels of their top images, against chance.

sigma_label of the paper (Sec. 4.2) with its chance level for the labels at hand, and measures that don't
depend on the order of class ids: majority share, entropy, same-class pairs, a permutation z-score. Without
labels: how similar the top images' activations are (--similarity).

    revelio purity --top runs/top-up_ft1 runs/top-bottleneck --out runs/purity.json
    revelio purity --top runs/top --store runs/pets/up_ft1-t25-empty-d0 --similarity

Intervals are 95 % bootstrap intervals over latents.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from revelio.bounds import Count, Folder, NotEmpty, OutFile, Seed
from revelio.trust import printable

if TYPE_CHECKING:
    from torch import Tensor

    from revelio.analysis.top_images import TopImages


@dataclass(frozen=True)
class Config:
    """Which top images, and how they are judged."""

    top: Annotated[tuple[Folder, ...], NotEmpty()]
    """Folders that `revelio top-images` wrote; each gives one entry."""

    out: OutFile = Path("runs/purity.json")
    """The JSON file to write."""

    images: Count = 10
    """Top images a latent is judged by (paper: 10)."""

    latents: Count = 1000
    """Strongest latents that are averaged (paper: 1000)."""

    draws: Count = 20_000
    """Random sets of images for the chance level."""

    permutations: Count = 500
    """Shuffles of the labels for the z-score."""

    bootstrap: Count = 1000
    """Resamples of the latents for the intervals."""

    seed: Seed = 0
    """Seed of the three above."""

    similarity: bool = False
    """Also measure how similar the top images' activations are; needs --store."""

    store: tuple[Folder, ...] = ()
    """The activation stores of the top images, one each; for --similarity."""

    embeddings: Folder | None = None
    """A store of other embeddings of the same images (say, a ViT's), for --similarity."""

    centre: bool = True
    """Take the mean activation away before comparing: a large common mean makes all images alike."""


def run(config: Config) -> None:
    """Measure, print a table, write the JSON."""
    from revelio.analysis.purity import purity, table
    from revelio.analysis.top_images_files import load_top_images
    from revelio.following import beside, following
    from revelio.outputs import check_file, has_keys
    from revelio.run_dir import versions, write_json

    check_file(config.out, has_keys("entries", "made_from"), "a result of purity")
    if config.similarity and len(config.store) != len(config.top):
        raise ValueError(
            f"--similarity needs one --store for each --top: {len(config.store)} for {len(config.top)}"
        )
    entries = []
    tops = [load_top_images(folder) for folder in config.top]
    for number, top in enumerate(tops):
        units = _unit_vectors(config, number, top) if config.similarity else None
        entries.append(
            purity(
                top,
                images=config.images,
                latents=config.latents,
                draws=config.draws,
                permutations=config.permutations,
                bootstrap=config.bootstrap,
                seed=config.seed,
                embeddings=units,
            )
        )
    result = {key: _common(entries, key) for key in ("mode", "model", "dataset", "images")}
    settings = {"seed": config.seed, "centred": config.centre} if config.similarity else {}
    sources = [top.source for top in tops]
    write_json(
        config.out,
        result | settings | {"entries": entries, "made_from": sources, "versions": versions()},
    )
    print("\n".join(map(printable, table(entries).splitlines())))
    for note in dict.fromkeys(note for entry in entries for note in entry["notes"]):
        print(f"note: {printable(note)}")
    print(f"wrote {config.out} (intervals: 95 % bootstrap over latents)")
    store = config.store[0] if config.store else "STORE"
    made = ("--store", store, "--ksae", "KSAE", "--top", config.top[0])
    print(following("gallery", *made, "--out", beside(config.top[0], "gallery")))


def _unit_vectors(config: Config, number: int, top: "TopImages") -> "Tensor":
    from revelio.activations.store import ActivationStore
    from revelio.analysis.similarity import unit_vectors
    from revelio.analysis.top_images_files import check_store

    store = ActivationStore.open(config.store[number])
    check_store(top, store)
    chosen = store if config.embeddings is None else ActivationStore.open(config.embeddings)
    return unit_vectors(chosen, store.ids, centre=config.centre)


def _common(entries: list[dict[str, Any]], key: str) -> Any:
    """The value all entries share; a list where they differ."""
    values = [entry.get(key) for entry in entries]
    return values[0] if all(value == values[0] for value in values) else values
