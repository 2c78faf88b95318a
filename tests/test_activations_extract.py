"""Extraction against a plain loop, and its promises: rows against labels, settings, latents, plans."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from activations_helpers import SETTINGS, FakeBackbone, memory_dataset
from files_helpers import contents

from revelio.activations.config import ExtractConfig
from revelio.activations.cost import estimate
from revelio.activations.extract import extract, run
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.store import ActivationStore
from revelio.data.dataset import ImageError
from revelio.distributed import Processes


def alone(dataset, index, layer, timestep, draw=0, seed=3):
    """The grid of one image, by itself."""
    fake = FakeBackbone()
    encoded = fake.encode(fake.transform(dataset.read(index))[None])
    names = [dataset.ids[index]]
    return fake.activations(encoded, names, [layer], timestep=timestep, seed=seed, draw=draw)[
        layer
    ][0]


def test_rows_are_those_of_a_plain_loop(tmp_path):
    dataset, fake = memory_dataset(11), FakeBackbone()
    paths = extract(dataset, fake, tmp_path, **SETTINGS)
    names = [
        f"{layer}-t{t}-empty-d{draw}"
        for t in (25, 200)
        for draw in (0, 1)
        for layer in ("deep", "wide")
    ]
    assert [path.name for path in paths] == names
    for name in names:
        layer, t, _, draw = name.split("-")
        store = ActivationStore.open(tmp_path / name)
        wanted = [
            alone(dataset, i, layer, int(t[1:]), int(draw[1:])).double().mean(dim=(1, 2))
            for i in range(11)
        ]
        assert torch.allclose(store.tensor().double(), torch.stack(wanted), atol=1e-6)
        assert store.ids == dataset.ids and store.labels.tolist() == list(dataset.labels)
        assert store.classes == ("a", "b", "c")
        assert [shard["rows"] for shard in store.manifest["shards"]] == [4, 4, 3]


def test_each_image_is_encoded_once_and_a_pass_yields_all_layers(tmp_path):
    fake = FakeBackbone()
    extract(memory_dataset(11), fake, tmp_path, **SETTINGS)
    assert fake.encoded == 11
    for timestep in (25, 200):
        for draw in (0, 1):
            ids = [ids for t, d, ids in fake.passes if (t, d) == (timestep, draw)]
            assert [len(part) for part in ids] == [2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("pool", "side"), [("none", {"deep": 4, "wide": 8}), (4, {"deep": 4, "wide": 4})]
)
def test_grids_whole_or_pooled_to_a_side(tmp_path, pool, side):
    dataset = memory_dataset(3)
    extract(dataset, FakeBackbone(), tmp_path, **SETTINGS | {"pool": pool, "draws": 1})
    for layer in ("deep", "wide"):
        store = ActivationStore.open(tmp_path / f"{layer}-t25-empty-d0")
        grid = torch.stack([alone(dataset, i, layer, 25) for i in range(3)])
        blocks = grid.shape[-1] // side[layer]
        wanted = torch.zeros(3, grid.shape[1], side[layer], side[layer])
        for y in range(side[layer]):
            for x in range(side[layer]):
                block = grid[..., y * blocks : (y + 1) * blocks, x * blocks : (x + 1) * blocks]
                wanted[..., y, x] = block.mean(dim=(2, 3))
        assert torch.allclose(store.tensor(), wanted, atol=1e-6)


def test_draws_are_averaged(tmp_path):
    dataset = memory_dataset(3)
    extract(dataset, FakeBackbone(), tmp_path, **SETTINGS | {"draws": 3, "average_draws": True})
    store = ActivationStore.open(tmp_path / "deep-t25-empty-d0-2")
    wanted = torch.stack(
        [
            torch.stack([alone(dataset, i, "deep", 25, draw) for draw in range(3)])
            .mean(dim=0)
            .mean(dim=(1, 2))
            for i in range(3)
        ]
    )
    assert torch.allclose(store.tensor(), wanted, atol=1e-6)
    assert store.manifest["draw"] == [0, 1, 2] and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_dtype(tmp_path, dtype):
    one, other = memory_dataset(3), FakeBackbone()
    extract(one, other, tmp_path / "32", layers=("deep",), timesteps=(25,))
    extract(one, other, tmp_path / "16", layers=("deep",), timesteps=(25,), store_dtype=dtype)
    full = ActivationStore.open(tmp_path / "32" / "deep-t25-empty-d0").tensor()
    half = ActivationStore.open(tmp_path / "16" / "deep-t25-empty-d0")
    assert torch.equal(half.rows(0, 3), full.to(getattr(torch, dtype)))
    assert half.manifest["dtype"] == dtype


def test_activations_that_overflow_are_refused(tmp_path):
    fake = FakeBackbone()
    fake.weights["deep"] = fake.weights["deep"] * 1e6
    with pytest.raises(ValueError, match="deep-t25-empty-d0 are not finite in float16"):
        extract(
            memory_dataset(3),
            fake,
            tmp_path,
            layers=("deep",),
            timesteps=(25,),
            store_dtype="float16",
        )


def test_prompts_go_with_their_images(tmp_path):
    dataset, fake = memory_dataset(5), FakeBackbone()
    texts = {
        "from_clip": lambda indices: ["x" * index for index in indices],
        "fixed:A cat.": lambda indices: ["A cat."] * len(indices),
    }
    paths = extract(
        dataset, fake, tmp_path, layers=("wide",), timesteps=(25,),
        prompts=("empty", "from_clip", "fixed:A cat."), texts=texts, batch_size=2,
    )  # fmt: skip
    assert paths[1].name == "wide-t25-from_clip-d0"
    assert paths[2].name.startswith("wide-t25-fixed_a_cat-")
    empty, clip, cat = (ActivationStore.open(path).tensor() for path in paths)
    weight = fake.weights["wide"].sum(dim=(1, 2, 3))
    shift = torch.arange(5.0)[:, None] * weight
    assert torch.allclose(clip - empty, shift, atol=1e-4)
    assert torch.allclose(cat - empty, 6 * weight.expand(5, -1), atol=1e-4)
    assert ActivationStore.open(paths[2]).manifest["prompt_policy"] == "fixed:A cat."


def test_a_model_without_noise(tmp_path):
    paths = extract(memory_dataset(3), FakeBackbone(), tmp_path, layers=("deep",))
    manifest = ActivationStore.open(paths[0]).manifest
    assert paths[0].name == "deep"
    assert [manifest[key] for key in ("timestep", "prompt_policy", "seed", "draw")] == [None] * 4


@pytest.mark.parametrize("broken", [(3,), (0, 1), (4, 5, 6, 7), (10,)])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_shift_no_row_against_its_label(tmp_path, broken, workers):
    dataset = memory_dataset(11, broken=broken)
    extract(
        dataset, FakeBackbone(), tmp_path, on_error="skip", workers=workers,
        **SETTINGS | {"timesteps": (25,), "draws": 1},
    )  # fmt: skip
    store = ActivationStore.open(tmp_path / "deep-t25-empty-d0")
    kept = [i for i in range(11) if i not in broken]
    assert store.ids == [dataset.ids[i] for i in kept]
    assert store.labels.tolist() == [dataset.labels[i] for i in kept]
    wanted = torch.stack([alone(dataset, i, "deep", 25).mean(dim=(1, 2)) for i in kept])
    assert torch.allclose(store.tensor(), wanted, atol=1e-6)
    assert store.manifest["skipped"] == [[dataset.ids[i], "it is cut off"] for i in broken]


def test_an_unreadable_image_stops_by_name_and_whole_shards_stay(tmp_path):
    settings = SETTINGS | {"timesteps": (25,), "draws": 1}
    broken = memory_dataset(11, broken=(6,))
    with pytest.raises(ImageError, match=r"class 0/006.png"):
        extract(broken, FakeBackbone(), tmp_path / "a", **settings)
    assert (tmp_path / "a/deep-t25-empty-d0/shard-00000.safetensors").exists()
    with pytest.raises(ValueError, match="not finished"):
        ActivationStore.open(tmp_path / "a/deep-t25-empty-d0")
    extract(broken, FakeBackbone(), tmp_path / "a", resume=True, on_error="skip", **settings)
    extract(broken, FakeBackbone(), tmp_path / "b", on_error="skip", **settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_cached_latents_need_no_image_and_give_the_same_bytes(tmp_path):
    dataset, cache = memory_dataset(11), tmp_path / "z0"
    extract(dataset, FakeBackbone(), tmp_path / "a", vae_cache=cache, **SETTINGS)
    extract(dataset, FakeBackbone(), tmp_path / "b", **SETTINGS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    store = ActivationStore.open(cache)
    assert store.manifest["kind"] == "latents" and store.manifest["dtype"] == "float16"
    assert store.row_shape == (3, 8, 8) and store.ids == dataset.ids
    unreadable = replace(memory_dataset(11, broken=range(11)), name=dataset.name)
    later = SETTINGS | {"timesteps": (500,)}
    cached = FakeBackbone()
    # Other shards than the cache's.
    extract(unreadable, cached, tmp_path / "c", vae_cache=cache, **later | {"shard_rows": 6})
    extract(dataset, FakeBackbone(), tmp_path / "d", **later | {"shard_rows": 6})
    assert cached.encoded == 1  # the probe
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def test_cached_latents_of_skipped_images(tmp_path):
    dataset, cache = memory_dataset(11, broken=(2, 4, 5)), tmp_path / "z0"
    settings = SETTINGS | {"on_error": "skip"}
    extract(dataset, FakeBackbone(), tmp_path / "a", vae_cache=cache, **settings)
    extract(dataset, FakeBackbone(), tmp_path / "b", vae_cache=cache, **settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(ValueError, match=r"made without image class 2/002.png"):
        extract(dataset, FakeBackbone(), tmp_path / "c", vae_cache=cache, **SETTINGS)


def test_latents_of_another_encoder_or_other_images_are_refused(tmp_path):
    cache = tmp_path / "z0"
    extract(memory_dataset(5), FakeBackbone(), tmp_path / "a", vae_cache=cache, **SETTINGS)
    with pytest.raises(ValueError, match=r"another encoder .* choose another folder"):
        extract(
            memory_dataset(5),
            FakeBackbone(encoder=1.5),
            tmp_path / "b",
            vae_cache=cache,
            **SETTINGS,
        )
    with pytest.raises(ValueError, match=r"`images` 5, not 6: .* choose another folder"):
        extract(memory_dataset(6), FakeBackbone(), tmp_path / "b", vae_cache=cache, **SETTINGS)
    with pytest.raises(ValueError, match="`compute_dtype`"):
        extract(
            memory_dataset(5), FakeBackbone(), tmp_path / "b", vae_cache=cache,
            provenance={"compute_dtype": "bfloat16"}, **SETTINGS,
        )  # fmt: skip
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_shards(tmp_path, world):
    """Each process by itself, the main one last: what torchrun does, without its clock."""
    dataset = memory_dataset(11)
    config = ExtractConfig(
        layers=("deep", "wide"), timesteps=(25,), seed=3, batch_size=2, shard_rows=2
    )

    def job(rank, out):
        return ExtractionPlan(
            dataset, FakeBackbone(), out, config,
            processes=Processes(rank, world if out.name == "many" else 1),
        )  # fmt: skip

    main = job(0, tmp_path / "many")
    main.begin()
    for rank in range(1, world):
        assert sum(1 for _ in run(job(rank, tmp_path / "many"))) > 0
    for _ in run(replace(main, resume=True)):
        pass
    for _ in run(job(0, tmp_path / "one")):
        pass
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "layers=.*: give one or more"),
        ({"layers": ("deep", "deep")}, "layers has an entry twice: deep, deep"),
        ({"draws": 0}, "draws=0: give 1 or more"),
        ({"pool": "max"}, "pool='max': choose from mean, none"),
        ({"pool": 0}, "pool=0: give 1 or more"),
        ({"pool": True}, "pool=True: choose from mean, none"),
        ({"store_dtype": "int8"}, "store_dtype='int8': choose from float32, float16, bfloat16"),
        ({"timesteps": ()}, "draws and prompts need timesteps"),
        ({"timesteps": (1000,)}, "timestep 1000 is outside"),
        ({"prompts": ("generic",)}, "without its texts"),
        ({"batch_size": 0}, "batch_size=0: give 1 or more"),
        ({"timesteps": (), "draws": 1, "vae_cache": Path("z0")}, "vae_cache needs timesteps"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        extract(memory_dataset(3), FakeBackbone(), tmp_path / "o", **SETTINGS | change)
    # A mistake leaves nothing that would stand in the way of the corrected run.
    extract(memory_dataset(3), FakeBackbone(), tmp_path / "o", **SETTINGS)


def test_unknown_layers_and_no_images_are_refused(tmp_path):
    with pytest.raises(KeyError, match="unknown layer 'shallow' of fake: it has deep, wide"):
        extract(memory_dataset(3), FakeBackbone(), tmp_path, **SETTINGS | {"layers": ("shallow",)})
    with pytest.raises(ValueError, match="memory has no images"):
        extract(memory_dataset(0), FakeBackbone(), tmp_path, **SETTINGS)


def test_plan_counts_what_is_left_and_writes_nothing(tmp_path):
    def job(out, vae_cache=None, resume=False, timesteps=(25, 200)):
        config = ExtractConfig(
            layers=("deep", "wide"), timesteps=timesteps, draws=2, batch_size=2, shard_rows=4,
            vae_cache=vae_cache,
        )  # fmt: skip
        return ExtractionPlan(memory_dataset(11), FakeBackbone(), out, config, resume=resume)

    first = estimate(job(tmp_path / "a", tmp_path / "z0"))
    assert not list(tmp_path.iterdir())
    assert (first.images, first.encoded, first.passes, first.stores) == (11, 11, 44, 8)
    rows = 11 * 4 * (6 + 4) * 4
    assert first.bytes_left == rows + 11 * 3 * 8 * 8 * 2
    assert first.seconds == pytest.approx(11 * first.encode_seconds + 44 * first.pass_seconds)
    assert first.encode_seconds > 0 and first.pass_seconds > 0
    assert "11 images (11 to encode), 4 passes each" in first.line()
    for _ in run(job(tmp_path / "a", tmp_path / "z0")):
        pass
    after = estimate(job(tmp_path / "a", tmp_path / "z0", resume=True))
    assert after.line() == "plan: nothing left to do for 8 stores"
    cached = estimate(job(tmp_path / "b", tmp_path / "z0"))
    assert (cached.images, cached.encoded, cached.encode_seconds) == (11, 0, 0.0)
    assert cached.pass_seconds > 0


def test_plan_is_of_the_process_with_the_most_shards(tmp_path):
    """Shards of 4, 4 and 3 images: the first of two processes has seven images, the fourth of four none."""

    def cost(world, cache=None):
        config = ExtractConfig(
            layers=("deep",), timesteps=(25, 200), batch_size=2, shard_rows=4, vae_cache=cache
        )
        shared = Processes(world=world)
        return estimate(
            ExtractionPlan(memory_dataset(11), FakeBackbone(), tmp_path, config, processes=shared)
        )

    two, four = cost(2), cost(4)
    assert two.loads == ((7, 14), (4, 8)) and (two.encoded, two.passes) == (11, 22)
    assert two.seconds == pytest.approx(7 * two.encode_seconds + 14 * two.pass_seconds)
    assert "in 2 processes: " in two.line()
    assert four.loads == ((4, 8), (4, 8), (3, 6), (0, 0))
    assert "in 4 processes (1 of them without a shard: lower shard_rows): " in four.line()


def test_plan_says_that_the_disk_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=71))
    config = ExtractConfig(layers=("deep",))
    job = ExtractionPlan(memory_dataset(3), FakeBackbone(), tmp_path, config)
    assert "take 0.1 kB, but 0.1 kB are free at" in (estimate(job).shortage(tmp_path) or "")


def test_shards_are_small_enough_for_memory(tmp_path):
    def images(pool, layers=("deep", "wide"), batch_size=16):
        config = ExtractConfig(layers=layers, timesteps=(25, 200), pool=pool, batch_size=batch_size)
        return ExtractionPlan(memory_dataset(3), FakeBackbone(), tmp_path, config).shard_images

    assert images("mean") == 1024
    assert images("mean", batch_size=24) == 1008
    assert images("mean", batch_size=5000) == 5000


def test_manifest_says_what_made_the_store(tmp_path):
    extract(
        memory_dataset(3, labelled=False), FakeBackbone(), tmp_path,
        provenance={"mode": "fixed", "revision": "abc"}, **SETTINGS,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "wide-t200-empty-d1/manifest.json").read_text())
    wanted = {
        "format": 1, "kind": "activations", "model": "fake", "revision": "abc", "layer": "wide",
        "timestep": 200, "prompt_policy": "empty", "pool": "mean", "dtype": "float32",
        "image_size": [16, 16], "seed": 3, "draw": 1, "mode": "fixed", "dataset": "memory",
        "split": None, "classes": [], "labelled": False, "skipped": [], "rows": 3, "images": 3,
        "stride": 2, "batch_size": 2, "shard_images": 4, "row_shape": [4],
    }  # fmt: skip
    assert {key: manifest[key] for key in wanted} == wanted
    assert str(tmp_path) not in json.dumps(manifest)
