"""What is frozen, what trains, and how many parameters: printed before anything trains."""

from collections.abc import Sequence

from torch import nn

from llava_ext.model import LlavaModel


def frozen_and_trained(model: LlavaModel, towers: Sequence[str] = ()) -> str:
    """A table of what is frozen and what trains, with parameter counts, to be printed before training.

    Args:
        model: after :meth:`LlavaModel.trainable`.
        towers: names of the frozen towers, which are no part of the model.
    """
    rows = [(f"tower {name}", "frozen, outside the model", "") for name in towers]
    names = [f"projector {tower.backbone} {tower.layer}" for tower in model.settings.towers]
    parts = [*zip(names, model.projectors, strict=True), ("language model", model.language_model)]
    everything = trained = 0
    for name, module in parts:
        total, learnt = _counts(module)
        everything, trained = everything + total, trained + learnt
        state = "trains" if learnt == total else "frozen" if not learnt else f"{learnt:,} train"
        rows.append((name, state, f"{total:,}"))
    rows.append(("in all", f"{trained:,} train", f"{everything:,}"))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c:>15}".rstrip() for a, b, c in rows)


def _counts(module: nn.Module) -> tuple[int, int]:
    """Parameters of a module, and how many of them train; ZeRO-3 leaves the true size in ds_numel."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learnt in sizes if learnt)
