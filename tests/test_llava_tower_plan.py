"""The plan of a tower cache that several processes fill."""

from dataclasses import replace

from llava_train_helpers import data_options, tiny_project

from llava_ext.config import CacheConfig
from llava_ext.tower_cache_job import open_cache_job, plan
from revelio.distributed import Processes


def test_the_plan_is_of_the_process_with_the_most_shards(tmp_path, monkeypatch) -> None:
    """Ten pictures in shards of four: of two processes one has six; a fourth has none."""
    monkeypatch.setattr("llava_ext.tower_cache_job.SHARD_IMAGES", 4)
    monkeypatch.setattr("llava_ext.tower_cache_job._rate", lambda one, names: 3.0)
    model = tiny_project(tmp_path, records=10)
    config = CacheConfig(
        cache=tmp_path / "c", data=data_options(tmp_path), model=model, batch_size=2
    )
    job = open_cache_job(config, Processes())
    lines = {
        world: plan(replace(job, processes=Processes(world=world))).splitlines()
        for world in (1, 2, 4)
    }
    assert "1 process; " in lines[1][0] and "3 s at 3 images/s" in lines[1][1]
    assert "2 processes; " in lines[2][0] and "2 s at 5 images/s" in lines[2][1]
    assert "4 processes (1 of them without a shard); " in lines[4][0]
    assert "1 s at 7.5 images/s" in lines[4][1]
