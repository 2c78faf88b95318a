"""Settings of a stage that contradict each other are refused before anything is read, not passed over."""

from dataclasses import fields

from llava_ext.adapter import LORA_TARGETS
from llava_ext.config import FinetuneConfig, TrainConfig
from llava_ext.deepspeed import on_cpu, own_settings, zero_stage
from llava_ext.stages import LoraOptions, StageOptions
from revelio.command_line import require

# Settings that the Trainer leaves to DeepSpeed where the user's own JSON has these parts.
TAKEN_OVER = {"optimizer": ("projector_rate",), "scheduler": ("schedule", "warmup")}


def check_settings(config: TrainConfig) -> None:
    """See whether the settings go together, and whether what they need is installed.

    Raises:
        ValueError: they don't, or it isn't; one line that names the setting.
    """
    _check_deepspeed(config.stage)
    if isinstance(config, FinetuneConfig):
        _check_adapter(config.lora)
    if config.stage.zero:
        require("deepspeed", "ZeRO")
    if isinstance(config, FinetuneConfig) and config.lora.rank:
        require("peft", "an adapter")
    if config.load_in:
        _check_quantised(config)


def _check_deepspeed(options: StageOptions) -> None:
    for name in ("deepspeed", "offload"):
        if getattr(options, name) and not options.zero:
            raise ValueError(
                f"`stage.{name}` is of DeepSpeed, and `stage.zero: 0` trains without it: set `stage.zero` 2 "
                f"or 3, or leave `{name}` out"
            )
    if options.deepspeed is None:
        return
    if options.offload:
        raise ValueError(
            f"`stage.offload` does nothing beside your own {options.deepspeed}: say it there "
            "(`offload_optimizer`, `offload_param`), and leave `offload` out"
        )
    own = own_settings(options.deepspeed)
    plain = {each.name: each.default for each in fields(options)}
    for part, names in TAKEN_OVER.items():
        for name in names:
            if part in own and getattr(options, name) != plain[name]:
                raise ValueError(
                    f"`stage.{name}` does nothing beside the `{part}` in {options.deepspeed}: take `{part}` "
                    f"out of that file, or leave `{name}` out"
                )


def _check_adapter(lora: LoraOptions) -> None:
    if LORA_TARGETS in lora.targets and len(lora.targets) > 1:
        raise ValueError(
            f"`lora.targets` holds {LORA_TARGETS}, which is every layer, beside others "
            f"({', '.join(lora.targets)}): give it alone, or leave it out"
        )
    for each in fields(LoraOptions):
        if not lora.rank and getattr(lora, each.name) != each.default:
            raise ValueError(
                f"`lora.{each.name}` is of an adapter, and `lora.rank: 0` trains all weights without one: "
                f"set `lora.rank`, or leave `lora.{each.name}` out"
            )


def _check_quantised(config: TrainConfig) -> None:
    """Refuse what can't be done with quantised weights, before anything is read.

    Raises:
        ValueError: it can't; or bitsandbytes is not installed.
    """
    require("bitsandbytes", f"`load_in: {config.load_in}`")
    if isinstance(config, FinetuneConfig) and not config.lora.rank:
        raise ValueError(
            f"`load_in: {config.load_in}` freezes the language model, so stage 2 trains an adapter on it: "
            "set `lora.rank`, or leave `load_in` out to train its weights"
        )
    if config.load_in == "4bit" and config.validation_data and on_cpu():
        raise ValueError(
            "on a CPU bitsandbytes repacks 4-bit weights to measure a loss, and can't train on them after "
            "it: leave `validation_data` out, or set `load_in: 8bit`"
        )
    if zero_stage(config.stage) == 3:
        raise ValueError(
            f"`load_in: {config.load_in}` makes weights that ZeRO-3 can't share out: set `stage.zero: 2` or 0"
        )
