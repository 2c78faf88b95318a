"""The batch size that fits: found by trying, named when a batch does not fit, kept to when a run goes on."""

import json
from dataclasses import replace

import pytest
import torch
from activations_helpers import SETTINGS, FakeBackbone, memory_dataset
from backbones_helpers import picture, tiny_dinov2, tiny_dit, tiny_sd

from revelio.activations import fitting
from revelio.activations.config import ExtractConfig, ExtractRunConfig
from revelio.activations.cost import estimate, seconds_per_image
from revelio.activations.extract import extract
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.fitting import SIZES, Fit, fitted, largest_batch, smaller_sizes
from revelio.activations.store import ActivationStore
from revelio.backbones.compiled import compile_backbone
from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import load_backbone
from revelio.distributed import Processes
from revelio.pipelines import extract as command

GIB = 2**30


class SmallBackbone(FakeBackbone):
    """A model on a device whose memory holds ``limit`` images; ``after`` so many batches, if given."""

    def __init__(self, limit: int, after: int = 0) -> None:
        super().__init__()
        self.limit, self.after = limit, after

    def activations(self, encoded, ids, *rest, **settings):
        self.after -= 1
        if self.after < 0 and len(ids) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().activations(encoded, ids, *rest, **settings)


def job_of(backbone, out, batch_size=16, images=40, shard_rows=None, **more) -> ExtractionPlan:
    config = ExtractConfig(layers=("deep", "wide"), batch_size=batch_size, shard_rows=shard_rows)
    return ExtractionPlan(memory_dataset(images), backbone, out, config, **more)


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 17, 100, 10**6])
def test_the_largest_size_that_raises_nothing(tmp_path, limit):
    found = largest_batch(job_of(SmallBackbone(limit), tmp_path)).size
    allowed = [size for size in SIZES if size <= limit and size < 2 * 40]
    assert found == max(allowed, default=0)


@pytest.mark.parametrize(("room", "wanted"), [(10, 8), (1.2, 1), (100, 64), (0.5, 1)])
def test_a_size_is_tried_only_where_twice_its_half_fits(tmp_path, monkeypatch, room, wanted):
    """One GiB an image and a tenth to spare: nothing is tried that would not fit."""
    tried = []

    def peak(job, index, pixels, size, device):
        tried.append(size)
        return size * GIB, int(room * GIB)

    monkeypatch.setattr(fitting, "_peak", peak)
    assert largest_batch(job_of(FakeBackbone(), tmp_path, images=100)).size == wanted
    assert tried == [size for size in SIZES if size <= wanted]


def test_smaller_sizes_are_even_parts():
    for size in range(1, 300):
        found = smaller_sizes(size)
        assert found == sorted(set(found)) and all(size % s == 0 and s < size for s in found)
        assert (1 in found) == (size > 1)
        assert size % 2 or size // 2 in found


def test_running_out_of_memory_names_the_size_that_fits_and_the_run_goes_on(tmp_path):
    whole = SETTINGS | {"batch_size": 8, "shard_rows": 8, "draws": 1}
    backbone = SmallBackbone(3, after=3)
    with pytest.raises(
        ValueError, match=r"batch_size 8 goes beyond .*: 2 fits; .*resume with"
    ) as no:
        extract(memory_dataset(20), backbone, tmp_path / "a", **whole)
    assert "\n" not in str(no.value) and "--" not in str(no.value)
    kept = tmp_path / "a/deep-t25-empty-d0/shard-00000.safetensors"
    made = kept.stat().st_mtime_ns
    smaller = whole | {"batch_size": 2}
    extract(memory_dataset(20), SmallBackbone(3), tmp_path / "a", resume=True, **smaller)
    assert kept.stat().st_mtime_ns == made
    extract(memory_dataset(20), FakeBackbone(), tmp_path / "b", **whole)
    for folder in sorted(path.name for path in (tmp_path / "b").iterdir()):
        a, b = (ActivationStore.open(tmp_path / run / folder) for run in "ab")
        assert list(a.ids) == list(b.ids) and torch.allclose(a.tensor(), b.tensor(), atol=1e-6)


def test_only_an_unfinished_store_goes_on_in_smaller_batches_and_never_in_larger(tmp_path):
    backbone = SmallBackbone(3, after=3)
    settings = SETTINGS | {"batch_size": 8, "shard_rows": 8, "draws": 1}
    with pytest.raises(ValueError, match="goes beyond"):
        extract(memory_dataset(20), backbone, tmp_path, **settings)
    for size in (16, 3, 5):
        with pytest.raises(ValueError, match=r"`(batch_size|shard_images)` 8, not"):
            extract(
                memory_dataset(20), FakeBackbone(), tmp_path, resume=True,
                **settings | {"batch_size": size, "shard_rows": 8},
            )  # fmt: skip
    extract(memory_dataset(20), FakeBackbone(), tmp_path, resume=True, **settings)
    with pytest.raises(ValueError, match="`batch_size` 8, not 4"):
        extract(
            memory_dataset(20), FakeBackbone(), tmp_path, resume=True,
            **settings | {"batch_size": 4},
        )  # fmt: skip


def test_the_message_says_which_shards_to_keep(tmp_path, monkeypatch):
    monkeypatch.setattr("revelio.activations.extraction_plan.SHARD_IMAGES", 100)
    backbone = SmallBackbone(25)
    with pytest.raises(ValueError, match="resume with batch_size 20 and shard_rows 80") as said:
        estimate(job_of(backbone, tmp_path, batch_size=40, images=200))
    assert "40 goes beyond" in str(said.value)
    with pytest.raises(ValueError, match="not even one image fits"):
        estimate(job_of(SmallBackbone(0), tmp_path))


def test_memory_is_named_where_it_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "largest_batch", lambda *_: Fit(8, GIB, 10 * GIB))
    said = str(fitting.too_large(job_of(FakeBackbone(), tmp_path, batch_size=16), None))
    assert (
        "batch_size 16 goes beyond the device's memory (about 17.2 GB; 10.7 GB free): 8 fits"
        in said
    )


def test_auto_goes_on_with_even_parts_of_a_begun_store(tmp_path):
    begun = job_of(FakeBackbone(), tmp_path, batch_size=12, shard_rows=24)
    begun.begin()
    settings = json.loads((begun.stores[0] / "unfinished.json").read_text())
    assert settings["batch_size"] == 12
    (begun.stores[0] / "shard-00009.safetensors").touch()  # something was written
    for limit, size in ((100, 12), (7, 6), (5, 3), (2, 1)):
        job = fitted(job_of(SmallBackbone(limit), tmp_path, resume=True))
        assert (job.batch_size, job.shard_images) == (size, 24)
    fresh = fitted(job_of(SmallBackbone(7), tmp_path / "new"))
    assert fresh.batch_size == 4


def test_every_process_takes_the_main_ones_size(tmp_path):
    # It sees no store that was begun: the main one has taken it up meanwhile.
    said = iter([4, 24])
    second = Processes(rank=1, world=2, agree=lambda number: next(said) if number == 0 else 99)
    job = fitted(job_of(SmallBackbone(100), tmp_path, processes=second))
    assert (job.batch_size, job.shard_images) == (4, 24)


def test_auto_on_a_cpu_is_sixteen_and_reads_in_its_own_process(tmp_path):
    model = tiny_dinov2(tmp_path / "model")
    config = ExtractRunConfig(
        out=tmp_path, layers=("block1",), timesteps=(), batch_size="auto",
        backbone=BackboneConfig(name=str(model), device="cpu"),
    )  # fmt: skip
    job = command.open_plan(config, Processes())
    assert (job.batch_size, job.workers) == (16, 0)
    assert 1 <= command._workers(True) <= 16 and command._workers(False) == 0
    assert command.open_plan(replace(config, workers=3), Processes()).workers == 3


FAMILIES = {
    "sd": (tiny_sd, ["bottleneck", "up_ft1"], 25, 6),
    "dit": (tiny_dit, ["block1", "block2"], 25, 4),
    "dinov2": (tiny_dinov2, ["block0", "block1"], None, 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_backbone_gives_the_same_grids(tmp_path, monkeypatch, family):
    """With a compiler that only counts: which functions are compiled, and that the hooks still see."""
    build, layers, timestep, least = FAMILIES[family]
    backbone = load_backbone(str(build(tmp_path / "model")), layers=layers, device="cpu")
    pixels = torch.stack([backbone.transform(picture(i)) for i in range(2)])
    ran = []

    def compiled(function, **settings):
        assert settings == {"dynamic": False}
        return lambda *given, **named: (ran.append(function), function(*given, **named))[1]

    def grids():
        return backbone.activations(backbone.encode(pixels), ["a", "b"], layers, timestep=timestep)

    wanted = grids()
    monkeypatch.setattr(torch, "compile", compiled)
    compile_backbone(backbone)
    found = grids()
    assert len(ran) >= least
    for layer in layers:
        assert torch.equal(found[layer], wanted[layer])


def test_what_cannot_be_compiled_is_said():
    with pytest.raises(ValueError, match="fake has no parts that can be compiled"):
        compile_backbone(FakeBackbone())


def test_a_store_says_that_it_was_compiled(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("revelio.pipelines.extract.compile_backbone", calls.append)
    options = BackboneConfig(name=str(tiny_sd(tmp_path / "model")), device="cpu")
    plain = ExtractRunConfig(out=tmp_path / "out", backbone=options)
    for compile in (False, True):
        job = command.open_plan(replace(plain, compile=compile), Processes())
        settings = next(iter(job.targets.values())).settings
        assert settings["compile"] == (True if compile else None)
    assert len(calls) == 1
    # A store of before has no such field: it goes on uncompiled only.
    job.begin()
    for store in job.stores:
        path = store / "unfinished.json"
        was = json.loads(path.read_text())
        path.write_text(json.dumps({key: was[key] for key in was if key != "compile"}))
        (store / "shard-00000.safetensors").touch()
    replace(command.open_plan(plain, Processes()), resume=True).check()
    with pytest.raises(ValueError, match="`compile` None, not True"):
        replace(job, resume=True).check()


@pytest.mark.parametrize(("compiled", "cuda"), [(False, False), (True, False), (False, True)])
def test_the_plan_does_not_count_compiling_or_loading(monkeypatch, compiled, cuda):
    """A clock that the calls move: the first of each size takes 100 s more where sizes are compiled."""
    now, seen = [0.0], set()

    def call(images):
        first = images not in seen if compiled else not seen
        now[0] += 0.1 * images + (100 if first else 0)
        seen.add(images)

    monkeypatch.setattr("revelio.activations.cost.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    found = seconds_per_image(call, 8, compiled=compiled)
    assert found == pytest.approx(0.1 if compiled or cuda else 100.1)
