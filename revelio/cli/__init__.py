"""``revelio <command>``: the table of subcommands. Nothing heavy is imported before one is chosen.

A command is one module of :mod:`revelio.cli` with a frozen dataclass ``Config``, whose field
docstrings are the help page, and ``run(config)``.
"""

import sys
from importlib import import_module
from types import ModuleType

from revelio import command_line

COMMANDS = {
    "backbones": "list the known models and their layers (channels, stride)",
    "models": "list the shipped models; prepare those that come in packages",
    "extract": "images -> activation stores (several layers, timesteps, prompts in one run)",
    "plan-ksae": "what training a k-SAE would cost: memory, time, disk",
    "train-ksae": "store -> k-sparse autoencoder",
    "convert-ksae": "k-SAEs of the released form, steerers, SAELens, sparsify -> ours, and back",
    "top-images": "k-SAE + store -> the top images of every latent",
    "purity": "top images + labels -> label purity, with chance and intervals",
    "eval-ksae": "k-SAEs + held-out store -> every measure beside its controls, with a verdict",
    "locality": "k-SAE of cells + grids -> how local, stable and distinct its latents are",
    "name-latents": "top images + a vision-language judge -> names of latents, checked",
    "gallery": "k-SAE + store -> a folder of pages to browse the latents",
    "serve": "a gallery on this machine's web server: drop a picture in, see which latents fire, and where",
    "pca-maps": "grids -> the top three principal components as RGB pictures",
    "extract-text": "prompts -> activation stores of a text encoder's tokens",
    "concept": "texts, pictures or latents -> a concept to steer by",
    "steer": "concept or latents + prompts -> pictures at several strengths",
    "steer-eval": "how well a concept is erased, by a judge, beside baselines",
    "train-diffc": "images or stored grids -> Diff-C classifier",
    "eval-diffc": "Diff-C classifier -> accuracy, confusion",
    "reproduce": "a table or figure of the paper: its numbers, ours, chance, intervals, what holds",
    "probe": "stores -> linear, nearest-neighbor and attention probes in one table",
    "zero-shot": "images + class names -> Diffusion Classifier or CLIP, no training",
    "advise": "your labelled images -> which layer, timestep, prompt and model to take",
    "configs": "list the experiments' YAML files that come with Revelio; copy one",
    "demo": "all of it on the shipped model and real images",
}


# Commands of the other packages of the wheel, each a module with COMMANDS, find_module and main. This package
# never imports them: they stand here as text.
GROUPS = {"llava": "llava_ext.cli", "llava-bench": "eval.llava_bench"}
SUMMARIES = {
    "llava": "a language model that sees through a backbone's layers: cache, pretrain, finetune, chat",
    "llava-bench": "LLaVA-Bench (in the wild): answer, judge, score",
}
SUMMARY = """See inside diffusion models.

`revelio --version` prints the version; `revelio --print-completion bash` (or zsh) completion."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit 2 with one line on a user's mistake, 130 on Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in ("-V", "--version"):
        from revelio.version import __version__

        print(f"revelio {__version__}")
        return
    if words and words[0].partition("=")[0] == "--print-completion":
        with command_line.one_line_errors("revelio"):
            print(_completion(words), end="")
        return
    name = command_line.choose(words, COMMANDS | SUMMARIES, "revelio", SUMMARY)
    if name in GROUPS:
        import_module(GROUPS[name]).main(words[1:], f"revelio {name}")
    elif name:
        run_module(find_module(name), words[1:], name)


def _completion(words: list[str]) -> str:
    from revelio.completion import completion

    shell, _ = command_line.take(words, "--print-completion", "a shell: bash or zsh")
    groups = {name: import_module(module) for name, module in GROUPS.items()}
    inside = {
        name: {one: group.find_module(one) for one in group.COMMANDS}
        for name, group in groups.items()
    }
    return completion(str(shell), {name: find_module(name) for name in COMMANDS} | inside)


def find_module(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"revelio.cli.{name.replace('-', '_')}")


def run_module(module: ModuleType, arguments: list[str], name: str) -> None:
    """Run the command ``name``; see :func:`revelio.command_line.run_module`."""
    command_line.run_module(module, arguments, name="revelio", prog=f"revelio {name}")
