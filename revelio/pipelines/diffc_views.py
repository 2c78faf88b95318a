"""The views of images that Diff-C trains on, computed once by the processes of a run and kept."""

from dataclasses import replace

import torch

from revelio.backbones.loading import dtype_of
from revelio.diffc.cache import CacheSettings, bytes_left, fill_cache
from revelio.diffc.config import ON_LINE, TrainDiffCConfig
from revelio.diffc.cost import view_seconds
from revelio.diffc.fit import Task
from revelio.diffc.fitting import passes_too_large
from revelio.diffc.shared import Share
from revelio.diffc.sources import GridSource
from revelio.distributed import Processes
from revelio.machine import available_memory, free_disk
from revelio.machine import size as printed
from revelio.pipelines import Progress, Report, counted


def keep_views(
    task: Task, config: TrainDiffCConfig, processes: Processes, progress: Report
) -> Task:
    """The task with augmented views of train and the plain one of test, computed once.

    Several processes compute each some of the views, into files that all read.
    Stored grids stay as they are, and so do live ones where every epoch is to make a fresh view.
    """
    if config.store or config.kept_views == ON_LINE:
        return task
    cache = CacheSettings(
        views=config.kept_views,
        dtype=dtype_of(config.cache_dtype),
        memory_gb=config.cache_gb if processes.world == 1 else 0.0,
        batch_size=config.pass_size,
        folder=config.cache_dir or config.out / "cache",
        key=task.made,
    )
    source = _kept("train grids", task.source, cache, processes, progress)
    test = _kept("test grids", task.test, replace(cache, views=0), processes, progress)
    return replace(task, source=source, test=test)


def _kept(
    name: str, source: GridSource, cache: CacheSettings, processes: Processes, progress: Report
) -> GridSource:
    """The source with its views computed.

    Raises:
        ValueError: memory or disk can't hold them, or a pass went beyond the device's memory.
    """
    try:
        return _computed(name, source, cache, processes, progress)
    except torch.OutOfMemoryError as error:
        raise passes_too_large(source, cache.batch_size, error) from error


def _computed(
    name: str, source: GridSource, cache: CacheSettings, processes: Processes, progress: Report
) -> GridSource:
    total = len(source.ids) * (1 + cache.views)
    progress(Progress(f"{name}: {total:,} of {_views_cost(source, cache, total, processes.world)}"))
    if processes.world > 1:
        processes.wait()  # all have seen what is free before one takes of it
        for _ in fill_cache(source, cache, Share(processes.rank, processes.world)):
            pass
        processes.wait()
    told, kept = counted(progress, name, total, "image"), source
    for state in fill_cache(source, cache):
        kept = state.grids or kept
        told(state.images)
    return kept


def _views_cost(source: GridSource, cache: CacheSettings, total: int, processes: int) -> str:
    """Shape, size, place and time, the last measured; refuses what memory or disk can't hold."""
    gigabytes, shape = cache.gigabytes(source), "x".join(map(str, source.shape))
    needed = printed(int(gigabytes * 1e9))
    where, memory = "in memory", available_memory()
    if memory is not None and memory / 1e9 < gigabytes <= cache.memory_gb:
        raise ValueError(
            f"the views need {needed} of memory, of which {printed(memory)} are available: "
            "take fewer views, or a smaller cache_gb, which keeps them in files"
        )
    if gigabytes > cache.memory_gb:
        where = f"in {cache.folder}"
        free, left = free_disk(cache.folder), bytes_left(source, cache)
        if free is not None and left > free:
            raise ValueError(
                f"the views need {printed(left)} in {cache.folder}, where {printed(free)} are free: "
                "take fewer views, another cache_dir, or views -1 (on-line)"
            )
    seconds = total * view_seconds(source, cache.batch_size) / processes
    return f"{shape}, {needed} {where}, {total / max(seconds, 1e-9):.3g} images/s, about " + (
        f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    )
