"""``revelio extract`` on a tiny Stable Diffusion: files, resume, processes, what it says."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from activations_helpers import FakeBackbone, memory_dataset, picture
from backbones_helpers import tiny_dinov2, tiny_sd
from command_helpers import fails
from files_helpers import contents
from process_helpers import REVELIO, in_processes

from revelio.activations.config import ExtractRunConfig
from revelio.activations.cost import seconds_per_image
from revelio.activations.store import ActivationStore
from revelio.backbones.config import BackboneConfig
from revelio.backbones.random_init import load_random_backbone
from revelio.backbones.registry import load_backbone
from revelio.cli import main
from revelio.cli.extract import Config, _next
from revelio.config import load_config
from revelio.data.config import DataConfig
from revelio.data.loading import batches
from revelio.distributed import Processes
from revelio.pipelines import Progress
from revelio.pipelines import extract as command
from revelio.pipelines.extract import extract_to, open_plan, plan_extraction
from revelio.sae.config import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index in range(10):
        path = folder / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        picture(index).resize((40, 36)).save(path)
    return folder


def arguments(model, photos, out, *more):
    return [
        "extract", "--out", str(out), "--backbone.name", str(model), "--data.source", str(photos),
        "--layers", "bottleneck", "up_ft1", "--timesteps", "25", "--batch-size", "2",
        "--shard-rows", "4", "--backbone.device", "cpu", *more,
    ]  # fmt: skip


def test_rows_equal_the_backbones_own_grids(model, photos, tmp_path, capsys):
    main(arguments(model, photos, tmp_path / "run", "--vae-cache", str(tmp_path / "z0")))
    said, bars = capsys.readouterr()
    assert "reading 10 pictures: 100%" in bars
    assert said.startswith("plan: 10 images (10 to encode), 1 pass each, at ")
    assert "up_ft1-t25-empty-d0  10 rows of 16 float32" in said and "3 stores in" in said
    backbone = load_backbone(str(model), layers=["up_ft1"], device="cpu")
    store = ActivationStore.open(tmp_path / "run" / "up_ft1-t25-empty-d0")
    assert len(store) == 10 and store.classes == ("cat", "dog")
    for row, name in enumerate(store.ids):
        index = int(Path(name).stem)
        pixels = backbone.transform(picture(index).resize((40, 36)))[None]
        grid = backbone.activations(backbone.encode(pixels), [name], ["up_ft1"], timestep=25)[
            "up_ft1"
        ]
        wanted = grid.float().mean(dim=(2, 3))[0]
        assert torch.allclose(store.tensor()[row], wanted, atol=1e-5)
        assert store.labels[row] == index % 2
    assert load_config(Config, tmp_path / "run" / "config.yaml").layers == ("bottleneck", "up_ft1")


def test_the_pipeline_returns_the_stores_and_prints_nothing(model, photos, tmp_path, capsys):
    config = ExtractRunConfig(
        out=tmp_path / "run", layers=("up_ft1",), timesteps=(25, 200), batch_size=4, workers=0,
        data=DataConfig(source=str(photos)), backbone=BackboneConfig(name=str(model), device="cpu"),
    )  # fmt: skip
    said: list[Progress] = []
    assert plan_extraction(config, said.append).stores == 2 and not config.out.exists()
    stores = extract_to(config, said.append)
    assert [store.path.name for store in stores] == ["up_ft1-t25-empty-d0", "up_ft1-t200-empty-d0"]
    assert [len(store) for store in stores] == [10, 10]
    batches = [step for step in said if step.numbers == () and step.unit == "image" and step.total]
    assert batches[-1].done == batches[-1].total == 10
    assert any(step.message.startswith("plan: 10 images") for step in said)
    captured = capsys.readouterr()
    assert captured.out == "" and "images" not in captured.err
    # What is there is taken; a further timestep alone is left to make.
    more = replace(config, timesteps=(25, 200, 300), resume=True)
    left = plan_extraction(more)
    assert (left.stores, left.passes, left.bytes_left) == (3, 10, 10 * 16 * 4)


def test_a_plan_says_that_it_measures_before_it_does(model, photos, tmp_path, capsys, monkeypatch):
    """One image at a large size takes minutes, in which nothing was said."""
    seen: list[str] = []

    def watched(*given, **named):
        seen.append(capsys.readouterr().err)
        return seconds_per_image(*given, **named)

    monkeypatch.setattr("revelio.activations.cost.seconds_per_image", watched)
    main(arguments(model, photos, tmp_path / "run", "--plan"))
    assert "measuring the first images:   0%" in seen[0]
    assert "2/2" in capsys.readouterr().err


def test_random_weights_are_the_baselines_and_said(model, photos, tmp_path):
    config = ExtractRunConfig(
        out=tmp_path / "run", layers=("up_ft1",), batch_size=4, workers=0, random_weights=3,
        data=DataConfig(source=str(photos)), backbone=BackboneConfig(name=str(model), device="cpu"),
    )  # fmt: skip
    [store] = extract_to(config)
    assert store.manifest["model"].endswith("(random weights 3)")
    backbone = load_random_backbone(str(model), 3, layers=["up_ft1"], device="cpu")
    pixels = backbone.transform(picture(0).resize((40, 36)))[None]
    grid = backbone.activations(backbone.encode(pixels), [store.ids[0]], ["up_ft1"], timestep=25)[
        "up_ft1"
    ]
    assert Path(store.ids[0]).stem.lstrip("0") in ("", "0")
    torch.testing.assert_close(store.tensor()[0], grid.mean(dim=(2, 3))[0], atol=1e-5, rtol=1e-4)


def test_the_cache_of_latents_has_its_new_name(model, photos, tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(f"out: {tmp_path / 'run'}\nlatents: z0\n")
    for words, line in (
        (("--latents", "z0"), "--latents is called --vae-cache now"),
        (("--latents=z0",), "--latents is called --vae-cache now"),
        (("--config", str(tmp_path / "old.yaml")), "`latents` is called `vae_cache` now"),
    ):
        assert line in fails(capsys, *arguments(model, photos, tmp_path / "run", *words))


def test_no_more_readers_than_batches(monkeypatch):
    asked = []

    class Loader:
        def __init__(self, source, num_workers, **_):
            asked.append(num_workers)
            self.source = source

        def __iter__(self):
            return (self.source[number] for number in range(len(self.source)))

    monkeypatch.setattr("revelio.data.loading.DataLoader", Loader)
    for images, size in ((7, 16), (33, 16), (160, 1)):
        read = batches(memory_dataset(images), FakeBackbone().transform, size, workers=100)
        assert sum(map(len, read)) == images
    assert asked == [1, 3, 100]


def test_plan_writes_nothing(model, photos, tmp_path, capsys):
    main(arguments(model, photos, tmp_path / "run", "--plan"))
    assert "plan: 10 images" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_mistakes_are_one_line(model, photos, tmp_path, capsys):
    main(arguments(model, photos, tmp_path / "run"))
    before = contents(tmp_path / "run")
    for more, message in (
        ((), "already holds a store: go on with resume, or choose another folder"),
        (("--resume", "--seed", "1"), "was made with `seed` 0, not 1"),
        (("--layers", "up_ft9"), "up_ft9"),
        (("--timesteps", "1000"), "timestep 1000 is outside"),
        (("--prompts", "nice"), "unknown prompt policy 'nice'"),
        (("--pool", "0"), "pool is 0"),
        (("--data.source", str(tmp_path / "absent")), "absent"),
    ):
        out = tmp_path / ("run" if not more or more[0] == "--resume" else "other")
        assert message in fails(capsys, *arguments(model, photos, out, *more))
    assert contents(tmp_path / "run") == before


def test_two_processes_give_the_bytes_of_one(model, photos, tmp_path):
    (photos / "cat" / "broken.png").write_bytes(b"no picture")
    more = ("--data.on-error", "skip", "--vae-cache", str(tmp_path / "z0"))
    try:
        words = arguments(model, photos, tmp_path / "two", *more)
        done = in_processes(2, REVELIO, *words)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("plan: ") == 1 and "in 2 processes" in done.stdout
        more = (*more[:3], str(tmp_path / "z1"))
        main(arguments(model, photos, tmp_path / "one", *more))
    finally:
        (photos / "cat" / "broken.png").unlink()
    two, one = contents(tmp_path / "two"), contents(tmp_path / "one")
    del two["config.yaml"], one["config.yaml"]
    assert len(one) == 8 and two == one
    assert contents(tmp_path / "z0") == contents(tmp_path / "z1")


def test_a_model_without_noise(photos, tmp_path, capsys):
    folder = tiny_dinov2(tmp_path / "tiny-dino")
    main(arguments(folder, photos, tmp_path / "run", "--layers", "block1", "--timesteps"))
    assert "run/block1  10 rows of 16 float32" in capsys.readouterr().out
    backbone = load_backbone(str(folder), layers=["block1"], device="cpu")
    store = ActivationStore.open(tmp_path / "run" / "block1")
    index = int(Path(store.ids[3]).stem)
    pixels = backbone.transform(picture(index).resize((40, 36)))[None]
    grid = backbone.activations(backbone.encode(pixels), store.ids[3:4], ["block1"])["block1"]
    assert torch.allclose(store.tensor()[3], grid.mean(dim=(2, 3))[0], atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("make", [plan_extraction, extract_to])
def test_processes_measure_together(make, rank, model, photos, tmp_path, monkeypatch):
    """All, each after the others have opened the model; no store is begun before all are done."""
    events, real = [], command.estimate

    def wait():
        events.append("wait")
        if events[-2:] == ["measured", "wait"]:
            raise InterruptedError

    def measured(*arguments):
        found = real(*arguments)
        events.append("measured")
        return found

    shared = Processes(rank=rank, world=2, wait=wait)
    monkeypatch.setattr(command, "launched", lambda device: shared)
    monkeypatch.setattr(command, "estimate", measured)
    config = Config(
        out=tmp_path / "out",
        layers=("up_ft1",),
        timesteps=(25,),
        data=DataConfig(source=str(photos)),
        backbone=BackboneConfig(name=str(model), device="cpu"),
    )
    with pytest.raises(InterruptedError):
        make(config)
    assert events == ["wait", "measured", "wait"] and not config.out.exists()


def test_matched_timesteps_texts_and_mode(model, photos, tmp_path):
    config = Config(
        out=tmp_path,
        timesteps=(43,),
        match_snr="linear",
        prompts=("empty", "fixed:A dog", "generic"),
        mode="as_code",
        data=DataConfig(source=str(photos)),
        backbone=BackboneConfig(name=str(model), device="cpu"),
    )
    job = open_plan(config, Processes())
    # SPEC 2.8: the linear schedule's 43 has the noise of Stable Diffusion's 25.
    assert job.config.timesteps == (25,)
    assert job.texts["fixed:A dog"]([3, 1]) == ["A dog", "A dog"]
    assert set(job.texts) == {"fixed:A dog", "generic"}
    assert job.image_size == [256, 256]
    with pytest.raises(ValueError, match=r"has no noise schedule: leave match_snr out"):
        dino = BackboneConfig(name=str(tiny_dinov2(tmp_path / "dino")), device="cpu")
        open_plan(replace(config, backbone=dino, layers=("block1",), mode="fixed"), Processes())


@pytest.mark.parametrize("path", sorted((ROOT / "configs/extract").glob("*.yaml")), ids=str)
def test_shipped_configs_load(path):
    config = load_config(Config, path)
    assert config.layers and config.mode == "fixed"


@pytest.mark.parametrize(
    ("images", "shape", "pool", "expected"),
    [
        (
            9600,
            (128,),
            "none",
            "--rows cells --batch-size 512 --epochs 59 --warmup-steps 100 --out",
        ),
        (300_000, (128,), "none", None),
        (
            600,
            (128, 8, 8),
            "none",
            "--rows cells --batch-size 512 --epochs 50 --warmup-steps 100 --out",
        ),
        (9600, (128, 8, 8), "none", None),
        (
            540,
            (64,),
            "mean",
            "--batch-size 256 --epochs 500 --warmup-steps 100 --expansion 7 --out",
        ),
        (30_000, (64,), "mean", "--batch-size 256 --epochs 50 --warmup-steps 100 --out"),
        (40_000, (64,), "mean", None),
    ],
)
def test_few_rows_lead_to_fifty_epochs_or_a_thousand_steps_and_a_short_warm_up(
    images: int, shape: tuple[int, ...], pool: str, expected: str | None
) -> None:
    class Store:
        path, row_shape, labels = Path("runs/a/up_ft1"), shape, None

        def __len__(self) -> int:
            return images

    line, *_ = _next(Config(out=Path("runs/a"), pool=pool), Store())  # type: ignore[arg-type]
    # The full budget goes 300 times and more over so few rows, for hours on a CPU.
    if expected is None:
        assert "--epochs" not in line and "--warmup-steps" not in line
        return
    assert f"up_ft1 {expected} " in line
    words = dict(zip(line.split()[::2], line.split()[1::2], strict=False)) | dict(
        zip(line.split()[1::2], line.split()[2::2], strict=False)
    )
    rows = images * prod(shape[1:])
    train = TrainConfig(epochs=float(words["--epochs"]), batch_size=int(words["--batch-size"]))
    steps = train.for_rows(rows - rows // 10).steps
    assert steps >= 1000 and steps >= 10 * int(words["--warmup-steps"])
    assert int(words.get("--expansion", 64)) * shape[0] <= rows - rows // 10
