"""Where a k-SAE computes: what is moved gets what runs there, and what CUDA steps record."""

from typing import Any

import pytest
import torch

from revelio.backbones.hooks import full_precision
from revelio.sae.kernels.build import NativeUnavailable, library
from revelio.sae.kernels.native import NativeKernel
from revelio.sae.kernels.select import fastest_kernel, moved
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


def test_a_short_first_size_gives_way_to_a_larger_one(recorder: Any) -> None:
    step = recorder.bound(lambda x, *_: torch.zeros(1))
    for size in [5] * 6 + [16] * 6 + [5]:
        step(torch.zeros(size, 8), Any, size)
    assert recorder.sizes == [5, 16]
    assert recorder.replayed == [5] * 3 + [16] * 3


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
