"""DeepSpeed's ZeRO as the Trainer takes it, on GPUs or on CPUs, under a launcher or without one."""

import ctypes
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_ext.stages import StageOptions
from revelio.backbones.weights import check_finite
from revelio.tensor_files import read_rows
from revelio.trust import read_object

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

from torch.serialization import add_safe_globals

# Elements that are reduced or fetched together: DeepSpeed's own default is sized for large GPUs.
BUCKET = 50_000_000
# How many gathered weights ZeRO-3 keeps, and for how long.
LIVE = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
# Numbers that are read of a file at once.
BLOCK = 1 << 24
# Of malloc.h, for mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# ZeRO-3 keeps parameters smaller than this whole on every process.
PERSISTENT = 100_000


def zero_config(
    stage: int, *, bfloat16: bool, clip: float, offload: bool = False, cpu: bool = False
) -> dict[str, Any]:
    """DeepSpeed's config for one of our stages.

    Args:
        stage: 2 shares optimiser state and gradients among processes, 3 parameters, too.
        bfloat16: whether the model runs in bfloat16, with float32 copies in the optimiser.
        clip: gradients longer than this are shortened to it.
        offload: whether the optimiser's state, and in stage 3 the weights, stay in host memory.
        cpu: whether it trains on CPUs. Weights that are gathered lie in host memory there, and in stage 3 no
            more of them at once than are fetched together; on GPUs up to DeepSpeed's 1e9 stay for the
            backward pass (2 GB in bfloat16), which saves fetching them twice.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        if cpu:
            zero |= dict.fromkeys(LIVE, BUCKET)
    else:
        zero |= {"allgather_bucket_size": BUCKET}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16},
        "gradient_clipping": clip,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        # The Trainer's AdamW is wrapped, so that a run is the same with DeepSpeed and without.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def on_cpu() -> bool:
    """Whether there is no GPU to train on."""
    return not torch.cuda.is_available()


def in_bfloat16(options: StageOptions) -> bool:
    """Whether a stage computes in bfloat16."""
    return options.precision == "bfloat16" or (options.precision == "auto" and not on_cpu())


def deepspeed_settings(options: StageOptions) -> dict[str, Any]:
    """DeepSpeed's config of a stage, ours or the user's own; DeepSpeed is made ready.

    Raises:
        ValueError: the user's own is no such file.
    """
    cpu, bfloat16 = on_cpu(), in_bfloat16(options)
    prepare(cpu=cpu)
    if options.deepspeed is None:
        return zero_config(
            options.zero, bfloat16=bfloat16, clip=options.clip, offload=options.offload, cpu=cpu
        )
    own = own_settings(options.deepspeed)
    if own.get("bf16") == {"enabled": "auto"}:
        own["bf16"] = {"enabled": bfloat16}
    return own


def own_settings(file: Path) -> dict[str, Any]:
    """The user's own DeepSpeed JSON.

    Raises:
        ValueError: it is no such file.
    """
    own = read_object(file)
    zero = own.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(
            f"{file} has no `zero_optimization` that is an object with `stage` 0, 1, 2 or 3"
        )
    return own


def zero_stage(options: StageOptions) -> int:
    """ZeRO's stage, which the user's own JSON may say; 0 without DeepSpeed.

    Raises:
        ValueError: the user's own is no such file.
    """
    if not options.zero or options.deepspeed is None:
        return options.zero
    return own_settings(options.deepspeed).get("zero_optimization", {}).get("stage", 0)


def shareable(
    empty: "PreTrainedModel",
    held: Mapping[str, tuple[Path, tuple[int, ...]]],
    zero: Mapping[str, Any],
) -> dict[str, Path] | None:
    """The file of each weight, if this is ZeRO-3 and the files hold just the model's own names and shapes.

    Others, which transformers knows to translate, are loaded whole and shared out afterwards.

    Args:
        empty: the model without weights.
        held: file and shape of each tensor that is there.
        zero: DeepSpeed's config.
    """
    wanted = {name: tuple(weight.shape) for name, weight in empty.named_parameters()}
    names = dict(empty.named_parameters(remove_duplicate=False)).keys()
    there = {name: shape for name, (_, shape) in held.items()}
    fits = empty.state_dict().keys() == names and wanted.items() <= there.items()
    if zero.get("zero_optimization", {}).get("stage") != 3 or not fits:
        return None
    return {name: held[name][0] for name in wanted}


def load_partitioned(
    empty: "PreTrainedModel",
    files: Mapping[str, Path],
    zero: Mapping[str, Any],
) -> "PreTrainedModel":
    """A model of which each process allocates its share alone (ZeRO-3), and reads that share from the files.

    Nobody holds more than one whole weight at a time, and what is read of a file is a block. Where DeepSpeed
    keeps shares in another form (on a disk, quantised, or twice), the first process reads a weight and sends
    it round.

    Args:
        empty: the model without weights.
        files: the safetensors file of each weight, by the model's own names.
        zero: DeepSpeed's config.

    Raises:
        ValueError: a weight holds NaN or infinity.
    """
    from deepspeed.runtime.zero import Init
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    settled = _settled(zero) | {"train_micro_batch_size_per_gpu": 1}
    with freed_memory_returned():
        with no_init_weights(), prevent_arange_dtype_change(), Init(config_dict_or_path=settled):
            model = type(empty)(empty.config)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            _read_share(parameter, files[name], name)
    return model.eval()


def _read_share(parameter: Any, path: Path, name: str) -> None:
    """Fill this process's share of a weight: of its numbers in a row, the part that its rank has."""
    from deepspeed import comm
    from deepspeed.runtime.zero import GatheredParameters

    share = parameter.ds_tensor
    if _is_plain(parameter):
        first = share.ds_numel * comm.get_rank()
        held = min(share.ds_numel, parameter.ds_numel - first)  # the last ones may be filled up
        if held > 0:
            _read_into(share[:held], path, name, tuple(parameter.ds_shape), first)
        return
    with GatheredParameters([parameter], modifier_rank=0):
        if comm.get_rank() == 0:
            _read_into(parameter.data.view(-1), path, name, tuple(parameter.ds_shape))


def _is_plain(parameter: Any) -> bool:
    """Whether shares lie in memory as they are, one a process, in the order of all processes."""
    from deepspeed import comm

    share = parameter.ds_tensor
    return (
        share.final_location is None
        and share.dtype == parameter.dtype
        and getattr(parameter, "ds_secondary_tensor", None) is None
        and parameter.ds_process_group == comm.get_world_group()
    )


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Give whole weights back to the system as soon as they are shared out, or no longer gathered.

    glibc raises the size from which it does so with every large block that is freed, up to 32 MiB: of weights
    that come and go it kept up to 0.7 of a model's bytes when they were loaded, and as much in training.
    Other C libraries are left as they are.
    """
    settle = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if settle is not None:
        settle(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        if settle is not None:
            # What it rises to by itself.
            settle(_MMAP_THRESHOLD, 32 << 20)
            settle(_TRIM_THRESHOLD, 64 << 20)


def _read_into(
    numbers: "Tensor", path: Path, name: str, shape: Sequence[int], first: int = 0
) -> None:
    """Fill numbers of a weight from a safetensors file, some rows at a time.

    Args:
        numbers: of the weight, in a row.
        path: the file.
        name: of the weight there.
        shape: of the whole weight.
        first: the place of the first one in the whole weight.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    width = prod(shape[1:])
    stop, step = first + len(numbers), max(1, BLOCK // width)
    for row in range(first // width, -(-stop // width), step):
        begin, end = max(first, row * width), min(stop, (row + step) * width)
        part = read_rows(path, name, row, -(-end // width)).view(-1)
        check_finite(path.name, name, part)
        numbers[begin - first : end - first].copy_(part[begin - row * width : end - row * width])


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what the Trainer fills in; DeepSpeed has defaults for all of it."""
    return {
        key: _settled(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != "auto"
    }


def is_partitioned(model: "nn.Module") -> bool:
    """Whether this process holds but a share of a model's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def state_bytes(trained: int, frozen: int, *, zero: int, processes: int, weight: int = 2) -> int:
    """Bytes of weights, gradients and AdamW's state on each device, without activations.

    A trained weight takes 16 in bfloat16 (2 + 2, and float32 copy and moments 12; without DeepSpeed
    4 + 4 + 8, and 4 more for what several processes exchange), a frozen one ``weight``. Under ZeRO weight
    and gradient take ``weight`` each. ZeRO-2 shares gradients and the optimiser's 12 among the processes,
    ZeRO-3 the weights, too; ZeRO-1 only the 12.
    """
    whole, gradients, optimiser = weight * (trained + frozen), weight * trained, 12 * trained
    if zero == 1:
        return whole + gradients + optimiser // processes
    if zero == 2:
        return whole + (gradients + optimiser) // processes
    if zero == 3:
        return (whole + gradients + optimiser) // processes
    return weight * frozen + 16 * trained + (4 * trained if processes > 1 else 0)


def memory(model: "nn.Module", *, zero: int, processes: int, bfloat16: bool) -> int:
    """:func:`state_bytes` of a model that :mod:`llava_ext.training` has made ready.

    Frozen weights that are quantised stay whole everywhere; without DeepSpeed all keep their own format,
    DeepSpeed has one for all.
    """
    everything, trained = counts(model)
    packed = [each for each in model.parameters() if not each.is_floating_point()]
    held = sum(each.nbytes for each in packed)
    if not zero:
        still = [each for each in model.parameters() if not each.requires_grad]
        return sum(each.nbytes for each in still) + state_bytes(
            trained, 0, zero=0, processes=processes
        )
    frozen = everything - trained - sum(map(counted, packed))
    weight = 2 if bfloat16 else 4
    return held + state_bytes(trained, frozen, zero=zero, processes=processes, weight=weight)


def checkpoint_bytes(trained: int, *, zero: int, bfloat16: bool) -> int:
    """Bytes of a checkpoint: weights and AdamW's two moments in float32; under ZeRO-1 and 2 weights twice."""
    return trained * (12 + ((2 if bfloat16 else 4) if zero in (1, 2) else 0))


def counts(module: "nn.Module") -> tuple[int, int]:
    """Parameters of a module, and how many of them train."""
    sizes = [(counted(each), each.requires_grad) for each in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learnt in sizes if learnt)


def counted(parameter: "nn.Parameter") -> int:
    """How many numbers it is: ZeRO-3 leaves that in ds_numel, and of 4 bits a byte holds two."""
    held = getattr(parameter, "ds_numel", parameter.numel())
    return 2 * held if parameter.dtype == torch.uint8 else held


@contextmanager
def environment_kept() -> Iterator[None]:
    """Leave this process's environment as it was: what DeepSpeed needs there is of one stage.

    `torch.load` and a stage without DeepSpeed behave otherwise with it.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def prepare(*, cpu: bool) -> None:
    """Make DeepSpeed ready in this process; call it before the Trainer is made, in `environment_kept`.

    Without a launcher, this process becomes a group of one. On a CPU, DeepSpeed's shared-memory
    communication is left out: it would be compiled first, for more than a minute.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if cpu else "cuda")
    _unpickle_plain_values()
    if cpu:
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _unpickle_plain_values() -> None:
    """Let nothing in a checkpoint run: DeepSpeed would unpickle whatever it holds."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
