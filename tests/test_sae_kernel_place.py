"""Where a k-SAE computes: what is moved gets what runs there, and what CUDA steps record."""

import re
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from revelio.backbones.hooks import full_precision
from revelio.sae.kernels import select
from revelio.sae.kernels.build import NativeUnavailable, library
from revelio.sae.kernels.native import NativeKernel
from revelio.sae.kernels.select import choose_kernel, fastest_kernel, moved
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder


def test_a_moved_model_has_a_kernel_of_its_device() -> None:
    try:
        library()
    except NativeUnavailable as why:
        pytest.skip(str(why))
    model = KSparseAutoencoder(8, 32, 4)
    model.kernel = fastest_kernel(model)
    assert isinstance(model.kernel, NativeKernel)
    assert moved(model, "cpu").kernel is model.kernel  # nothing moved: its copies stay
    assert isinstance(moved(model, "meta").kernel, SparseKernel)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A CUDA device as far as the choice looks, with a Triton that does what is asked."""

    class Card:
        capability = (9, 0)
        fails: Exception | None = None
        trials = 0

        def tried(self, kernel: object, device: object) -> None:
            self.trials += 1
            if self.fails is not None:
                raise self.fails

    card = Card()
    for name, member in (("cuda", "CudaKernel"), ("cuda_trial", "tried")):
        module = ModuleType(f"revelio.sae.kernels.{name}")
        setattr(module, member, SparseKernel if name == "cuda" else card.tried)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(select, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card.capability)
    select._without_triton.cache_clear()
    yield card
    select._without_triton.cache_clear()


def test_a_card_that_triton_compiles_for_is_tried_once(card: Any) -> None:
    for _ in range(3):
        assert choose_kernel("auto", "cuda").reason.startswith("kernel: Triton, exact")
    assert choose_kernel("triton", "cuda") and card.trials == 1
    with pytest.raises(ValueError, match="no native kernel: it runs on a CPU, not on cuda"):
        choose_kernel("native", "cuda")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (RuntimeError("Failed to find C compiler.\nSet CC"), "Failed to find C compiler. Set CC"),
        (ImportError("libcuda.so: driver too old"), "ImportError: libcuda.so: driver too old"),
        (AssertionError("x" * 999), f"AssertionError: {'x' * select.LONGEST_CAUSE}\\)"),
    ],
    ids=["no compiler", "driver", "long"],
)  # fmt: skip
def test_where_triton_cannot_compile_pytorch_is_taken_and_the_cause_said(
    card: Any, fails: Exception, said: str
) -> None:
    card.fails = fails
    chosen = choose_kernel("auto", "cuda")
    assert isinstance(chosen.kernel, SparseKernel) and "\n" not in chosen.reason
    assert re.search(rf"^kernel: PyTorch \(no Triton kernel: its programs .*{said}", chosen.reason)
    with pytest.raises(ValueError, match=r"no triton kernel: its programs .*; or set kernel to"):
        choose_kernel("triton", "cuda")
    assert card.trials == 1


def test_an_old_card_is_not_tried_and_memory_that_ran_out_is_no_fault_of_triton(card: Any) -> None:
    card.capability = (7, 5)
    assert (
        "compute capability is 7.5, Triton compiles from 8.0"
        in choose_kernel("auto", "cuda:1").reason
    )
    assert card.trials == 0
    card.capability, card.fails = (8, 0), torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        choose_kernel("auto", "cuda:0")


def test_who_takes_a_model_s_fastest_kernel_is_warned_in_a_line(card: Any) -> None:
    card.fails = RuntimeError("no ptxas")
    weight = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"), is_cuda=True)
    model: Any = SimpleNamespace(kernel=SparseKernel(), W_enc=weight)
    with pytest.warns(UserWarning, match="^kernel: PyTorch .*no ptxas") as said:
        fastest_kernel(model)
    assert len(said) == 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Records sizes in the place of graphs."""
    pytest.importorskip("triton")
    from revelio.sae.kernels import cuda_graph

    class Graphless(cuda_graph.RecordedStep):
        def __init__(self) -> None:
            super().__init__(KSparseAutoencoder(8, 32, 4), Any)
            self.sizes: list[int] = []
            self.replayed: list[int] = []

        def _places(self) -> tuple[int, ...]:
            return ()

        def _record(self, take: Any, x: Any, adam: Any, now: Any) -> Any:
            self.sizes.append(len(x))
            replay = {"replay": staticmethod(lambda: self.replayed.append(len(x)))}
            graph: Any = type("Graph", (), replay)
            return cuda_graph._Recorded(graph, x.clone(), now, torch.zeros(1), (), None)

    monkeypatch.setattr(cuda_graph, "clock", lambda *_: torch.zeros(1))
    return Graphless()


@pytest.mark.parametrize("last", [0, 5, 16])
def test_full_batches_are_recorded_and_not_an_epoch_s_last_one(recorder: Any, last: int) -> None:
    plain: list[int] = []
    step = recorder.bound(lambda x, *_: plain.append(len(x)) or torch.zeros(1))
    sizes = [size for _ in range(20) for size in (16, 16, 16, last) if size]
    for size in sizes:
        step(torch.zeros(size, 8), Any, size)
    full = sizes.count(16)
    assert recorder.sizes[-1] == 16 and len(recorder.sizes) == 1
    assert recorder.replayed.count(16) == full - 3
    assert plain.count(16) == 3  # plain steps before recording
    assert len(plain) + len(recorder.replayed) == len(sizes)


def test_a_step_is_recorded_anew_once_when_the_k_sae_has_learned(
    recorder: Any, monkeypatch: Any
) -> None:
    from revelio.sae.kernels import cuda_graph

    forgot: list[int] = []
    nomination = type("Nomination", (), {"forget": lambda self: forgot.append(len(plain))})()
    recorder._kernel = type("Kernel", (), {"nomination": nomination, "holds": None})()
    monkeypatch.setattr(cuda_graph, "REPLAYS", 10)
    plain: list[int] = []
    step = recorder.bound(lambda x, *_: plain.append(len(x)) or torch.zeros(1))
    for _ in range(40):
        step(torch.zeros(16, 8), Any, 16)
    assert recorder.sizes == [16, 16] and forgot == [3]
    # Plain steps before each of the two, in which the ways are tried.
    assert len(plain) == 6 and len(recorder.replayed) == 34


def test_a_short_first_size_gives_way_to_a_larger_one(recorder: Any) -> None:
    step = recorder.bound(lambda x, *_: torch.zeros(1))
    for size in [5] * 6 + [16] * 6 + [5]:
        step(torch.zeros(size, 8), Any, size)
    assert recorder.sizes == [5, 16]
    assert recorder.replayed == [5] * 3 + [16] * 3


def test_where_recording_fails_steps_are_taken_plainly(recorder: Any, monkeypatch: Any) -> None:
    tried: list[int] = []

    def fails(take: Any, x: Any, adam: Any, now: Any) -> Any:
        tried.append(len(x))
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(recorder, "_record", fails)
    plain: list[int] = []
    step = recorder.bound(lambda x, *_: plain.append(len(x)) or torch.full((1,), float(len(x))))
    with pytest.warns(UserWarning, match="not recorded .* not permitted when stream") as said:
        found = [step(torch.zeros(size, 8), Any, size) for size in [16] * 6 + [32] * 6]
    assert len(said) == 1 and tried == [16] and plain == [16] * 6 + [32] * 6
    assert [float(each) for each in found] == plain


def test_memory_that_runs_out_while_recording_is_no_fault_of_recording(
    recorder: Any, monkeypatch: Any
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recorder, "_record", fails)
    step = recorder.bound(lambda x, *_: torch.zeros(1))
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(5):
            step(torch.zeros(16, 8), Any, 16)


def test_full_precision_takes_either_names_of_pytorch() -> None:
    cudnn: Any = torch.backends.cudnn
    with full_precision():
        assert cudnn.allow_tf32 is False
    assert cudnn.allow_tf32 is True
    if not hasattr(cudnn, "conv"):
        return
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"  # a user's: the older name can't be read any more
    try:
        with full_precision():
            assert cudnn.conv.fp32_precision == "ieee"
        assert cudnn.conv.fp32_precision == "ieee"
    finally:
        cudnn.conv.fp32_precision = before
    assert cudnn.allow_tf32 is True
