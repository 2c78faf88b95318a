"""The scheduler of a pipeline's folder: its training schedule, and diffusers' own object for generation.

Schedulers for sampling (Euler, DPM, ...) add noise in other units; the training index t means the same for
all, and any of their configs says the schedule of training, which is all that activations need.
"""

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from revelio.backbones.diffusion.schedule import Schedule
from revelio.backbones.loading import reading
from revelio.backbones.source import Source
from revelio.trust import printable
from revelio.wording import plural

PATH = "scheduler/scheduler_config.json"
MOST_STEPS = 1_000_000
MOST_SHIFT = 1000.0
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Without these diffusers would take other betas without a word.
NEEDED = ("beta_schedule", "beta_start", "beta_end")


def load_schedule(source: Source) -> Schedule:
    """The schedule that the model was trained on.

    Raises:
        ValueError: the scheduler's config is missing or says no schedule.
    """
    config = source.json(PATH, infinite=True)  # DPM-Solver's lambda_min_clipped is -Infinity
    where = f"{PATH} of {source.name}"
    flow = str(config.get("_class_name")).startswith("FlowMatch")
    given = flow or config.get("trained_betas") is not None
    needed = ("num_train_timesteps", *(() if given else NEEDED))
    missing = [name for name in needed if config.get(name) is None]
    if missing or not str(config.get("_class_name")).endswith("Scheduler"):
        raise ValueError(
            f"{where} is no scheduler's config with a noise schedule: it is of a "
            f"{printable(config.get('_class_name'))} and lacks {', '.join(missing) or 'nothing else'}"
        )
    steps = config["num_train_timesteps"]
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"{where} has num_train_timesteps {steps!r}")
    return _flow(config, where) if flow else _ddpm(config, where)


def _flow(config: Mapping[str, Any], where: str) -> Schedule:
    # With dynamic shifting the shift depends on the image size when sampling; training is unshifted.
    shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
    if type(shift) not in (int, float) or not 0 < shift <= MOST_SHIFT:
        raise ValueError(f"{where} has shift {printable(repr(shift))[:80]}: it must be above 0")
    return Schedule.rectified_flow(config["num_train_timesteps"], float(shift))


def _ddpm(config: Mapping[str, Any], where: str) -> Schedule:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"{where} has prediction_type {printable(repr(prediction))[:80]}: known are "
            f"{', '.join(PREDICTIONS)}"
        )
    with reading(where):
        scheduler: Any = DDPMScheduler.from_config(dict(config))
    steps = len(scheduler.alphas_cumprod)
    if steps != config["num_train_timesteps"]:
        raise ValueError(
            f"{where} has {plural(steps, 'beta')} for {plural(config['num_train_timesteps'], 'timestep')}"
        )
    if not bool(((scheduler.betas >= 0) & (scheduler.betas <= 1)).all()):
        raise ValueError(f"{where} has betas that are no noise schedule: they must be from 0 to 1")
    return Schedule.ddpm(scheduler.alphas_cumprod, prediction)


def load_scheduler(source: Source) -> Any:
    """The pipeline's own scheduler, an object of diffusers.

    Raises:
        ValueError: its class is none of diffusers' schedulers, or the config does not fit it.
    """
    config = source.json(PATH, infinite=True)
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
        raise ValueError(
            f"{PATH} of {source.name} is of a {printable(name)}, no scheduler of diffusers"
        )
    with reading(f"{PATH} of {source.name}"):
        return kind.from_config(config)  # type: ignore[attr-defined]
