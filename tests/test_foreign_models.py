"""Every file of every family's folder: removed, emptied, swapped, cut, its weights changed in every way.

Whatever is done to a folder, loading it is one line that names what is wrong, or gives the same outputs.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from foreign_models_helpers import FAMILIES, Family, change_tensors, copy_of, refusal
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.build(root / name) for name, family in FAMILIES.items()}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    # Relative names such as saved/tokenizer look like hub ids; no test may ask a hub.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WEIGHT_CHANGES = ("one removed", "one added", "all renamed", "another shape", "nan", "inf")


@pytest.mark.parametrize("name", FAMILIES)
def test_changed_weights_are_named(folders, place, name):
    family, folder = FAMILIES[name], copy_of(folders[name], place)
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        whole = file.read_bytes()
        for change in WEIGHT_CHANGES:
            key = change_tensors(file, change, family.prefix)
            line = refusal(family, folder)
            assert line, f"{file} with {change} was loaded"
            assert change == "all renamed" or leaf(key) in line, (file, change, line)
            assert file.name in line or "adapter" in line, (file, change, line)
            file.write_bytes(whole)
        for cut in (0, 7, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:cut])
            line = refusal(family, folder)
            assert line and file.name in line, (file, cut, line)
        file.write_bytes(whole)
    assert refusal(family, folder) is None


def leaf(key: str) -> str:
    """The end of a tensor's name, which stays when libraries rename its modules."""
    return key.rsplit(".", 1)[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_with_a_file_less_is_refused_or_the_same(folders, place, name):
    family, folder = FAMILIES[name], copy_of(folders[name], place)
    before = family.outputs(folder)
    refused = 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        changes = ("removed", "empty", "{}", "[]", "not UTF-8", "deep")
        for change in changes if file.suffix == ".json" else changes[:2]:
            file.unlink()
            broken = {"empty": b"", "{}": b"{}", "[]": b"[]", "not UTF-8": b'{"\xff": 1}'}
            broken["deep"] = b"[" * 100_000
            if change != "removed":
                file.write_bytes(broken[change])
            line = refusal(family, folder)
            refused += line is not None
            if line is None:
                same = torch.equal(family.outputs(folder), before)
                assert same, f"{file} {change}: other outputs without a word"
            file.write_bytes(whole)
    assert refused >= 6
    assert torch.equal(family.outputs(folder), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_or_empty_subfolder_is_refused_or_the_same(folders, place, name):
    family, folder = FAMILIES[name], copy_of(folders[name], place)
    before = family.outputs(folder)
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        kept = part.rename(place / "kept")
        for empty in (False, True):
            if empty:
                part.mkdir()
            line = refusal(family, folder)
            assert line and part.name in line, (part, line)
        part.rmdir()
        kept.rename(part)
    assert torch.equal(family.outputs(folder), before)


# One schedule is as good as another, so is what ends an answer, and the two tiny tokenizers differ by one
# word: these swaps make another model that is whole.
ANOTHER_MODEL = r"(scheduler|generation)_config\.json|tokenizer\.json"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_another_family_is_refused_or_changes_nothing(folders, place, name):
    family, folder = FAMILIES[name], copy_of(folders[name], place)
    before = family.outputs(folder)
    others = sorted(path for path in folders[family.other].rglob("*") if path.is_file())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        donors = [other for other in others if other.suffix == file.suffix][:5]
        for donor in donors:
            file.write_bytes(donor.read_bytes())
            whole_swap = file.name == donor.name and re.fullmatch(ANOTHER_MODEL, file.name)
            if refusal(family, folder) is None and not whole_swap:
                same = torch.equal(family.outputs(folder), before)
                assert same, f"{file} with {donor.name} of {family.other}: other outputs"
        file.write_bytes(whole)


def test_variants_shards_and_prefixes_give_the_same(folders, place):
    folder = copy_of(folders["sd"], place)
    family = FAMILIES["sd"]
    before = family.outputs(folder)

    def same() -> None:
        # Weights lie elsewhere in memory, and with that some processors add in another order.
        torch.testing.assert_close(family.outputs(folder), before, atol=1e-6, rtol=1e-5)

    for part in ("unet", "vae", "text_encoder"):
        file = next((folder / part).glob("*.safetensors"))
        tensors, whole = load_file(file), file.read_bytes()
        for prefix in ("_orig_mod.", "module."):
            save_file({prefix + key: value for key, value in tensors.items()}, file)
            same()
        file.unlink()
        half = file.with_name(f"{file.stem}.fp16.safetensors")
        save_file({key: value.half() for key, value in tensors.items()}, half)
        torch.testing.assert_close(family.outputs(folder), before, atol=0.02, rtol=0.02)
        half.unlink()
        stem = "pytorch_model" if part == "text_encoder" else file.stem
        torch.save(tensors, folder / part / f"{stem}.bin")
        same()
        (folder / part / f"{stem}.bin").unlink()
        shards = write_shards(folder / part, file.stem, tensors)
        same()
        check_shards(family, folder, shards)
        for path in shards:
            path.unlink()
        file.write_bytes(whole)


def write_shards(folder: Path, stem: str, tensors: dict[str, Tensor]) -> list[Path]:
    """Two shards and their index, which comes last."""
    names = sorted(tensors)
    middle = len(names) // 2
    halves = {"1": names[:middle], "2": names[middle:]}
    paths = []
    for number, keys in halves.items():
        paths.append(folder / f"{stem}-0000{number}-of-00002.safetensors")
        save_file({key: tensors[key] for key in keys}, paths[-1], {"format": "pt"})
    where = {key: paths[int(n) - 1].name for n, keys in halves.items() for key in keys}
    paths.append(folder / f"{stem}.safetensors.index.json")
    paths[-1].write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return paths


def check_shards(family: Family, folder: Path, shards: list[Path]) -> None:
    index = json.loads(shards[-1].read_text())
    whole = shards[-1].read_text()
    first = next(iter(index["weight_map"]))
    for wrong in ("../../outside.safetensors", "/etc/passwd", "missing.safetensors", 3, ""):
        index["weight_map"][first] = wrong
        shards[-1].write_text(json.dumps(index))
        assert refusal(family, folder), wrong
    shards[-1].write_text(whole)
    shard = shards[0].read_bytes()
    key = change_tensors(shards[0], "one removed")
    assert leaf(key) in str(refusal(family, folder))
    shards[0].write_bytes(shard)


@pytest.mark.parametrize(
    "class_name",
    ["StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline", "MyOwnPipeline", None],
)
def test_the_same_unet_under_another_pipelines_name(folders, place, class_name):
    folder = copy_of(folders["sd"], place)
    before = FAMILIES["sd"].outputs(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": class_name}))
    assert torch.equal(FAMILIES["sd"].outputs(folder), before)
    more = {"text_encoder_3": ["transformers", "T5EncoderModel"]}
    (folder / "model_index.json").write_text(json.dumps(index | more))
    assert "supported are" in str(refusal(FAMILIES["sd"], folder))


def test_a_unet_alone(folders, place):
    folder = copy_of(folders["sd"], place)
    outputs = FAMILIES["sd"].outputs
    before = outputs(folder)
    alone = Path(shutil.copytree(folder / "unet", place / "tuned"))
    file = alone / "diffusion_pytorch_model.safetensors"
    for name in (folder / "unet", f"{folder}+{alone}", f"{folder}+{file}"):
        assert torch.equal(outputs(name), before), name
    for name in (alone, file):
        with pytest.raises(ValueError, match=r"alone, without VAE.*such as sd-1\.5\+"):
            outputs(name)
    single = place / "single"  # as released: one file, and no config
    single.mkdir()
    shutil.copy(file, single / "v1-5-pruned.safetensors")
    assert torch.equal(outputs(f"{folder}+{single}"), before)
    with pytest.raises(ValueError, match=r"in a single file is given behind .* sd-1\.5\+.*single"):
        outputs(single)
    original = {f"model.diffusion_model.{k}": v for k, v in load_file(file).items()}
    save_file(original, place / "odd.safetensors")
    for name, message in [
        (f"{folder}+{place / 'odd.safetensors'}", "odd.safetensors"),
        (f"{folder}+nowhere", "no denoiser at nowhere"),
        (f"{folders['clip']}+{alone}", "has no denoiser"),
        (f"{folder}+{folder / 'vae'}", "is of a AutoencoderKL"),
        (f"{folder}+{next((folder / 'vae').glob('*.safetensors'))}", "lacks conv_in|lacks down_"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            outputs(name)
        assert "\n" not in str(error.value)
    change_tensors(file, "one added")
    with pytest.raises(ValueError, match=r"unexpected extra\.weight"):
        outputs(f"{folder}+{alone}")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "foreign_code"}, "megatron_config"),
        ({"megatron_core": "foreign_code"}, "megatron_core"),
        ({"auto_mapping": {"parent_library": "foreign_code"}}, "auto_mapping"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "no LoRA"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_an_adapter_with_other_settings_is_refused(folders, place, changes, named):
    folder = copy_of(folders["llava-lora"], place)
    (place / "foreign_code.py").write_text(f"open({str(place / 'ran.txt')!r}, 'w')")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert named in str(refusal(FAMILIES["llava-lora"], folder))
    assert not (place / "ran.txt").exists()


def test_a_language_models_pickle_is_bounded_and_its_flags_are_not_its_own(folders, place):
    folder, family = copy_of(folders["llama"], place), FAMILIES["llama"]
    before = family.outputs(folder)
    config = json.loads((folder / "config.json").read_text())
    for value in (True, 0.5, "x", [1]):
        odd = {"output_hidden_states": value, "output_attentions": value}
        (folder / "config.json").write_text(json.dumps(config | odd))
        assert refusal(family, folder) or torch.equal(family.outputs(folder), before), value
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(family.outputs(folder), before)
    torch.save({"a": Path}, folder / "pytorch_model.bin", pickle_protocol=3)
    assert refusal(family, folder)
    # A megabyte of it inflates to a gigabyte.
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"N.")
        archive.writestr("x/data/0", bytes(1 << 24))
    assert "compressed or overlap" in str(refusal(family, folder))
