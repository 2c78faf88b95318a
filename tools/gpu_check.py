"""Run what is claimed for CUDA on this machine's GPU, in under ten minutes: `make gpu-check PYTHON=python3`.

The tests of tests/cuda (CUDA against the CPU within stated bounds), then the two benchmarks in a short form,
part by part, each in a process of its own: after one that fails the others go on, and of tests that take too
long those that were run count. Nothing is installed and no hub is asked. Writes gpu_report.json and
gpu_report.html. Status 0: all passed; 1: something did not; 2: nothing could be run.
"""

import argparse
import html
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# Seconds for all parts together; starting and writing the report come on top.
BUDGET = 570.0
OLDEST_TORCH = (2, 6)
PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "tyro", "cattrs",
    "jaxtyping", "sklearn", "jinja2", "matplotlib", "rich", "numpy", "scipy", "PIL", "yaml", "tqdm",
    "huggingface_hub", "sentencepiece", "pytest", "hypothesis", "beartype", "peft", "gguf", "onnx",
    "deepspeed",
)  # fmt: skip
# Compared with where they are installed; nothing is missing without them.
PEERS = ("sparsify", "sae_lens", "dictionary_learning", "flex_sae", "flash_sae")
# Lines of a failed part's output that are kept.
TAIL = 40
# Of a part's seconds, those in which tests that are stopped may write down what they have found.
GRACE = 8.0


@dataclass(frozen=True)
class Part:
    """One piece of the check.

    Attributes:
        name: what the report calls it.
        words: what python is called with; ``{report}`` stands for the file it is to write.
        limit: seconds it may take.
        needs: packages without which it is not run.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()

    @property
    def tests(self) -> bool:
        """Whether it runs tests; else it is a benchmark."""
        return "pytest" in self.words


def _tests(name: str, file: str, limit: float, *needs: str) -> Part:
    words = ("-m", "pytest", f"tests/cuda/{file}", "-p", "no:cacheprovider", "--junitxml={report}")
    words += ("-W", "default")  # what a card, a driver or another version warns of is no failure
    return Part(name, words, limit, ("pytest", "hypothesis", *needs))


PARTS = (
    # By itself and first, so that no test's or benchmark's seconds are the compiler's.
    Part(
        "Triton's programs, compiled",
        ("benchmarks/ksae_cuda.py", "--compile-only", "--json", "{report}"),
        60, ("triton",),
    ),
    _tests("k-SAE", "test_cuda_ksae.py", 110, "triton"),
    _tests("backbones, extraction, Diff-C", "test_cuda_models.py", 100),
    _tests("steering, measures, gallery, purity, demo", "test_cuda_commands.py", 60),
    _tests("LLaVA: both stages and an answer", "test_cuda_llava.py", 70, "peft"),
    Part(
        "benchmark: k-SAE step",
        (
            "benchmarks/ksae_cuda.py", "--batches", "1024", "4096", "--rounds", "3", "--warmup", "100",
            "--variants", "dense tf32", "sparsify tf32", "SAELens tf32", "dictionary_learning tf32",
            "flex-sae tf32", "flash-sae tf32", "--json", "{report}",
        ),
        85, ("triton",),
    ),
    Part(
        "benchmark: extraction",
        ("benchmarks/extraction_cuda.py", "--images", "128", "--rounds", "1", "--json", "{report}"),
        85,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        status: its exit status; None: it was stopped at its limit.
        output: what it said.
        report: the text of the file it wrote; empty: none.
        peak_gib: the most GPU memory PyTorch held in it; None: it did not say.
    """

    status: int | None
    output: str
    report: str = ""
    peak_gib: float | None = None


Runner = Callable[[Part, float], Outcome]


@dataclass
class Report:
    """What is written down.

    Attributes:
        machine: the GPU and versions.
        missing: packages that are not installed.
        parts: how each part went.
    """

    machine: Mapping[str, Any]
    missing: Sequence[str]
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every part did."""
        return all(part["state"] == "passed" for part in self.parts)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        machine, missing = dict(self.machine), list(self.missing)
        return {"passed": self.passed, **machine, "missing": missing, "parts": self.parts}


def main(arguments: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    """Check, write the report, and say in a line a part how it went."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(), help="the folder of the report")
    flags = parser.parse_args(arguments)
    why = unfit()
    if why is not None:
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    absent = missing()
    if absent:
        hint = f"{sys.executable} -m pip install '.[dev]' keeps the torch that is there"
        print(f"gpu-check: packages that are missing: {', '.join(absent)} ({hint})", flush=True)
    report = Report(machine(), absent)
    flags.out.mkdir(parents=True, exist_ok=True)
    for part in check(PARTS, runner or run, absent):
        report.parts.append(part)
        print(line(part), flush=True)
        # After each part, so that a run that is cut short leaves what it found.
        (flags.out / "gpu_report.json").write_text(json.dumps(report.plain(), indent=2) + "\n")
        (flags.out / "gpu_report.html").write_text(page(report), encoding="utf-8")
    print(f"gpu-check: {flags.out / 'gpu_report.json'}, {flags.out / 'gpu_report.html'}")
    return 0 if report.passed else 1


def unfit() -> str | None:
    """Why nothing can be run here; None where it can."""
    if not find_spec("torch"):
        return (
            f"{sys.executable} has no torch: name another with PYTHON=, or install torch for CUDA"
        )
    import torch

    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old: 2.6 or newer is needed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build for CUDA"
    if not torch.cuda.is_available():
        return f"no CUDA device is visible (torch {torch.__version__}, CUDA {torch.version.cuda})"
    return None


def missing() -> list[str]:
    """Packages that are not installed."""
    return [name for name in PACKAGES if not find_spec(name)]


def machine() -> dict[str, Any]:
    """The GPU and versions."""
    import torch

    card = torch.cuda.get_device_properties(0)
    named = packages_distributions()
    found = {name: version(named[name][0]) for name in (*PACKAGES, *PEERS) if name in named}
    return {
        "device": card.name,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": found,
    }


def check(parts: Sequence[Part], runner: Runner, absent: Sequence[str], budget: float = BUDGET):
    """Run the parts one after another, whatever becomes of each.

    Yields:
        How a part went: name, state (``passed``, ``failed``, ``stopped``, ``not run``), seconds, and what
        tests or benchmark found.
    """
    began = time.monotonic()
    for part in parts:
        lacking = [name for name in part.needs if name in absent]
        left = budget - (time.monotonic() - began)
        if lacking or left <= 0:
            why = f"needs {', '.join(lacking)}" if lacking else "no time was left"
            yield {"name": part.name, "state": "not run", "why": why}
            continue
        started = time.monotonic()
        try:
            outcome = runner(part, min(part.limit, left))
        except OSError as error:  # python itself could not be started
            outcome = Outcome(1, str(error))
        yield {**judged(part, outcome), "seconds": round(time.monotonic() - started, 1)}


def run(part: Part, limit: float) -> Outcome:
    """A part in a process of its own, which is stopped after ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report, peak = Path(folder, "report"), Path(folder, "peak")
        words = [word.replace("{report}", str(report)) for word in part.words]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {
            "PYTHONPATH": path, "REVELIO_GPU_PEAK": str(peak), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_heeds_interrupts,
        ) as process:  # fmt: skip
            status, said = _waited(process, limit, asked=part.tests)
        written = report.read_text(encoding="utf-8") if report.exists() else ""
        held = float(peak.read_text()) if peak.exists() else None
        return Outcome(status, said.decode("utf-8", "replace"), written, held)


def _heeds_interrupts() -> None:
    """In a part's process, which is asked to end: what `nohup` and `&` begin would leave that unheard."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _waited(
    process: subprocess.Popen[bytes], limit: float, *, asked: bool
) -> tuple[int | None, bytes]:
    """A process's status and output; None for one that was stopped, which pytest is asked for first."""
    grace = min(GRACE, limit / 2) if asked else 0.0
    try:
        said, _ = process.communicate(timeout=limit - grace)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        if asked:
            process.send_signal(signal.SIGINT)
    try:
        said, _ = process.communicate(timeout=grace)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    return None, said


def judged(part: Part, outcome: Outcome) -> dict[str, Any]:
    """What an outcome comes to."""
    state = {0: "passed", None: "stopped"}.get(outcome.status, "failed")
    found: dict[str, Any] = {"name": part.name, "state": state, "status": outcome.status}
    if outcome.peak_gib is not None:
        found["peak_gib"] = outcome.peak_gib
    try:
        if outcome.report and part.tests:
            found |= counted(outcome.report)
        elif outcome.report:
            found["result"] = json.loads(outcome.report)
    except (ValueError, ElementTree.ParseError):
        found |= {"why": "what it wrote can't be read"}
    if part.tests and state == "passed" and not found.get("tests", {}).get("passed"):
        found |= {"state": "failed", "why": "no test was run"}
    if not part.tests and _failures(found.get("result")):
        found |= {"state": "failed", "failures": _failures(found.get("result"))}
    if found["state"] != "passed":
        found["output"] = outcome.output.splitlines()[-TAIL:]
    return found


def counted(xml: str) -> dict[str, Any]:
    """Tests passed, failed and skipped, and the names of those that failed, out of a JUnit report."""
    # One that was stopped on its way has no name.
    cases = [case for case in ElementTree.fromstring(xml).iter("testcase") if case.get("name")]
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    tests = {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped}
    return {"tests": tests, "failures": [case.get("name", "") for case in bad]}


def _failures(result: Any) -> list[str]:
    """What a benchmark names as failed, at any depth."""
    if isinstance(result, list):
        return [found for each in result for found in _failures(each)]
    if not isinstance(result, dict):
        return []
    own = [str(result["failed"])] if "failed" in result else []
    return own + [found for each in result.values() for found in _failures(each)]


def line(part: Mapping[str, Any]) -> str:
    """How a part went, for people."""
    said = [f"{part['name']}: {part['state']}"]
    if "tests" in part:
        said.append(", ".join(f"{count} {what}" for what, count in part["tests"].items()))
    said += [part["why"]] if "why" in part else []
    said += [f"{part['seconds']:.0f} s"] if "seconds" in part else []
    said += [f"peak {part['peak_gib']:.2f} GiB"] if "peak_gib" in part else []
    return "; ".join([*said, *part.get("failures", [])[:5]])


def page(report: Report) -> str:
    """The report as a page that needs nothing else."""
    about = {key: value for key, value in report.machine.items() if key != "versions"}
    about["versions"] = ", ".join(f"{n} {v}" for n, v in report.machine["versions"].items())
    about["missing packages"] = ", ".join(report.missing) or "none"
    rows = "".join(f"<tr><th>{_text(key)}<td>{_text(value)}" for key, value in about.items())
    parts = "".join(_section(part) for part in report.parts)
    verdict = "everything passed" if report.passed else "not everything passed"
    return (
        "<!doctype html><meta charset=utf-8><title>GPU check</title><style>body{font:16px sans-serif;"
        "max-width:60em;margin:2em auto}th{text-align:left;padding-right:1em;vertical-align:top}"
        "pre{overflow:auto;background:#f4f4f4;padding:1em}</style>"
        f"<h1>GPU check: {verdict}</h1><table>{rows}</table>{parts}\n"
    )


def _section(part: Mapping[str, Any]) -> str:
    shown = json.dumps(part["result"], indent=2) if "result" in part else ""
    shown = "\n".join([shown, *part.get("output", [])]).strip()
    return f"<h2>{_text(part['name'])}</h2><p>{_text(line(part))}</p>" + (
        f"<pre>{_text(shown)}</pre>" if shown else ""
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


if __name__ == "__main__":
    sys.exit(main())
