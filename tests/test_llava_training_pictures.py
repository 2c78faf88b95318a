"""What a stage sees of pictures: live, from the tower cache, in any number format; bad records."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones_helpers import picture
from llava_train_helpers import (
    data_options,
    losses,
    pretrain,
    record,
    tiny_project,
    write_config,
    write_data,
)
from transformers import AutoProcessor

from llava_ext.cli import main
from llava_ext.config import (
    CacheConfig,
    ConversationData,
    ModelConfig,
)
from llava_ext.generate import Assistant
from llava_ext.images import image_id, open_picture
from llava_ext.model import LlavaModel
from llava_ext.run import open_job, run
from llava_ext.tower_cache_job import fill, open_cache_job
from llava_ext.towers import BackboneTower, load_towers
from llava_ext.training import (
    build_trainer,
    training_arguments,
)
from revelio.distributed import Processes


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("llava")
    return folder, tiny_project(folder)


@pytest.fixture
def damaged(tmp_path) -> ConversationData:
    """Four records, the picture of the third cut off."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        picture(number).save(images / f"{number}.png")
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:200])
    return ConversationData(write_data(tmp_path / "d.json", [record(n) for n in range(4)]), images)


def test_damaged_pictures_are_bad_records(project, tmp_path, damaged) -> None:
    config = replace(pretrain(project, tmp_path / "run"), data=damaged)
    with pytest.raises(ValueError, match=r"record 2 \(id 'r2'\).*2\.png") as caught:
        run(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.warns(UserWarning, match="left out"):
        job = open_job(replace(config, bad_records="skip"), "pretrain")
    assert len(job.dataset) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_in_the_middle_is_one_line(
    project, tmp_path, damaged, workers
) -> None:
    """The same line whoever reads it: torch's own would hold the worker's traceback."""
    with pytest.raises(ValueError) as opened:
        open_picture(tmp_path / "images" / "2.png")
    stage = {"workers": workers, "save_steps": 1}
    live = pretrain(project, tmp_path / "live", data=damaged, check_pictures=False, stage=stage)
    good = write_data(tmp_path / "good.json", [record(n) for n in (0, 1, 3, 0)])
    validated = replace(
        live, out=tmp_path / "val", data=replace(damaged, json=good), validation_data=damaged.json
    )
    for config in (live, validated):
        with pytest.raises(ValueError) as caught:
            run(config)
        assert str(caught.value) == str(opened.value)
    cache = CacheConfig(
        cache=tmp_path / "cache", data=data_options(project[0]), model=project[1], workers=workers
    )
    job = replace(open_cache_job(cache, Processes()), folder=tmp_path / "images", names=["2.png"])
    with pytest.raises(ValueError) as caught:
        list(fill(job))
    assert str(caught.value) == str(opened.value)


def test_pictures_are_decoded_once_and_by_one_process(project, tmp_path, monkeypatch) -> None:
    decoded: list[str] = []

    def watched(path: Path) -> Any:
        decoded.append(path.name)
        return open_picture(path)

    monkeypatch.setattr("llava_ext.images.open_picture", watched)
    images = tmp_path / "images"
    shutil.copytree(project[0] / "images", images)
    data = ConversationData(write_data(tmp_path / "d.json", [record(n) for n in range(8)]), images)
    held_out = write_data(tmp_path / "held-out.json", [record(n) for n in range(8, 12)])
    config = pretrain(project, tmp_path / "run", data=data, validation_data=held_out)
    names = [f"{number}.png" for number in range(12)]
    monkeypatch.setattr("llava_ext.run._plan", stop_here)
    for again, wanted in ((False, names), (True, []), (True, ["9.png"])):
        decoded.clear()
        if wanted == ["9.png"]:
            os.utime(images / "9.png", (1, 1))
        with pytest.raises(KeyboardInterrupt):
            run(replace(config, resume=again))
        assert sorted(decoded) == sorted(wanted)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for bad, wanted in (("stop", []), ("skip", names)):  # all must know what is left out
        decoded.clear()
        open_job(replace(config, out=tmp_path / "other", bad_records=bad), "pretrain")
        assert sorted(decoded) == sorted(wanted)


def stop_here(*given: object, **named: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("number_format", ["float32", "bfloat16"])
def test_a_model_of_any_number_format_sees_the_towers_own_grids(
    project, tmp_path, monkeypatch, number_format
) -> None:
    """In training, from the cache, in answers, and from a processor under autocast."""
    _, model = project
    own = []
    for tower in load_towers(model, "cpu"):
        pixels = [tower.pixels(picture(number)) for number in range(16)]
        ids = [image_id(picture(number)) for number in range(16)]
        own.append(tower.grids(torch.stack(pixels), ids))
    seen: list[Any] = []
    embeddings = LlavaModel.image_embeddings

    def watched(self: LlavaModel, grids: Any) -> torch.Tensor:
        seen.append(grids)
        return embeddings(self, grids)

    def check(pictures: int) -> None:
        """Each grid is one of the towers' own, and all pictures are among them."""
        for column, known in zip(zip(*seen, strict=True), own, strict=True):
            grids = torch.cat(column)
            apart = (grids[:, None] - known).abs().amax(dim=(2, 3, 4))
            # Batches of other sizes round differently, by 1e-5; rounded pixels would be 1e-3 apart.
            assert grids.dtype == torch.float32 and apart.amin(dim=1).max() < 5e-5
            assert len(set(apart.argmin(dim=1).tolist())) == pictures
        seen.clear()

    monkeypatch.setattr(LlavaModel, "image_embeddings", watched)
    config = pretrain(project, tmp_path / "run", stage={"precision": number_format})
    config = replace(config, model=replace(model, dtype=number_format))
    run(config)
    check(16)
    cache = CacheConfig(
        cache=tmp_path / "cache", data=config.data, model=config.model, keep="latents"
    )
    for _ in fill(open_cache_job(cache, Processes())):
        pass
    run(replace(config, out=tmp_path / "cached", cache=cache.cache))
    check(16)
    final = tmp_path / "run" / "final"
    Assistant.load(final, device="cpu").answer(["what is it?"], [[picture(3)]], max_new_tokens=1)
    check(1)
    talk = [{"role": "user", "content": [{"type": "image", "image": picture(5)}]}]
    inputs = AutoProcessor.from_pretrained(final).apply_chat_template(talk, tokenize=True)
    with torch.autocast("cpu", torch.bfloat16):
        LlavaModel.from_pretrained(final)(**inputs)
    check(1)


def test_deepspeed_does_not_round_what_towers_see(project) -> None:
    config = pretrain(project, project[0] / "unused")
    job = open_job(config, "pretrain")
    trainer = build_trainer(
        job.model,
        job.dataset,
        job.collator,
        config.stage,
        training_arguments(config.stage, config.out),
        towers=job.towers,
    )
    batch = job.collator([job.dataset[0], job.dataset[1]])
    wanted = [
        tower.grids(each, batch["image_ids"])
        for tower, each in zip(job.towers, batch["pixels"], strict=True)
    ]
    # As with DeepSpeed in bfloat16.
    trainer.is_deepspeed_enabled = True
    dtypes = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=dtypes))  # type: ignore[assignment]
    found = trainer._prepare_inputs(batch)["grids"]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_cached_training_runs_no_tower_and_gives_the_same_curve(
    project, tmp_path, monkeypatch
) -> None:
    folder, model = project
    cache = CacheConfig(
        cache=tmp_path / "cache", data=data_options(folder), model=model, batch_size=3
    )
    for _ in fill(open_cache_job(cache, Processes())):
        pass
    run(pretrain(project, tmp_path / "live"))

    def refuse(*arguments: object) -> None:
        raise AssertionError("a tower ran")

    monkeypatch.setattr(BackboneTower, "grids", refuse)
    monkeypatch.setattr(BackboneTower, "pixels", refuse)
    run(pretrain(project, tmp_path / "cached", cache=tmp_path / "cache"))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=2e-3)


@pytest.mark.parametrize("keep", ["int8", "latents"])
def test_training_from_less_than_grids_needs_no_picture(project, tmp_path, keep) -> None:
    """From latents the losses are those of the pictures themselves."""
    folder, model = project
    cache = CacheConfig(cache=tmp_path / "cache", data=data_options(folder), model=model, keep=keep)
    for _ in fill(open_cache_job(cache, Processes())):
        pass
    run(pretrain(project, tmp_path / "live"))
    data = ConversationData(folder / "data.json", tmp_path / "gone")
    cached = pretrain(project, tmp_path / "cached", cache=tmp_path / "cache", data=data)
    run(cached)
    within = 1e-6 if keep == "latents" else 2e-2
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=within)


def test_the_command_line_trains_from_a_cache_without_pictures(project, tmp_path, capsys) -> None:
    """The folder is gone, empty, or holds some of them; those that are there are compared."""
    folder, model = project
    cache = CacheConfig(cache=tmp_path / "cache", data=data_options(folder), model=model)
    for _ in fill(open_cache_job(cache, Processes())):
        pass
    run(pretrain(project, tmp_path / "live", stage={"batch_size": 1, "precision": "float32"}))
    config = write_config(folder, model)
    words = ["pretrain", "--config", config, "--cache", tmp_path / "cache", "--data.images"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "some").mkdir()
    for number in range(3):
        shutil.copy(folder / "images" / f"{number}.png", tmp_path / "some")
    for name in ("gone", "empty", "some"):
        main([str(word) for word in (*words, tmp_path / name, "--out", tmp_path / f"of-{name}")])
        found = losses(tmp_path / f"of-{name}")
        assert found == pytest.approx(losses(tmp_path / "live"), rel=2e-3)
    picture(9).save(tmp_path / "some" / "1.png")
    for cached, images, message in (
        (True, "some", "lacks image 1.png, or holds it as it was"),
        (False, "gone", "no image folder at"),
        (False, "empty", "16 of 16 records are wrong"),
    ):
        given = [*words[:3], *(words[3:5] if cached else ()), "--data.images", tmp_path / images]
        with pytest.raises(SystemExit):
            main([str(word) for word in (*given, "--out", tmp_path / "refused")])
        assert message in capsys.readouterr().err
    given = ["--config", config, "--data.images", tmp_path / "gone"]
    with pytest.raises(SystemExit):
        main([str(word) for word in ("cache", "--cache", tmp_path / "new", *given)])
    assert capsys.readouterr().err.endswith("gone: choose it by `data.images`\n")
    main([str(word) for word in ("show", *given)])  # reads no picture
    assert "record 'r0', images 0.png" in capsys.readouterr().out


def test_texts_and_several_images_train(project, tmp_path) -> None:
    text = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "it is a cat"}]
    two = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "a dog"}]
    path = write_data(
        tmp_path / "mixed.json",
        [
            {"id": "text", "conversations": text},
            {"id": "two", "image": ["0.png", "1.png"], "conversations": two},
            record(2),
            {"id": "more", "conversations": text},
        ],
    )
    config = pretrain(project, tmp_path / "out", stage={"batch_size": 1})
    run(replace(config, data=replace(config.data, json=path)))
    assert len(losses(tmp_path / "out")) == 1


def test_another_image_is_another_answer(project) -> None:
    """The towers see what the record names: pixels are those of the picture."""
    folder, model = project
    towers = load_towers(model, "cpu")
    config = pretrain(project, folder / "unused")
    job = open_job(config, "pretrain")
    (pixels, identity), *_ = job.dataset[3]["images"]
    assert torch.equal(pixels[0], towers[0].pixels(picture(3)))
    assert identity != job.dataset[4]["images"][0][1]
