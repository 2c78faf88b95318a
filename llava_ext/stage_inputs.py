"""What a stage's run reads, as hashes in its manifest: a resumed run says what has changed since."""

from collections.abc import Mapping
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ext.checkpoint import PROJECTORS
from llava_ext.config import FinetuneConfig, TrainConfig
from llava_ext.dataset import ConversationDataset
from llava_ext.deepspeed import zero_stage
from llava_ext.images import (
    picture_ids,
    plain_ids,
    read_stamps,
    size_and_time,
    write_stamps,
)
from llava_ext.import_llava import SUFFIXES, projectors_folder
from llava_ext.language import TOKENIZER_CONFIG, WORDS, find_language_model
from llava_ext.llava_json import Record, image_names
from llava_ext.tower_cache import CachedGrids
from llava_ext.towers import Tower
from revelio.data.contents import combined, digest_of
from revelio.run_dir import Run, sha256

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedTokenizerBase

TOKENIZER = (
    TOKENIZER_CONFIG, *WORDS, "merges.txt", "added_tokens.json", "special_tokens_map.json"
)  # fmt: skip
WEIGHTS = "weights.json"  # hashes of the language model's files
DEEPSPEED, ZERO_STAGE = "DeepSpeed", "ZeRO stage"

Inputs = dict[str, dict[str, Any]]


def stage_inputs(
    config: TrainConfig,
    dataset: ConversationDataset,
    records: "Sequence[Record]",
    towers: "Sequence[Tower]",
    tokenizer: "PreTrainedTokenizerBase",
    run_folder: Path,
    validation: "Sequence[Record]" = (),
) -> Inputs:
    """Hashes of all that a stage reads, by what it is called in messages.

    Args:
        config: of the stage.
        dataset: its samples.
        records: what these are made of.
        towers: those that run.
        tokenizer: of the language model.
        run_folder: keeps the hashes of pictures and of the language model's files.
        validation: the records whose loss is measured.
    """
    template = str(tokenizer.chat_template).encode()
    language = language_identity(config.model.language_model, config.model.revision, run_folder)
    inputs: Inputs = {
        "data": {"sha256": sha256(config.data.json), "samples": len(dataset)},
        "language model": {**language, "chat template": sha256_of(template).hexdigest()},
    }
    if config.validation_data is not None:
        inputs["validation data"] = {"sha256": sha256(config.validation_data)}
    if config.cache is None:
        inputs["pictures"] = _pictures(config, records, run_folder)
        if validation:
            inputs["validation pictures"] = _pictures(config, validation, run_folder)
    for number, tower in enumerate(towers):
        inputs[f"tower {number}"] = {"weights": tower.identity()["weights"]}
    if isinstance(dataset.images, CachedGrids):
        for number, identity in enumerate(dataset.images.identities()):
            inputs[f"tower {number}"] = identity
    if config.stage.zero and config.stage.deepspeed is not None:
        own = {ZERO_STAGE: zero_stage(config.stage), "config": sha256(config.stage.deepspeed)}
        inputs[DEEPSPEED] = own
    if isinstance(config, FinetuneConfig) and config.pretrained is not None:
        inputs["pretrained"] = {"projectors": _hash_of(_projector_files(config.pretrained))}
    return inputs


def _pictures(config: TrainConfig, records: "Sequence[Record]", run_folder: Path) -> dict[str, str]:
    """Hashes of the records' pictures: of their contents too, where these are looked into."""
    names, folder = image_names(records), config.data.images or Path()
    found = {"names and sizes": combined(plain_ids(folder, names))}
    exact = picture_ids(folder, names, run_folder, keep=True) if config.check_pictures else ()
    return found | ({"contents": combined(exact)} if exact else {})


def language_identity(
    name: str, revision: str | None = None, keep: Path | None = None
) -> dict[str, str]:
    """What tells a language model and its tokenizer from others: a hub's commit, or hashes of files.

    Args:
        name: of the language model.
        revision: of a hub id.
        keep: the folder in which hashes of whole weights are kept with sizes and times of change, so that
            files are read through once; none: they are not read through.
    """
    from transformers import AutoConfig

    where = find_language_model(name)
    if not Path(where).is_dir():
        config = AutoConfig.from_pretrained(
            where, revision=revision or "main", trust_remote_code=False
        )
        return {"commit": str(config._commit_hash)}
    folder = Path(where)
    found = (file for end in ("*.safetensors", "*.bin", "*.gguf") for file in folder.glob(end))
    weights = sorted(found)
    words = (folder / name for name in TOKENIZER if (folder / name).is_file())
    return {
        # Windows of each file: what versions noted that did not read all of it.
        "weights": _hash_of(weights),
        **({} if keep is None else {"whole weights": _hash_of_whole(weights, keep)}),
        "config": sha256(folder / "config.json"),
        # Whole: an edit in the middle of a large file is not in a digest.
        "tokenizer": combined(f"{file.name} {sha256(file)}" for file in sorted(words)),
    }


def _hash_of_whole(files: "Sequence[Path]", keep: Path) -> str:
    """A hash of all that is in files; one that has its size and time of change is not read again."""
    known = read_stamps(keep / WEIGHTS, "files")
    stamps = {}
    for file in files:
        now = size_and_time(file)
        was = known.get(file.name, [])
        stamps[file.name] = was if was[:2] == now else [*now, sha256(file)]
    if stamps != known:
        write_stamps(keep / WEIGHTS, "files", stamps)
    return combined(f"{name} {stamp[2]}" for name, stamp in stamps.items())


def record_inputs(run_dir: Run, inputs: Inputs, *, accept: bool) -> str:
    """Note the inputs in the manifest, after they were compared with those that the run began with.

    What an older version did not note is not compared.

    Args:
        run_dir: of the run.
        inputs: of :func:`stage_inputs`.
        accept: go on with what has changed.

    Returns:
        What has changed, for messages; empty where nothing has.

    Raises:
        ValueError: something has changed since the run began, and is not accepted or can't be.
    """
    changed = {
        name: _changed(run_dir.manifest["inputs"].get(name, {}), inputs[name]) for name in inputs
    }
    said = ", ".join(f"{name} ({', '.join(keys)})" for name, keys in changed.items() if keys)
    if ZERO_STAGE in changed.get(DEEPSPEED, ()):
        raise ValueError(
            f"{run_dir.path} was started with another {ZERO_STAGE} in the file of `stage.deepspeed`, which "
            "its checkpoints are of: put back what was there, or start another run"
        )
    if said and not accept:
        raise ValueError(
            f"{run_dir.path} was started with other inputs; changed since: {said}: put back what was "
            "there, or set `changed_inputs: accept` to go on with what is there now"
        )
    for name, value in inputs.items():
        if changed[name]:
            del run_dir.manifest["inputs"][name]
        run_dir.add_input(name, value)
    return said


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in now if key in was and was[key] != now[key]]


def _projector_files(pretrained: Path) -> "Iterable[Path]":
    """What stage 2 begins with: a saved model's projectors, or others' files."""
    if (folder := projectors_folder(pretrained)) is not None:
        return [folder / PROJECTORS]
    if pretrained.is_file():
        return [pretrained]
    return (file for file in pretrained.iterdir() if file.suffix in SUFFIXES)


def _hash_of(files: "Iterable[Path]") -> str:
    return combined(f"{file.name} {digest_of(file)}" for file in sorted(files))
