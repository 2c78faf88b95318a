"""Prompts read from files, and the stores of their tokens."""

import threading
from pathlib import Path

import pytest
import torch
from steering_helpers import TEXT_LAYERS, ksae_of, sd, sdxl

from revelio.activations.store import ActivationStore
from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.distributed import Processes
from revelio.sae.config import TrainConfig
from revelio.steering.config import ExtractTextConfig
from revelio.steering.prompts import prompts_of, read_prompts
from revelio.steering.token_store import TokenExtraction

TEXTS = ["a cat", "dogs", "b", "a red car", "a cat"]


def extraction(out: Path, processes: Processes | None = None, **more) -> TokenExtraction:
    config = text_config(out, "text_encoder.block1", shard_prompts=2, **more)
    source = PipelineLayers(sd(), "tiny")
    return TokenExtraction(prompts_of(TEXTS), source, config, processes or Processes())


def text_config(out: Path, layer: str, **more) -> ExtractTextConfig:
    return ExtractTextConfig(out=out, layers=(layer,), **more)


def finish(job: TokenExtraction) -> ActivationStore:
    steps = list(job.run())
    assert not steps or steps[-1][0] == steps[-1][1]
    return ActivationStore.open(job.config.out / job.config.layers[0])


@pytest.mark.parametrize("padding", ["drop", "keep"])
def test_a_row_is_a_token_position(tmp_path: Path, padding):
    store = finish(extraction(tmp_path, padding=padding))
    layers = PipelineLayers(sd())
    rows, ids = [], []
    for index, text in enumerate(TEXTS):
        tokens = layers.tokens([text], "text_encoder.block1")
        # Start and end beside one token a letter.
        count = 16 if padding == "keep" else len(text.replace(" ", "")) + 2
        rows.append(tokens.states[0, :count])
        ids += [f"{index:06d}/{place:03d}" for place in range(count)]
    assert store.ids == ids
    torch.testing.assert_close(store.tensor(), torch.cat(rows), rtol=0, atol=1e-5)
    assert store.manifest["layer"] == "text_encoder.block1"
    assert store.manifest["padding"] == padding


def test_an_interrupted_extraction_goes_on_to_the_same_bytes_and_others_are_refused(tmp_path: Path):
    whole = finish(extraction(tmp_path / "whole"))
    cut = extraction(tmp_path / "cut")
    steps = cut.run()
    next(steps), next(steps)
    steps.close()
    with pytest.raises(ValueError, match="already holds a store"):
        finish(extraction(tmp_path / "cut"))
    with pytest.raises(ValueError, match="`padding` 'drop', not 'keep'"):
        finish(extraction(tmp_path / "cut", padding="keep", resume=True))
    store = finish(extraction(tmp_path / "cut", resume=True))
    assert store.sha256 == whole.sha256
    # Once more does nothing.
    assert finish(extraction(tmp_path / "cut", resume=True)).sha256 == whole.sha256


def test_two_processes_share_the_shards(tmp_path: Path):
    barrier = threading.Barrier(2, timeout=60)

    ranks = [Processes(rank, 2, wait=lambda: barrier.wait() and None) for rank in range(2)]
    # Made before the threads start: random models are seeded through the global state.
    first, second = (extraction(tmp_path / "two", processes=one) for one in ranks)
    helper = threading.Thread(target=lambda: list(second.run()))
    helper.start()
    list(first.run())
    helper.join()
    store = ActivationStore.open(tmp_path / "two" / "text_encoder.block1")
    assert store.sha256 == finish(extraction(tmp_path / "one")).sha256


def test_a_slow_process_makes_its_own_shards(tmp_path: Path):
    # The main process looks for what is lacking only after the other has written its share.
    second = extraction(tmp_path / "two", processes=Processes(1, 2))
    fast = iter([lambda: list(second.run()), lambda: []])
    first = extraction(
        tmp_path / "two", processes=Processes(0, 2, wait=lambda: next(fast)() and None)
    )
    assert finish(first).sha256 == finish(extraction(tmp_path / "one")).sha256


def test_joined_layers_and_the_trainer_read_such_a_store(tmp_path: Path):
    from revelio.sae.train import SAERun, train_many

    layer = TEXT_LAYERS["sdxl"]
    job = TokenExtraction(prompts_of(TEXTS), PipelineLayers(sdxl()), text_config(tmp_path, layer))
    store = finish(job)
    assert store.row_shape == (36,)
    model = ksae_of(36)
    before = model.W_dec.detach().clone()
    from revelio.sae.dataloader import batches_of

    config = TrainConfig(steps=2, batch_size=8, warmup_steps=0)
    assert len(list(train_many([SAERun(model, config)], batches_of(store, config)))) == 2
    assert not torch.equal(model.W_dec, before)


def test_files_of_prompts(tmp_path: Path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat\n\n  a dog \n")
    assert [one.text for one in read_prompts(str(lines))] == ["a cat", "a dog"]
    table = tmp_path / "i2p.csv"
    table.write_text(
        'prompt,categories,sd_seed,sd_guidance_scale\n"a cat, asleep",x,17,7.5\na dog,y,18,\n'
    )
    found = read_prompts(str(table))
    assert [(one.text, one.seed, one.guidance) for one in found] == [
        ("a cat, asleep", 17, 7.5),
        ("a dog", 18, None),
    ]
    with pytest.raises(ValueError, match="no text in column 'text': it has prompt, categories"):
        read_prompts(str(table), "text")
    table.write_text("prompt,sd_seed\na cat,many\n")
    with pytest.raises(ValueError, match=r"`sd_seed` of row 1 .* is 'many': give a whole number"):
        read_prompts(str(table))
    lines.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(str(lines))


@pytest.mark.parametrize(
    "name", ["nofile.txt", "a dress", "a/b/c", "some/i2p.csv", "./set", "/x/y"]
)
def test_prompts_of_a_missing_file_are_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("revelio.data.sources.huggingface.hub_splits", asked.append)
    with pytest.raises(ValueError, match=f"no file of prompts at {name}: give one prompt a line"):
        read_prompts(name)
    monkeypatch.setattr(
        "revelio.data.sources.huggingface.hub_splits", lambda name: {"all": [{"prompt": name}]}
    )
    assert [one.text for one in read_prompts("AIML-TUDA/i2p")] == ["AIML-TUDA/i2p"]
    assert not asked


def test_a_saved_data_set_of_prompts(tmp_path: Path):
    from datasets import Dataset

    Dataset.from_dict({"caption": ["a cat", "a dog"]}).save_to_disk(str(tmp_path / "set"))
    assert [one.text for one in read_prompts(str(tmp_path / "set"), "caption")] == [
        "a cat",
        "a dog",
    ]


def test_layers_of_the_denoiser_give_no_tokens(tmp_path: Path):
    with pytest.raises(ValueError, match="up_ft0 of the pipeline takes no text"):
        TokenExtraction(prompts_of(["a"]), PipelineLayers(sd()), text_config(tmp_path, "up_ft0"))
