"""Low-rank adapters of the language model (peft): put in, folded in."""

from typing import TYPE_CHECKING, Any

from llava_ext.model import LlavaModel
from llava_ext.stages import LoraOptions
from revelio.seeds import key_seed

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

LORA_TARGETS = "all-linear"


def add_lora(model: LlavaModel, options: LoraOptions, *, seed: int = 0) -> None:
    """Put low-rank adapters (peft) into the language model; then only these and the projectors train.

    Args:
        model: changed in place.
        options: of the adapters.
        seed: of their first weights.

    Raises:
        ValueError: no layer has such a name.
    """
    import torch
    from peft import LoraConfig

    targets = list(options.targets)
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets[0] if targets == [LORA_TARGETS] else targets,
    )
    # peft draws from the global state: put aside, keyed, put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(seed, "adapter"))
        model.set_language_model(adapted(model.language_model, settings))


def merge_adapter(model: LlavaModel) -> None:
    """Fold the adapter into the language model's own weights.

    Raises:
        ValueError: the model has none.
    """
    from peft import PeftModel

    wrapped: Any = model.language_model
    if not isinstance(wrapped, PeftModel):
        raise ValueError("the model has no adapter, so there is nothing to fold in")
    model.set_language_model(wrapped.merge_and_unload())
    model.language_changed = True


def adapted(language_model: Any, settings: "LoraConfig") -> "PeftModel":
    """A language model with new adapters in it."""
    from peft import get_peft_model

    # Without a task: peft's wrapper of causal language models takes no embeddings for MPT.
    model = get_peft_model(language_model, settings)
    settings.task_type = "CAUSAL_LM"  # for others that load the adapter
    return model
