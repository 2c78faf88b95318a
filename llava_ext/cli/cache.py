"""Look at the pictures of a data set once, so that training reads none and, by choice, runs no vision tower.

One activation store a tower. `--keep` says what: the grids in float16 (averaged to the tower's budget where
its tokens are `pool`), the same in 8 bits, or the latents that the tower starts from. Size and time of each
are measured on the first images and printed before anything is written; a stopped run goes on where it was.

    revelio llava cache --config configs/llava/mini/clip-sd-t25.yaml --cache caches/caltech
    revelio llava cache --config configs/llava/clip-sd-t25.yaml --cache caches/cc595k --plan
    revelio llava cache --config configs/llava/clip-sd-t25.yaml --cache caches/cc595k --keep latents
    torchrun --nproc-per-node 4 -m revelio llava cache --config configs/llava/clip.yaml --cache caches/cc

Then give the same --cache to `revelio llava pretrain`; other weights, settings or images are refused there.
"""

import time

from llava_ext.config import CacheConfig as Config
from revelio.wording import plural

SECTION = ""
CARRIES = ("--data.", "--model.", "--limit", "--bad-records")


def run(config: Config) -> None:
    """Plan, fill, and name what was written."""
    from tqdm import tqdm

    from llava_ext.fusion import check_alignment
    from llava_ext.tower_cache_job import fill, open_cache_job, plan
    from revelio.activations.store import ActivationStore
    from revelio.distributed import launched
    from revelio.machine import duration, size

    processes = launched()
    job = open_cache_job(config, processes)
    # Every process measures its own pace, all at once: alone, one would have the cores of the others.
    processes.wait()
    line = plan(job)
    if processes.main:
        warnings = check_alignment(config.model.fusion, job.towers)
        print("\n".join([line, *(f"warning: {text}" for text in warnings)]), flush=True)
    if not config.plan:
        started = time.monotonic()
        with tqdm(total=job.share, unit=" images", disable=not processes.main) as bar:
            for done in fill(job):
                bar.update(done - bar.n)
        for _, target in job.targets if processes.main else ():
            store = ActivationStore.open(target.path, verify=False, packed=True)
            shape = " x ".join(map(str, store.row_shape))
            print(
                f"{store.path}  {len(store):,} {config.keep}, rows of {shape}, {size(store.bytes)}"
            )
        if processes.main:
            print(f"{plural(len(job.targets), 'store')} in {duration(time.monotonic() - started)}")
    processes.close()


def following(config: Config, given: list[str], section: str) -> list[object]:
    """The next command, on the same records."""
    if config.plan:
        of = [] if section == "pretrain" else ["--section", section]
        kept = ["--cache", config.cache or "FOLDER", "--keep", config.keep]
        return ["llava", "cache", *given, *of, *kept]
    return ["llava", section, *given, "--cache", config.cache]
