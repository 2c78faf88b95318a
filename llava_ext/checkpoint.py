"""A model on disk: the projectors, the tokenizer, and of the language model no more than is needed.

    config.json               format, what the model is made of, shapes of the towers' grids, their transforms
    projectors.safetensors    always
    tokenizer.json, ...       the tokenizer, and processor_config.json (in format 1: the folder tokenizer/)
    language_model/           whole; absent where the language model is unchanged: then by name and revision
    adapter/                  of peft, on top of either

Towers are never in it: they are named in config.json. With ``llava_ext`` imported, ``AutoProcessor`` and
``AutoModelForImageTextToText`` of transformers take the folder (of format 2).
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal
from warnings import warn

from safetensors.torch import save_file
from torch import Tensor, nn

from llava_ext.adapter import is_quantised, load_adapter, read_weights_file, rounded
from llava_ext.config import ModelConfig
from llava_ext.conversation import FORMAT_1_SYSTEM
from llava_ext.images import transform_from
from llava_ext.language import (
    TOKENIZER_CONFIG,
    assemble,
    load_language_model,
    load_tokenizer,
)
from llava_ext.model import LlavaModel
from llava_ext.model_config import TowerShape
from llava_ext.processor import RevelioLlavaProcessor
from revelio.backbones.loading import dtype_of
from revelio.config import structure, to_plain
from revelio.files import names_in, write_folder, write_whole
from revelio.hub import is_hub_id
from revelio.run_dir import write_json
from revelio.trust import read_object
from revelio.wording import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
READABLE = (1, 2)
CONFIG = "config.json"
PROJECTORS = "projectors.safetensors"
LANGUAGE, ADAPTER, TOKENIZER = "language_model", "adapter", "tokenizer"
MOST_SIDE = 10**6
# Settings of transformers' `from_pretrained` that are the language model's.
PASSED_ON = (
    "device_map",
    "max_memory",
    "quantization_config",
    "attn_implementation",
    "offload_folder",
)
# Where a hub id is read from, and what transformers and its users say that has no meaning here.
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
PASSED_OVER = (
    "_from_auto",
    "adapter_kwargs",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
)

Language = Literal["auto", "reference", "whole"]


def save_model(
    model: LlavaModel,
    tokenizer: "PreTrainedTokenizerBase | None",
    path: Path,
    *,
    language: Language = "auto",
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model to a folder, whole or not at all.

    Args:
        model: what to write.
        tokenizer: its tokenizer; None writes the model alone.
        path: a folder of its own; the files of a model of the same parts are replaced.
        language: ``reference`` writes only the language model's name, ``whole`` its weights; ``auto`` writes
            them where they were trained. Adapters are always written.
        state: the model's state dict, where the model itself holds only a part (ZeRO-3).

    Raises:
        ValueError: the folder holds something else, or a reference would lose trained weights.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise ValueError(f"{path} holds files that are no model: choose another folder")
    if language == "reference" and model.language_changed:
        raise ValueError(
            "the language model was trained, so its name alone would lose that: save it `whole`"
        )
    whole = model.language_changed if language == "auto" else language == "whole"
    if whole and is_quantised(model):
        raise ValueError(
            "the language model is quantised, so only its name can be saved: load it without "
            "`quantization_config` to save it `whole`"
        )
    dtype = dtype_of(model.settings.dtype)
    weights = rounded(model.state_dict() if state is None else state, dtype)

    def fill(folder: Path) -> None:
        _write(model, tokenizer, folder, weights, whole)
        # Weights of an earlier model would be read in the place of these, or beside them.
        left = sorted(set(names_in(path)) - set(names_in(folder)))
        if strangers := [name for name in left if "/" in name]:
            raise ValueError(
                f"{path} holds {strangers[0]}, which is no part of this model: choose another folder"
            )

    write_folder(path, fill)


def _write(
    model: LlavaModel,
    tokenizer: "PreTrainedTokenizerBase | None",
    folder: Path,
    weights: Mapping[str, Tensor],
    whole: bool,
) -> None:
    from peft import PeftModel

    adapter = isinstance(model.language_model, PeftModel)
    config = model.config
    config.format, config.adapter = FORMAT, adapter
    config.model, config.language = to_plain(model.settings), "whole" if whole else "reference"
    config.architectures, config.dtype = [type(model).__name__], model.settings.dtype
    write_json(folder / CONFIG, config.to_dict())
    projectors = _below(weights, "projectors.")
    save_file({key: value.contiguous() for key, value in projectors.items()}, folder / PROJECTORS)
    if tokenizer is not None and config.transforms:
        RevelioLlavaProcessor.of(model, tokenizer).save_pretrained(folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    inner: Any = model.language_model
    language = _below(weights, "language_model.")
    if adapter:
        # What the user called it, not the folder where it lay on this machine.
        inner.peft_config["default"].base_model_name_or_path = model.settings.language_model
        # By itself peft would ask the hub whether the vocabulary has grown.
        inner.save_pretrained(folder / ADAPTER, state_dict=language, save_embedding_layers=False)
        # The base model's own weights, out of the wrapper's names.
        below = _below(language, "base_model.model.")
        kept = {k.replace(".base_layer.", "."): v for k, v in below.items() if "lora_" not in k}
        language, inner = kept, inner.get_base_model()
    if whole:
        inner.save_pretrained(folder / LANGUAGE, state_dict=language)
    write_whole(folder / "README.md", _card(model))


def upload_model(
    model: LlavaModel,
    repo_id: str,
    *,
    language: Language = "auto",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
) -> str:
    """Upload what :func:`save_model` writes to the hub, with its own card, which names the towers.

    Args:
        model: what to upload.
        repo_id: on the hub; it is made where it is not there.
        language: see :func:`save_model`.
        private: whether a new repository is.
        token: of the hub; None is that of the login.
        revision: the branch.
        create_pr: propose the change instead of making it.
        commit_message: of the commit.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    settings = model.settings
    named = [tower.backbone for tower in settings.towers]
    named += [] if language == "whole" or model.language_changed else [settings.language_model]
    if here := [name for name in named if Path(name).is_dir()]:
        warn(f"{here[0]} is a folder of this machine: others can't load the model", stacklevel=3)
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    with TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save_model(model, None, folder, language=language)
        return api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def load_model(
    path: str | Path, *, dtype: Any = None, config: Any = None, **settings: Any
) -> tuple[LlavaModel, "PreTrainedTokenizerBase"]:
    """Read what :func:`save_model` wrote.

    Args:
        path: the folder, or a hub id.
        dtype: instead of the one it was written in.
        config: what the Auto classes have read, for the attention that was asked for; the rest is read from
            the folder.
        settings: of transformers' ``from_pretrained``: ``revision``, ``token``, ``cache_dir``,
            ``local_files_only`` and ``force_download`` of the hub id; ``device_map``,
            ``quantization_config``, ``attn_implementation``, ... of the language model.

    Raises:
        ValueError: it is no such folder, of another format, or damaged, or a setting is unknown; one line
            that says which.
    """
    dtype = settings.pop("torch_dtype", dtype)  # its old name
    attention = getattr(config, "_attn_implementation_internal", None)
    if attention is not None:
        settings.setdefault("attn_implementation", attention)
    for name in settings:
        if name not in (*PASSED_ON, *HUB, *PASSED_OVER):
            known = ", ".join(("dtype", *PASSED_ON, *HUB))
            raise ValueError(f"these models take no `{name}`: choose from {known}")
    hub = {name: settings[name] for name in HUB if settings.get(name) is not None}
    folder = _folder(path, **hub)
    entries = _entries(folder)
    dtype = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    values = entries["model"] | ({"dtype": dtype} if dtype else {})
    model_config = structure(ModelConfig, values, where="model.")
    shapes = _tower_shapes(folder, entries["shapes"])
    whole = entries["language"] == "whole"
    old = (folder / TOKENIZER).is_dir()
    tokenizer = _tokenizer(folder, model_config, old)
    projectors = read_weights_file(folder / PROJECTORS)
    language_model: Any = load_language_model(
        _part(folder, LANGUAGE) if whole else model_config.language_model,
        revision=None if whole else model_config.revision,
        dtype=model_config.dtype,
        **{name: value for name, value in settings.items() if name in PASSED_ON},
    )
    model = assemble(model_config, language_model, tokenizer, shapes)
    model.config.transforms = _transforms(folder, entries.get("transforms", []), len(shapes))
    model.language_changed = whole
    if entries["adapter"]:
        model.set_language_model(load_adapter(language_model, Path(_part(folder, ADAPTER))))
    load_state(model.projectors, projectors, str(folder / PROJECTORS))
    model.projectors.to(next(model.get_input_embeddings().parameters()).device)
    return model.eval(), tokenizer


def _tokenizer(folder: Path, config: ModelConfig, old: bool) -> "PreTrainedTokenizerBase":
    """The saved tokenizer; of a model that was saved without its processor, the language model's own."""
    if old or (folder / TOKENIZER_CONFIG).is_file():
        return load_tokenizer(_part(folder, TOKENIZER) if old else str(folder))
    return load_tokenizer(config.language_model, config.revision)


def _entries(folder: Path) -> dict[str, Any]:
    """config.json of a saved model.

    Raises:
        ValueError: it is of another kind, format or form.
    """
    entries = read_object(folder / CONFIG)
    kinds = {"model": dict, "shapes": list, "language": str, "adapter": bool}
    if entries.get("format") not in READABLE or not all(
        isinstance(entries.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"{folder / CONFIG} is of no model that llava_ext {FORMAT} can read")
    model = entries["model"]
    if entries["format"] == 1 and model.get("system") is None:
        # The template's own system message was another one then, and the model learnt from it.
        entries["model"] = model | {"system": FORMAT_1_SYSTEM.get(model.get("template"))}
    return entries


def _tower_shapes(folder: Path, entries: list[Any]) -> list[TowerShape]:
    try:
        found = [(s["channels"], *s["grid"]) for s in entries]
        shapes = [TowerShape(channels, (height, width)) for channels, height, width in found]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} has `shapes` that are no towers' shapes") from error
    if not all(type(n) is int and 1 <= n <= MOST_SIDE for sizes in found for n in sizes):
        raise ValueError(f"{folder / CONFIG} has `shapes` that no tower has")
    return shapes


def _transforms(folder: Path, entries: list[Any], towers: int) -> list[Any]:
    """How the towers' pictures were made; nothing where a tower has its own way."""
    if len(entries) not in (0, towers):
        raise ValueError(
            f"{folder / CONFIG} has {len(entries)} `transforms` for {plural(towers, 'tower')}: it is damaged"
        )
    for entry in entries:
        transform_from(entry)
    return entries


def _part(folder: Path, name: str) -> str:
    """A subfolder of a saved model; without it, its path could be taken for a hub id.

    Raises:
        ValueError: it is missing.
    """
    if not (folder / name).is_dir():
        raise ValueError(f"{folder} lacks the folder {name}/: the saved model is not complete")
    return str(folder / name)


def load_projectors(model: LlavaModel, path: str | Path) -> None:
    """Take only the projectors of a saved model: what stage 2 begins with.

    Raises:
        ValueError: they are of another width, or of other towers.
    """
    file = _folder(path) / PROJECTORS
    load_state(model.projectors, read_weights_file(file), str(file))


def instead_of(folder: Path) -> str:
    """What to give or do where a folder is no saved model."""
    if (folder / "final" / CONFIG).is_file():
        return f"give {folder / 'final'}"
    if (folder / "manifest.json").is_file() and (folder / "config.yaml").is_file():
        return "it is a run that isn't finished, which goes on with `resume`"
    return "give the folder of a saved model"


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a module, in its own number format.

    Raises:
        ValueError: a name or a shape differs; one line with the first difference.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        what = "lacks" if name in expected else "has, unknown to the model,"
        raise ValueError(f"{source} {what} {name}: it was made with other towers or token steps")
    for name in sorted(expected):
        given, wanted = tuple(state[name].shape), tuple(expected[name].shape)
        if given != wanted:
            raise ValueError(
                f"{source} holds {name} of shape {given}, but this model wants {wanted}: it was made "
                "for a language model or tower of another width"
            )
    module.load_state_dict(state)


def _folder(path: str | Path, **hub: Any) -> Path:
    if Path(path).is_dir():
        if not (Path(path) / CONFIG).is_file():
            raise ValueError(f"{path} holds no {CONFIG}: {instead_of(Path(path))}")
        return Path(path)
    if not is_hub_id(path):
        raise ValueError(f"no model at {path}: give the folder of a saved model, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(path), **hub))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} is no folder here and can't be had from the hub ({reason})"
        ) from error


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _card(model: LlavaModel) -> str:
    towers = "\n".join(
        f"- `{tower.backbone}`, layer `{tower.layer}`, timestep {tower.timestep}, "
        f"{plural(tower.budget, 'token')} by `{tower.tokens}`"
        for tower in model.settings.towers
    )
    return (
        f"---\nlibrary_name: revelio\npipeline_tag: image-text-to-text\n---\n\n# A LLaVA-style model\n\n"
        f"Language model `{model.settings.language_model}`, {plural(model.image_tokens, 'token')} an image, "
        f"fusion `{model.settings.fusion}`, template `{model.settings.template}`.\n\n"
        f"Towers (not in this folder):\n\n{towers}\n\n"
        "After `import llava_ext`, transformers' `AutoModelForImageTextToText`, `AutoProcessor` and\n"
        "`pipeline` load it; `revelio llava chat --model FOLDER --image FILE` talks to it.\n"
    )
