"""The k-SAE step's benchmark writes what tables say, and holds both sides alike."""

import json
import os
import sys
from pathlib import Path

import pytest

from revelio.sae.kernels.build import instruction_set
from tools.ksae_tables import ksae_lines

ROOT = Path(__file__).parents[1]
SIZES = ["--d", "32", "--n", "96", "--k", "4", "--rows", "64", "--batches", "16", "--rounds", "1"]


@pytest.fixture
def step(monkeypatch):
    """The benchmark's module, in an environment that is as before afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("REVELIO_NATIVE", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    import ksae_step  # pyright: ignore[reportMissingImports]
    import peaks  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(peaks, "ROUNDS", 10**4)
    monkeypatch.setattr(peaks, "READ", 2**20)
    monkeypatch.setattr(peaks, "TIMES", 1)
    return ksae_step


def test_what_tables_say_of_a_machine_is_written_by_the_benchmark(step, monkeypatch, tmp_path):
    path = tmp_path / "step.json"
    monkeypatch.setenv("REVELIO_NATIVE", "avx2-int8")
    monkeypatch.setattr(sys, "argv", ["ksae_step.py", *SIZES, "--no-memory", "--json", str(path)])
    step.main()
    report = json.loads(path.read_text())
    machine = report["machines"][instruction_set()]
    assert set(machine["peaks_of_a_thread"]["billion_products"]) == {"float32", "int16", "int8"}
    assert machine["batches"][0]["native in int16"]["multiplied_with"] == "avx2"
    assert machine["batches"][0]["native"]["multiplied_with"] == "avx2-int8"
    lines = ksae_lines(report)
    assert "A thread on avx2-int8 multiplies" in lines and "that nominate in int8 are" in lines
    assert "held to" not in lines


@pytest.mark.parametrize("kind", ["avx2", "avx512-without-vnni"])
def test_the_native_kernel_and_the_others_are_held_alike(kind, step, monkeypatch):
    class StartedError(Exception):
        """In place of a new process."""

    def start(program, words, environment):
        raise StartedError(environment)

    monkeypatch.setattr(os, "execve", start)
    monkeypatch.setattr(sys, "argv", ["ksae_step.py", "--held-to", kind])
    with pytest.raises(StartedError) as started:
        step.main()
    held = started.value.args[0]
    assert held["REVELIO_NATIVE"] == "avx2-int8"
    first = kind.split("-")[0]
    assert held["ATEN_CPU_CAPABILITY"] == first
    assert held["ONEDNN_MAX_CPU_ISA"].lower().startswith(first)
    assert held["MKL_ENABLE_INSTRUCTIONS"] == first.upper()
    for name in step.HOLD:
        monkeypatch.setenv(name, held[name])
    monkeypatch.setattr(step.torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX")
    with pytest.raises(SystemExit, match=f"cannot stand in for {kind}: it has"):
        step.main()


def test_int16_is_timed_beside_int8_that_has_taken_as_many_steps(step, monkeypatch, tmp_path):
    """More rows move from step to step: what has learned longer is slower."""
    taken: list[list[int]] = []

    class Counted(step.OwnStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.steps = [0]
            taken.append(self.steps)

        def __call__(self):
            self.steps[0] += 1
            return super().__call__()

    monkeypatch.setattr(step, "OwnStep", Counted)
    monkeypatch.setenv("REVELIO_NATIVE", "avx2-int8")
    monkeypatch.setattr(sys, "argv", ["ksae_step.py", *SIZES, "--no-memory"])
    step.main()
    native, _, int16, beside = (one[0] for one in taken)
    assert int16 == beside == 2 < native


def test_a_batch_measured_anew_takes_the_place_of_the_earlier_one(step, tmp_path):
    path, sizes = tmp_path / "step.json", {"d": 1, "n": 1, "k": 1, "trained_steps": 0}

    def machine(batches, value):
        return {"batches": [{"batch": size, "value": value} for size in batches]}

    step.write(
        path, sizes | {"machines": {"a": machine((64, 256, 2048), 0), "b": machine((64,), 0)}}
    )
    now = machine((), 1)
    for size in (64, 256):  # written after each batch
        now["batches"].append({"batch": size, "value": 1})
        step.write(path, sizes | {"machines": {"a": now}})
    found = json.loads(path.read_text())["machines"]
    assert [(one["batch"], one["value"]) for one in found["a"]["batches"]] == [
        (64, 1),
        (256, 1),
        (2048, 0),
    ]
    assert found["b"] == machine((64,), 0)
