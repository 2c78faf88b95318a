"""How pure the latents are: how alike the labels of their top images are, against chance and controls.

sigma_label of the paper (Sec. 4.2) with its chance level for the labels at hand, and measures that don't
depend on the order of class ids: majority share, entropy, same-class pairs, a permutation z-score. With the
stores and k-SAEs, also what control dictionaries (random directions, data rows, channels, principal axes)
reach on the same images: purity says little without. Without labels: how similar the top images' activations
are (--similarity).

    revelio purity --top runs/ksae/top-images --store runs/pets/up_ft1-t25-empty-d0 --ksae runs/ksae
    revelio purity --top runs/top-up_ft1 runs/top-bottleneck --out runs/purity.json
    revelio purity --top runs/top --store runs/pets/up_ft1-t25-empty-d0 --similarity

Intervals are over images where controls are measured: latents share images. Without, they are a bootstrap
over latents, which is too narrow.
"""

from revelio.analysis.config import MeasurePurityConfig as Config


def run(config: Config) -> None:
    """Measure, and print a table."""
    from revelio.analysis.controls import in_words
    from revelio.analysis.purity import table
    from revelio.cli.bar import Bar
    from revelio.cli.pictures import gallery_line, sources_of
    from revelio.pipelines.purity import measure_purity

    with Bar("purity") as bar:
        made = measure_purity(config, bar)
    lines = table(made.entries).splitlines()
    for entry in made.entries:
        if entry.get("controls"):
            name = entry.get("name", entry["layer"])
            lines.append(f"{name}: majority share {entry['majority_share']:.0%}; {in_words(entry)}")
    lines += dict.fromkeys(f"note: {note}" for entry in made.entries for note in entry["notes"])
    print("\n".join(lines))
    methods = dict.fromkeys(e["interval_method"] for e in made.entries if "interval_method" in e)
    print(f"wrote {made.path}" + (f" (intervals: {'; '.join(methods)})" if methods else ""))
    found = sources_of(config.top[0], made.result["made_from"][0])
    store, ksae = (*config.store, found[0])[0], (*config.ksae, found[1])[0]
    inputs = ("--top", config.top[0], "--store", store, "--ksae", ksae)
    print(gallery_line(made.entries[0].get("dataset"), store, *inputs))
