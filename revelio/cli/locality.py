"""How local, stable and distinct the latents of a k-SAE of cells are, each measure beside its chance level.

Spatial entropy and area above half the maximum; with further stores, over which timesteps a latent fires
and how its map agrees between noise draws; with masks, its IoU with the class that it fits best; with another
run, how many latents have a partner there; with `--moved`, whether maps move with the image.

    revelio locality --store runs/pets/up_ft1-t25-empty-d0 --ksae runs/cells
    revelio locality --store runs/pets/up_ft1-t25-empty-d0 runs/pets/up_ft1-t25-empty-d1 --ksae runs/cells \\
        --out runs/cells/draws.json
    revelio locality --store S --ksae K --masks ~/pets/trimaps --other runs/cells-seed1 --moved --out O

A result of other settings is not replaced: give another file (--out), or remove it first.
Intervals are 95 % bootstrap intervals over latents; of the timestep profile, over images; of shares,
Wilson's.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from revelio.analysis.config import LocalityConfig as Config
from revelio.wording import plural


def run(config: Config) -> None:
    """Measure, and print a line a measure."""
    from revelio.cli.bar import Bar
    from revelio.cli.pictures import pictures_of_store
    from revelio.following import following
    from revelio.pipelines.locality import measure_locality

    with Bar("locality") as bar:
        made = measure_locality(config, bar)
    found = made.result
    print(f"{plural(len(found['latents']), 'latent')} on {plural(found['images'], 'image')}")
    measures = {**found["locality"], "redundant": found["redundancy"]["redundant"]}
    measures |= {f"agreement, draw {n}": one for n, one in enumerate(found.get("draws", []), 1)}
    measures |= {f"agreement, {name}": one for name, one in found.get("moved", {}).items()}
    if "masks" in found:
        measures["IoU of the best class"] = found["masks"]["mean"]
    if "partners" in found:
        measures["partners in the other run"] = found["partners"]
    for name, entry in measures.items():
        chance = f"; chance {_shown(entry['chance'])}" if "chance" in entry else ""
        print(f"{name.replace('_', ' ')}: {_shown(entry)}{chance}")
    peaks = Counter(one["peak"]["timestep"] for one in found.get("timesteps", []))
    for timestep, latents in sorted(peaks.items()):
        print(f"fire most at t = {timestep}: {plural(latents, 'latent')}")
    print(f"wrote {made.path}")
    inputs = ("--store", config.store[0], "--ksae", config.ksae, "--locality", made.path)
    print(following("gallery", *inputs, *pictures_of_store(config.store[0], config.data)))


def _shown(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "none"
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
