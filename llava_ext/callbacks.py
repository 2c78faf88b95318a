"""What follows a training: the sampler's epoch, and the bar and the log of a run."""

import time
from typing import Any

from transformers import TrainerCallback

from llava_ext.sampler import StepSampler
from revelio.run_dir import Run


class EpochCallback(TrainerCallback):
    """Tells the sampler its epoch, which a resumed run enters in the middle."""

    def __init__(self, sampler: StepSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epochs by the steps that are done: all steps of an epoch are taken."""
        self.sampler.epoch = state.global_step // self.sampler.steps


class LoggingCallback(TrainerCallback):
    """Shows the bar and writes ``metrics.jsonl``."""

    def __init__(self, run: Run | None) -> None:
        self.run = run
        self.started = time.monotonic()
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the bar where the run stands."""
        from tqdm import tqdm

        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", disable=self.run is None
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line, and show the loss."""
        if self.run is None or not logs:
            return
        if "eval_loss" in logs:
            self.run.log(step=state.global_step, validation_loss=logs["eval_loss"])
        if "loss" not in logs:
            return
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        known = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        seconds = round(time.monotonic() - self.started, 3)
        self.run.log(step=state.global_step, **known, seconds=seconds)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar."""
        self.bar.close()
