"""A language model of which every process holds only its part from the start (ZeRO-3).

``from_pretrained`` under ZeRO-3 reads all files in every process before it hands out the parts. Here modules
are partitioned as they are made, and each process then reads its own share of each weight, and no more:
ZeRO-3 cuts a weight, as one long row, into as many equal parts as there are processes.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ext.deepspeed import start_processes
from revelio.backbones.weights import check_finite
from revelio.distributed import rank
from revelio.trust import tensor_headers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


def load_partitioned(
    kind: "type[PreTrainedModel]", config: "PretrainedConfig", files: Sequence[Path], zero: Any
) -> "PreTrainedModel | None":
    """A model in parts; None where its files have other names than its weights, which transformers maps.

    Args:
        kind: the model's class.
        config: its config.
        files: its safetensors files.
        zero: DeepSpeed's config, with stage 3.

    Raises:
        ValueError: a weight has another shape, or holds NaN.
    """
    import deepspeed
    import torch

    found = [(file, tensor_headers(file)[0]) for file in files]
    places = {name: file for file, inside in found for name in inside}
    headers = {name: header for _, inside in found for name, header in inside.items()}
    with torch.device("meta"):
        plain: Any = kind(config)
    needed, known = dict(plain.named_parameters()).keys(), plain.state_dict().keys()
    if not (needed <= places.keys() <= known) or dict(plain.named_buffers()).keys() & known:
        return None
    start_processes()
    with deepspeed.zero.Init(config_dict_or_path=zero):
        model: Any = kind(config)
    for name, parameter in model.named_parameters():
        if tuple(parameter.ds_shape) != headers[name].shape:
            raise ValueError(
                f"{places[name]} holds {name} of shape {headers[name].shape}, not {tuple(parameter.ds_shape)}"
            )
        held = parameter.ds_tensor.data
        part = _share(places[name], name, headers[name].shape, held.numel())
        check_finite(str(places[name]), name, part)
        held[: part.numel()].copy_(part)
    return model.eval()


def _share(file: Path, name: str, shape: tuple[int, ...], size: int) -> "Tensor":
    """This process's share of a weight; the last ones may be shorter, or empty."""
    from safetensors import safe_open

    start = min(rank() * size, prod(shape))
    end, row = min(start + size, prod(shape)), prod(shape[1:])
    # Opened anew for each: what is mapped of a file counts as this process's memory.
    with safe_open(file, "pt") as opened:
        rows = opened.get_slice(name)[start // row : -(-end // row)]
    return rows.flatten()[start % row :][: end - start]
