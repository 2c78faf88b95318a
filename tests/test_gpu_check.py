"""`make gpu-check` with its parts replaced: what it writes, that it goes on, what it says without a GPU."""

import argparse
import json
import os
import signal
import subprocess
import sys
import weakref
from html.parser import HTMLParser
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import gpu_check
from tools.gpu_check import PARTS, Outcome, Part, check, judged, main, run

ROOT = Path(__file__).parent.parent
JUNIT = (
    '<testsuites><testsuite><testcase name="a"/><testcase name="b[1]"><failure/></testcase>'
    '<testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>'
)
GOOD = '<testsuites><testsuite><testcase name="a"/><testcase name="b"/></testsuite></testsuites>'


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture
def card(monkeypatch) -> None:
    """A machine with a GPU, as far as the check looks before its parts are run."""
    monkeypatch.setattr(gpu_check, "unfit", lambda: None)
    monkeypatch.setattr(gpu_check, "missing", lambda: ["peft", "gguf"])
    monkeypatch.setattr(
        gpu_check, "machine", lambda: {"device": "Card", "versions": {"torch": "2.11.0"}}
    )


def outcome(part: Part, limit: float) -> Outcome:
    assert 0 < limit <= part.limit
    if part.tests:
        return Outcome(0, "", GOOD, 1.25)
    return Outcome(0, "", json.dumps({"device": "Card", "seconds": {"loop": 2.0}}))


def test_everything_passes_but_what_lacks_a_package(card, tmp_path, capsys) -> None:
    assert main(["--out", str(tmp_path)], outcome) == 1
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    states = {part["name"]: part["state"] for part in report["parts"]}
    assert list(states) == [part.name for part in PARTS]
    lacking = [name for name, state in states.items() if state == "not run"]
    assert lacking == [part.name for part in PARTS if "peft" in part.needs] and len(lacking) == 1
    assert set(states.values()) == {"passed", "not run"}
    said = capsys.readouterr().out.splitlines()
    assert sum("missing: peft, gguf" in each for each in said) == 1
    assert any("needs peft" in each for each in said)
    assert report["missing"] == ["peft", "gguf"] and report["versions"] == {"torch": "2.11.0"}
    assert report["parts"][1]["tests"] == {"passed": 2, "failed": 0, "skipped": 0}
    assert report["parts"][1]["peak_gib"] == 1.25
    assert report["parts"][-1]["result"]["seconds"] == {"loop": 2.0}


def test_all_passed_is_status_0(card, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "missing", list)
    assert main(["--out", str(tmp_path)], outcome) == 0
    assert json.loads((tmp_path / "gpu_report.json").read_text())["passed"] is True


@pytest.mark.parametrize("bad", range(len(PARTS)))
@pytest.mark.parametrize("how", ["failed", "stopped", "no start", "garbage"])
def test_it_goes_on_after_a_part_that_fails(card, tmp_path, monkeypatch, bad, how) -> None:
    monkeypatch.setattr(gpu_check, "missing", list)

    def runner(part: Part, limit: float) -> Outcome:
        if part is not PARTS[bad]:
            return outcome(part, limit)
        if how == "no start":
            raise OSError("python could not be started")
        if how == "garbage":
            return Outcome(1, "x", "{<")
        return Outcome(
            1 if how == "failed" else None, "<b>boom</b>\n" * 100, JUNIT if part.tests else ""
        )

    assert main(["--out", str(tmp_path)], runner) == 1
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    states = [part["state"] for part in report["parts"]]
    assert states[bad] == ("stopped" if how == "stopped" else "failed")
    assert states[:bad] + states[bad + 1 :] == ["passed"] * (len(PARTS) - 1)
    found = report["parts"][bad]
    assert len(found["output"]) <= gpu_check.TAIL
    texts = Texts()
    texts.feed((tmp_path / "gpu_report.html").read_text())
    assert "b" not in texts.tags and "not everything passed" in texts.text
    if how in ("failed", "stopped"):
        assert "<b>boom</b>" in texts.text
        if PARTS[bad].tests:
            assert found["tests"] == {"passed": 1, "failed": 2, "skipped": 1}
            assert found["failures"] == ["b[1]", "d"]


def test_parts_share_the_time_there_is() -> None:
    clock, limits = [0.0], []

    def runner(part: Part, limit: float) -> Outcome:
        limits.append(limit)
        clock[0] += limit
        return Outcome(0, "", GOOD if part.tests else "{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check.time, "monotonic", lambda: clock[0])
        found = list(check(PARTS, runner, [], budget=300))
    assert sum(limits) <= 300 and clock[0] <= 300
    assert found[-1]["state"] == "not run" and found[-1]["why"] == "no time was left"
    assert sum(part.limit for part in PARTS) <= gpu_check.BUDGET < 600


def test_a_benchmark_that_names_a_failure_and_tests_that_were_not_run_have_not_passed() -> None:
    inner = {"batches": [{"sparsify tf32": {"failed": "RuntimeError: x"}}]}
    found = judged(PARTS[-1], Outcome(0, "", json.dumps(inner)))
    assert found["state"] == "failed" and found["failures"] == ["RuntimeError: x"]
    skipped = '<testsuite><testcase name="a"><skipped/></testcase></testsuite>'
    assert judged(PARTS[1], Outcome(0, "", skipped))["why"] == "no test was run"


def test_a_part_is_run_and_stopped_at_its_limit() -> None:
    program = "import sys; print('hello'); open(sys.argv[1], 'w').write('{}'); sys.exit(3)"
    done = run(Part("x", ("-c", program, "{report}"), 60), 60)
    assert (done.status, done.output, done.report) == (3, "hello\n", "{}")
    program = "import time; print('begun', flush=True); time.sleep(60)"
    slow = run(Part("x", ("-c", program), 60), 3)
    assert slow.status is None and slow.output == "begun\n"


def test_tests_that_take_too_long_leave_what_they_found(tmp_path, monkeypatch) -> None:
    """They are asked to end before they are killed, and what ends at once is not waited for."""
    # Plugins load PyTorch, which may take longer than these tests have beside other work.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    lines = (
        "import time",
        "def test_a(): pass",
        "def test_b(): assert 0",
        "def test_c(): time.sleep(60)",
    )
    (tmp_path / "test_slow.py").write_text("\n".join(lines))
    words = (
        "-m",
        "pytest",
        str(tmp_path),
        "-c",
        os.devnull,
        "--junitxml={report}",
        "-p",
        "no:cacheprovider",
    )
    part = Part("slow", words, 8)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of `nohup make gpu-check &`
    try:
        found = judged(part, run(part, 8))
    finally:
        signal.signal(signal.SIGINT, before)
    assert found["state"] == "stopped"
    assert found["tests"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert found["failures"] == ["test_b"]
    assert any("test_slow.py:3" in each for each in found["output"])  # where it was


def test_versions_are_those_of_the_modules_that_are_imported(monkeypatch) -> None:
    """Of modules whose distributions have other names, too."""
    card = argparse.Namespace(name="Card", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = gpu_check.machine()
    assert found["memory_gib"] == 80 and found["capability"] == "9.0"
    for module, name in (("sklearn", "scikit-learn"), ("PIL", "pillow"), ("yaml", "pyyaml")):
        assert found["versions"][module] == version(name)
    assert "sparsify" not in found["versions"] or find_spec("sparsify")


def test_what_the_parts_run_is_there() -> None:
    for part in PARTS:
        script = next(word for word in part.words if word.endswith(".py"))
        assert (ROOT / script).exists()
        flags = [word for word in part.words if word.startswith("--") and "junit" not in word]
        if not part.tests:
            text = (ROOT / script).read_text()
            assert all(f'"{flag}"' in text for flag in flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_is_one_line_and_status_2(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/gpu_check.py"), "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("gpu-check: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("version", "cuda", "visible", "says"),
    [
        ("2.5.1+cu124", "12.4", True, "too old"),
        ("2.6.0+cpu", None, False, "without CUDA"),
        ("2.11.0+cu130", "13.0", False, "no CUDA device is visible"),
        ("2.6.0", "12.4", True, None),
        ("3.0.0a0+git1", "14.0", True, None),
    ],
)
def test_what_torch_must_be(monkeypatch, version, cuda, visible, says) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    found = gpu_check.unfit()
    assert (found is None) if says is None else (says in str(found))


@pytest.fixture
def benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def sizes(*batches: int) -> argparse.Namespace:
    return argparse.Namespace(
        d=1280, n=81_920, k=32, batches=list(batches), rounds=3, warmup=2, variants=None
    )


def test_batches_are_chosen_from_the_memory_that_is_free(benchmarks) -> None:
    """By hand: 30 bytes a parameter of 210 M, half a GiB, and 24 bytes a code."""
    import ksae_cuda

    want = sizes(1024, 4096)
    assert ksae_cuda.needed(want, 1024) == 30 * 2 * 1280 * 81_920 + 2**29 + 24 * 1024 * 81_920
    assert ksae_cuda.fitting(want, 80 * 2**30) == [1024, 4096]
    assert ksae_cuda.fitting(want, 11 * 2**30) == [1024]
    assert ksae_cuda.fitting(want, 7 * 2**30) == [256]
    assert ksae_cuda.fitting(want, 2**30) == []


@pytest.fixture
def pretended(monkeypatch) -> None:
    """A card as far as the k-SAE benchmark asks for one."""
    import ksae_cuda

    monkeypatch.setattr(ksae_cuda, "timed", lambda step, count: step() or 2.0)
    kernel = SimpleNamespace(nomination=SimpleNamespace(milliseconds={(32,): {None: 2.0}}))
    monkeypatch.setattr(ksae_cuda, "cuda_kernel", lambda: kernel)
    for name in ("parts", "synchronises", "products"):
        monkeypatch.setattr(ksae_cuda, name, lambda *_: {})
    for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)


def test_what_failed_holds_no_memory_when_the_next_is_made(
    benchmarks, pretended, monkeypatch
) -> None:
    import ksae_cuda

    class Step:
        def __init__(self, fails: bool) -> None:
            self.fails = fails
            assert all(each() is None for each in alive)
            alive.append(weakref.ref(self))

        def __call__(self) -> None:
            if self.fails:
                raise RuntimeError("boom")

    alive: list[weakref.ref[Step]] = []
    made = {"revelio": lambda: lambda: None} | {
        name: lambda fails=fails: Step(fails)
        for name, fails in (("a", True), ("b", False), ("c", True))
    }
    monkeypatch.setattr(ksae_cuda, "variants", lambda *_: made)
    found = ksae_cuda.measure(sizes(64), torch.zeros(8, 4), 64)
    assert [name for name in "abc" if "failed" in found[name]] == ["a", "c"] and len(alive) == 3
    assert found["b"]["ms"] == 2.0 and "boom" in found["a"]["failed"]
    assert found["revelio"]["selections_ms"] == {"after the product": 2.0}


@pytest.mark.parametrize("how", ["float32", "tf32", "bf16"])
def test_peers_without_a_package_are_called_as_their_pages_say(
    benchmarks, monkeypatch, how
) -> None:
    """By stand-ins of the calls' published forms; tests/optional/check_peers.py takes what is installed."""
    import ksae_peers
    from ksae_dense import structured

    def loss(indices, weight, vals, bias, target):
        return ((bias + (weight[indices] * vals[..., None]).sum(1)) - target).square().mean()

    class Autoencoder(torch.nn.Module):
        def __init__(self, d_model: int, n_features: int, k: int) -> None:
            super().__init__()
            self.inner, self.outer = (
                torch.nn.Linear(d_model, n_features),
                torch.nn.Linear(n_features, d_model),
            )

        def forward(self, x):
            return self.outer(self.inner(x).relu()), None

    for module, members in (
        ("flex_sae", {"triton_topk_sae_loss": loss}), ("flash_sae", {"SparseAutoencoder": Autoencoder}),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**members))
    monkeypatch.setattr(ksae_peers, "RATE", 1e-2)
    torch.manual_seed(0)  # of their weights
    for name in ("flex-sae", "flash-sae"):
        setup = ksae_peers.Setup(16, 64, 4, structured(256, 16), 64, how)
        step = ksae_peers.PEERS[name][1](setup)
        losses = [float(step()) for _ in range(60)]
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), (name, losses)


def test_the_ksae_benchmark_goes_on_where_all_the_others_fail(
    benchmarks, pretended, monkeypatch
) -> None:
    """On a card that is pretended: no other variant can be made, and no median of nothing is taken."""
    import ksae_cuda

    def fails() -> None:
        raise RuntimeError("no memory")

    steps: list[int] = []
    made = {"revelio": lambda: lambda: steps.append(1), "dense tf32": fails, "sparsify tf32": fails}
    monkeypatch.setattr(ksae_cuda, "variants", lambda *_: made)
    monkeypatch.setattr(ksae_cuda, "timed", lambda step, count: 2.0)
    found = ksae_cuda.measure(sizes(1024), torch.zeros(8, 4), 1024)
    assert found["revelio"]["ms"] == 2.0 and found["revelio"]["samples_per_second"] == 512_000
    assert found["revelio"]["first_step_seconds"] >= 0 and steps == [1]
    assert "no memory" in found["dense tf32"]["failed"]
    assert gpu_check._failures({"batches": [found]}) == ["RuntimeError: no memory"] * 2
