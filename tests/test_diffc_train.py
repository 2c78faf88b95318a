import copy
import os
import signal
import time
import warnings
from itertools import chain
from pathlib import Path

import pytest
import torch
from diffc_helpers import separable

from revelio.diffc import conv
from revelio.diffc import fit as fitting
from revelio.diffc.config import FitConfig
from revelio.diffc.conv import Conv2d, fixed_order
from revelio.diffc.fit import fit, right_of
from revelio.diffc.model import DiffC
from revelio.diffc.sources import TensorGrids
from revelio.diffc.train import (
    Training,
    epoch_batches,
    load_training,
    predict,
    save_training,
    train,
)
from revelio.stats import trainings95


@pytest.mark.parametrize(
    ("mode", "period", "end"), [("fixed", 30, 5e-5), ("as_paper", 30, 5e-5), ("as_code", 90, 0.0)]
)
def test_rates_are_torchs_cosine(mode, period: int, end: float) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period, end)
    settings = FitConfig(mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule is stepped without the optimizer
        for epoch in range(30):
            assert settings.rate(epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
            schedule.step()


def test_rates_at_the_ends() -> None:
    assert FitConfig().rate(0) == 1e-4
    assert FitConfig().rate(15) == pytest.approx(7.5e-5)
    assert FitConfig().rate(30) == pytest.approx(5e-5)
    assert FitConfig(mode="as_code").rate(29) == pytest.approx(7.645e-5, rel=1e-3)  # SPEC 2.4
    assert FitConfig(epochs=10).rate(10) == pytest.approx(5e-5)
    assert FitConfig(learning_rate=1e-5).rate(30) == pytest.approx(5e-6)  # it never rises


def test_an_epoch_sees_every_image_once() -> None:
    indices = list(range(5, 38))
    batches = epoch_batches(indices, 16, seed=0, epoch=1)
    assert sorted(chain.from_iterable(batches)) == indices
    assert [len(batch) for batch in batches] == [16, 17]  # a lone last image joins
    assert batches == epoch_batches(indices, 16, seed=0, epoch=1)
    assert batches != epoch_batches(indices, 16, seed=0, epoch=2)


def settings_for(epochs: int) -> FitConfig:
    return FitConfig(epochs=epochs, batch_size=8, learning_rate=1e-3, device="cpu")


def run_plain(model: DiffC, grids, labels, settings: FitConfig) -> None:
    """The same training in plain PyTorch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs, 5e-5)
    model.train()
    for epoch in range(1, settings.epochs + 1):
        for batch in epoch_batches(range(len(labels)), 8, settings.seed, epoch):
            optimizer.zero_grad()
            loss = torch.nn.CrossEntropyLoss()(model(grids[batch]), torch.tensor(labels)[batch])
            loss.backward()
            optimizer.step()
        schedule.step()


def test_training_is_plain_adamw() -> None:
    grids, labels = separable(8)
    settings, model = settings_for(3), DiffC(6, 3, width=8)
    plain = copy.deepcopy(model)
    steps = list(
        train(Training.start(model, settings), TensorGrids([grids], labels), range(24), settings)
    )
    with fixed_order(torch.device("cpu")):
        run_plain(plain, grids, labels, settings)
    for name, value in plain.state_dict().items():
        # A bias before a batch norm has no gradient but rounding, which Adam makes as large as any, and the
        # norm's running mean takes off again.
        if not name.endswith((".0.bias", "running_mean")):
            torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    assert [step.end is not None for step in steps] == [False, False, True] * 3
    assert sum(step.images for step in steps) == 3 * 24


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_training_is_bit_equal(tmp_path: Path, dropout: float) -> None:
    grids, labels = separable(10)
    source, settings = TensorGrids([grids, grids + 1, grids - 1], labels), settings_for(5)
    kept, held = list(range(0, 24)), list(range(24, 30))

    def new() -> Training:
        return Training.start(DiffC(6, 3, width=8, dropout=dropout), settings)

    whole = new()
    list(train(whole, source, kept, settings, validation=held))
    cut = new()
    for state in train(cut, source, kept, settings, validation=held):
        if state.end is not None and state.end.epoch == 2:
            break
    save_training(cut, tmp_path)
    again = new()
    load_training(again, tmp_path)
    assert again.history == cut.history
    list(train(again, source, kept, settings, validation=held))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
        assert torch.equal(again.best[name], whole.best[name]), name
    assert again.best_epoch == whole.best_epoch
    losses = [end.train_loss for end in whole.history]
    assert [end.train_loss for end in again.history] == losses


def test_broken_checkpoint_is_one_line(tmp_path: Path) -> None:
    training = Training.start(DiffC(6, 3, width=8), settings_for(1))
    with pytest.raises(ValueError, match="can't go on from"):
        load_training(training, tmp_path)


def test_best_is_the_best_validated_epoch() -> None:
    grids, labels = separable(10)
    source, settings = TensorGrids([grids], labels), settings_for(6)
    training = Training.start(DiffC(6, 3, width=8), settings)
    held, states = list(range(20, 30)), {}
    for state in train(training, source, range(20), settings, validation=held):
        if state.end is not None:
            states[state.end.epoch] = copy.deepcopy(training.model.state_dict())
    ranks = [(end.validation_top1, -end.validation_loss) for end in training.history]
    assert training.best_epoch == ranks.index(max(ranks)) + 1
    for name, value in states[training.best_epoch].items():
        assert torch.equal(training.best[name], value)
    training.model.load_state_dict(training.best)
    logits, truth = predict(training.model, source, held), torch.tensor(labels)[held]
    assert (logits.argmax(dim=1) == truth).float().mean().item() == pytest.approx(max(ranks)[0])
    assert torch.nn.functional.cross_entropy(logits, truth).item() == pytest.approx(-max(ranks)[1])


def test_separable_grids_are_learnt() -> None:
    grids, labels = separable(40)
    test, truth = separable(20, seed=1)
    seen = []
    result = fit(
        grids, labels, test, truth, classes=("a", "b", "c"),
        config=FitConfig(width=16, epochs=6, learning_rate=2e-3),
        on_epoch=lambda seed, end: seen.append((seed, end.epoch)),
    )  # fmt: skip
    assert result["top1"] == 1.0
    assert result["selected"] == "last" and result["best"]["mean"] == 1.0
    assert result["interval_kind"] == "95 %, test images of one training"
    assert result["interval"][0] == pytest.approx(0.9398, abs=1e-3)  # 60 of 60
    assert result["images"] == {"train": 108, "validation": 12, "test": 60}
    assert seen == [(0, epoch) for epoch in range(1, 7)]
    assert result["seeds"][0]["confusion"] == [[20, 0, 0], [0, 20, 0], [0, 0, 20]]


def test_random_labels_stay_near_chance() -> None:
    grids = torch.randn(200, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 4
    test = torch.randn(400, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    result = fit(
        grids, labels, test, torch.arange(400) % 4, classes=4, config=FitConfig(width=16, epochs=6)
    )
    assert abs(result["top1"] - 0.25) < 0.08  # 3.7 standard deviations


def test_several_seeds_and_last_epoch() -> None:
    grids, labels = separable(12)
    result = fit(
        grids,
        labels,
        grids,
        labels,
        classes=3,
        config=FitConfig(width=8, epochs=2, seeds=3, mode="as_paper"),
    )
    tops = [seed["last"]["test"]["top1"] for seed in result["seeds"]]
    assert result["selected"] == "last"
    assert result["best"] is None
    assert result["last"]["values"] == tops
    assert result["top1"] == pytest.approx(sum(tops) / 3)
    assert result["interval_kind"] == "95 %, trainings and test images"
    assert result["interval"] == pytest.approx(trainings95(tops, 36))
    assert right_of(result).mean(axis=1) == pytest.approx(tops)
    assert result["settings"]["period"] == 2
    histories = [seed["history"][0]["train_loss"] for seed in result["seeds"]]
    assert len(set(histories)) == 3


def test_fit_is_repeatable() -> None:
    grids, labels = separable(12)
    one, two = (
        fit(grids, labels, grids, labels, classes=3, config=FitConfig(width=8, epochs=2, seed=4))
        for _ in range(2)
    )
    assert (
        one["seeds"][0]["history"][0]["train_loss"] == two["seeds"][0]["history"][0]["train_loss"]
    )


def bad_fit(**change: object) -> None:
    grids, labels = separable(4)
    given = {
        "train_grids": grids, "train_labels": labels, "test_grids": grids, "test_labels": labels,
        "classes": 3,
    }  # fmt: skip
    settings = {"width": 8, "epochs": 1} | {
        name: change.pop(name) for name in ("epochs", "batch_size", "seeds") if name in change
    }
    fit(**(given | change), config=FitConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": [0, 1]}, "2 labels for 12 images"),
        ({"test_labels": [0] * 11 + [-1]}, "a label is -1"),
        ({"classes": 2}, "train has label 2, but there are 2 classes"),
        ({"test_grids": torch.randn(12, 5, 4, 4)}, "6 channels, test grids 5"),
        ({"train_grids": torch.randn(12, 6, 4)}, r"shape \(12, 6, 4\)"),
        ({"epochs": 0}, "epochs=0: give 1 or more"),
        ({"batch_size": 1}, "batch_size=1: give 2 or more"),
        ({"seeds": 0}, "seeds=0"),
        ({"train_grids": torch.full((12, 6, 4, 4), torch.nan)}, "the loss became nan"),
    ],
)
def test_wrong_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_fit(**change)


def test_validation_picks_the_epoch_only_where_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of noise: the epochs differ, and the best of them is luck."""
    draw = torch.Generator().manual_seed(0)
    grids, labels = torch.randn(60, 4, 2, 2, generator=draw), torch.arange(60) % 3
    config = FitConfig(width=8, epochs=5, learning_rate=5e-3, validation=0.3, device="cpu")
    for enough, chosen in ((19, "last"), (18, "best")):
        monkeypatch.setattr(fitting, "ENOUGH", enough)
        found = fit(grids, labels, grids, labels, classes=3, config=config)
        one = found["seeds"][0]
        assert found["selected"] == one["selected"] == chosen
        assert found["images"]["validation"] == 18
        assert found["top1"] == one[chosen]["test"]["top1"]
        assert one["last"]["epoch"] == 5 and one["best"]["epoch"] < 5
        assert sum(map(sum, one["confusion"])) == 60
        hits = sum(one["confusion"][c][c] for c in range(3))
        assert hits == one[chosen]["test"]["correct"] == 60 - len(one[chosen]["test"]["wrong"])


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("sizes", [(6, 4, 8, 16), (32, 1, 8, 12), (5, 9, 16, 33)])
def test_the_number_of_threads_changes_nothing(
    sizes: tuple[int, int, int, int], in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_parts:
        monkeypatch.setattr(conv, "PART_MACS", 1)
    channels, side, width, batch = sizes
    draw = torch.Generator().manual_seed(0)
    grids, labels = torch.randn(50, channels, side, side, generator=draw), torch.arange(50) % 4
    config = FitConfig(width=width, batch_size=batch, epochs=2, learning_rate=5e-3, device="cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            result = fit(grids, labels, grids, labels, classes=4, config=config)
            assert torch.get_num_threads() == threads
            for end in result["seeds"][0]["history"]:
                end.pop("seconds")
            found.append(result["seeds"])
    finally:
        torch.set_num_threads(before)
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("macs", [1, 10_000, 2**25])
def test_in_parts_a_convolution_is_what_it_was(macs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "PART_MACS", macs)
    cuts = []
    chunk = torch.Tensor.chunk
    monkeypatch.setattr(torch.Tensor, "chunk", lambda x, n: cuts.append(n) or chunk(x, n))
    layer = Conv2d(5, 7, 3, stride=2, padding=1)
    x = torch.randn(9, 5, 6, 5, requires_grad=True)

    def results() -> list[torch.Tensor]:
        layer.zero_grad()
        x.grad = None
        out = layer(x)
        (out**2).sum().backward()
        found = (out, x.grad, layer.weight.grad, layer.bias.grad)
        return [one.detach().clone() for one in found if one is not None]

    plain = results()
    with fixed_order(torch.device("cpu")):
        in_parts = results()
    # 9 images of 3 x 3 places, with 5 x 7 x 9 weights each; forward, and back for both.
    parts = min(4, 9 * 9 * 315 // macs)
    assert cuts == [parts] * 3 * (parts > 1)
    assert len(plain) == 4
    for one, other in zip(plain, in_parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_forked_process_trains_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "PART_MACS", 1)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    layer = Conv2d(3, 2, 3, padding=1)
    with fixed_order(torch.device("cpu")):
        layer(x)
    child = os.fork()
    if child == 0:
        with fixed_order(torch.device("cpu")):
            layer(x)
        os._exit(0)
    deadline = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process waits for threads that it has not")
        time.sleep(0.05)
