"""Progress of a pipeline, for people: its lines, and a bar while units of work are counted."""

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from revelio.pipelines import Progress


class Bar:
    """Prints what a pipeline reports; ends the bar when the work is done, before further lines.

    Args:
        title: what stands in front of the bar, where the pipeline does not say what it is doing.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, progress: "Progress") -> None:
        """Show one report."""
        if progress.total:
            self._advance(progress)
        if progress.message and self._bar is not None:
            self._bar.write(progress.message)
        elif progress.message:
            print(progress.message, flush=True)
        if progress.total and progress.done >= progress.total:
            self._close()  # another count may follow

    def _advance(self, progress: "Progress") -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=progress.total,
                initial=max(progress.done - 1, 0),
                unit=progress.unit,
                desc=progress.title or self.title,
                smoothing=0.05,
            )
        self._bar.update(progress.done - self._bar.n)
        if progress.numbers:
            self._bar.set_postfix(dict(progress.numbers))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
