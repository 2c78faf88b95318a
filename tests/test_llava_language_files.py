"""A language model's files: pickles run nothing, and no config makes more than its weights fill."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from llava_helpers import tiny_llama, tiny_mpt
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llava_ext.language import load_language_model, load_tokenizer

IDS = torch.tensor([[5, 6, 7, 8]])
GIB = 1 << 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("language")
    return {"llama": tiny_llama(root / "llama"), "mpt": tiny_mpt(root / "mpt")}


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def pickled(folder: Path, shards: int) -> None:
    """The weights as ``torch.save`` writes them, in one file or several with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = {key: f"pytorch_model-{i % shards}.bin" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        torch.save({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_pickled_weights_give_the_same_model(folders, tmp_path, name, shards):
    wanted = load_language_model(str(folders[name]))
    folder = copy(folders[name], tmp_path)
    pickled(folder, shards)
    found = load_language_model(str(folder))
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert type(found) is type(wanted) and not found.training
    half = load_language_model(str(folder), dtype="bfloat16")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


class Runs:
    """What a hostile pickle has called."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_something_is_refused_with_a_remedy(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="save the model again as safetensors") as refused:
        load_language_model(str(folder))
    assert "pytorch_model.bin" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_a_tensor_beyond_its_file_is_refused(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path)
    (folder / "model.safetensors").unlink()
    endless = torch.zeros(1).expand(GIB, 8)
    torch.save({"model.embed_tokens.weight": endless}, folder / "pytorch_model.bin")
    assert (folder / "pytorch_model.bin").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read safely"):
        load_language_model(str(folder))


SIZES = {
    "llama": ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "head_dim"),
    "mpt": ("d_model", "vocab_size", "n_layers"),
}


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_a_config_of_other_sizes_allocates_nothing(folders, tmp_path, name, weights, monkeypatch):
    """Every size of the config, far beyond the file: refused before transformers loads a thing."""
    folder = copy(folders[name], tmp_path)
    if weights == "bin":
        pickled(folder, 1)
    config = json.loads((folder / "config.json").read_text())

    def loads(*arguments, **settings):
        pytest.fail("transformers began to load")

    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", loads)
    for key in SIZES[name]:
        large = 60 if "layers" in key else 2**26
        changes = {"hidden_size": 2**22, "intermediate_size": 2**26, "d_model": 2**22}
        edited = config | {key: changes.get(key, large)}
        if (
            "layers" in key
        ):  # as long as the file holds so little, they must be wide to take anything
            edited |= {"hidden_size": 2**14, "d_model": 2**14}
        (folder / "config.json").write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=r"different models|no model is so large") as refused:
            load_language_model(str(folder))
        assert "\n" not in str(refused.value), key
    for key in (*SIZES[name], "num_experts"):
        (folder / "config.json").write_text(json.dumps(config | {key: 10**10}))
        with pytest.raises(ValueError, match=f"has {key} = 10000000000: no model is so large"):
            load_language_model(str(folder))
    nested = config | {"text_config": {"num_local_experts": 10**8}}
    (folder / "config.json").write_text(json.dumps(nested))
    with pytest.raises(ValueError, match="num_local_experts = 100000000: no model is so large"):
        load_language_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_special_token_that_is_no_number_is_named(folders, tmp_path, file):
    folder = copy(folders["llama"], tmp_path)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | {"bos_token_id": ["helpers:load"]}))
    with pytest.raises(ValueError, match=f"{file} of .* has bos_token_id = "):
        load_language_model(str(folder))


def test_outputs_and_lengths_that_a_folder_asks_for_are_its_own_affair(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path)
    flags = {"output_hidden_states": [{"a": 1}], "output_attentions": True}
    for file in ("generation_config.json", "config.json"):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | flags))
    try:
        model = load_language_model(str(folder))
    except ValueError as error:
        assert "as a causal language model" in str(error)
    else:
        assert model.generate(IDS, max_new_tokens=1).shape == (1, 5)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values = json.dumps(values | {"model_max_length": "x"})
    (folder / "tokenizer_config.json").write_text(values)
    with pytest.raises(ValueError, match="model_max_length"):
        load_tokenizer(str(folder))


def test_a_long_rotary_base_is_no_size(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 3.58e9}))
    assert load_language_model(str(folder)).config.vocab_size == config["vocab_size"]


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path, monkeypatch):
    """As Vicuna-7B v1.5 has it: no tokenizer.json."""
    import io
    import json

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small dog on green grass", "is it a cat?"] * 20), model_writer=model,
        vocab_size=60, model_type="bpe", byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("llava_ext.language.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="read by protobuf: pip install protobuf"):
        load_tokenizer(str(tmp_path))
    monkeypatch.undo()
    pytest.importorskip("google.protobuf")
    tokenizer = load_tokenizer(str(tmp_path))
    own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "a green cat on it"
    assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text)
    assert tokenizer.pad_token == "<unk>"


def test_models_loaded_in_threads_are_whole(tmp_path) -> None:
    """While transformers makes a model, its method that ties weights is another, for all threads."""
    tie = PreTrainedModel.tie_weights
    folder = tiny_llama(tmp_path / "llama")
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(load_language_model, [str(folder)] * 24))
    for model in models:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert PreTrainedModel.tie_weights is tie


def test_a_device_that_is_full_while_weights_are_loaded_is_no_damaged_file(
    tmp_path, monkeypatch
) -> None:
    """A quantised model is made on the device, file by file."""
    folder = tiny_llama(tmp_path / "llama")

    def runs_out(*_given: object, **_settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", runs_out)
    monkeypatch.setattr("llava_ext.language.room", lambda _: 3 * 10**9)
    with pytest.raises(
        ValueError, match=r"does not fit the device's memory: 3 GB are free; set load_in"
    ):
        load_language_model(str(folder))
