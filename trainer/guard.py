"""Trouble in the numbers: a step whose loss or gradient is not finite, or whose loss leaps, is skipped by all ranks."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from trainer.data.samples import Batch
from trainer.dist import gather, log
from trainer.errors import NumbersError
from trainer.evaluate import count_supervised

NOT_FINITE, LOSS_SPIKE = "not_finite", "loss_spike"
"""Why a step was skipped: keys of its line in metrics.jsonl, each with the keys of its samples."""
WINDOW = 64
"""Applied steps whose median loss a step's is held against."""
ENOUGH = 16
"""Of these at least; before, nothing is a spike."""


class StepGuard:
    """Which steps of a run were skipped, and whether there are too many.

    max_loss_ratio: a loss of more than so many times the median of the last steps is a spike; None: none is.
    max_skipped: steps in a row that may be skipped. recent_losses: of the run so far.
    """

    def __init__(self, max_loss_ratio: float | None, max_skipped: int, recent_losses: Sequence[float]):
        self.max_loss_ratio, self.max_skipped = max_loss_ratio, max_skipped
        self.recent_losses = deque(recent_losses, maxlen=WINDOW)
        self.skipped = 0
        """Since the start or resume."""
        self.skipped_in_a_row = 0

    def is_spike(self, loss: float) -> bool:
        """Whether a step's loss leaps. The same on all ranks, as the loss is."""
        if self.max_loss_ratio is None or len(self.recent_losses) < ENOUGH:
            return False
        return loss > self.max_loss_ratio * median(self.recent_losses)

    def note(self, step: int, applied: bool, loss: float, micro: list[Batch], losses: list[float]) -> dict[str, list]:
        """Notes how a step ended, on all ranks alike.

        loss: of the step; losses: this rank's parts of it, by micro-batch. What metrics.jsonl is to say of a skipped
        step: the keys of its samples whose loss is not finite, of all where only a gradient is not, or those of the
        micro-batch with the highest loss of a spike.
        """
        if applied:
            self.skipped_in_a_row = 0
            self.recent_losses.append(loss)
            return {}
        self.skipped += 1
        self.skipped_in_a_row += 1
        here = [(part / max(1, count_supervised(b)), b["keys"]) for part, b in zip(losses, micro, strict=True)]
        parts = [part for of_rank in gather(here) for part in of_rank]
        if self.is_spike(loss):
            _, keys = max(parts)
            kind, what = LOSS_SPIKE, f"its loss of {loss:.4g} leaps from {median(self.recent_losses):.4g}"
        else:
            bad = [part for part in parts if not math.isfinite(part[0])]
            keys = [key for _, keys in bad or parts for key in keys]
            kind, what = NOT_FINITE, "not finite"
        log.warning("step %d was skipped: %s, with %s", step, what, ", ".join(keys[:16]))
        return {kind: keys}

    def check(self, step: int) -> None:
        """Raises NumbersError, on all ranks, after too many skipped steps in a row."""
        if self.skipped_in_a_row >= self.max_skipped:
            raise NumbersError(
                f"{self.skipped_in_a_row} steps in a row, up to step {step}, were skipped (train.max_skipped_steps): a "
                f"loss or gradient was not finite, or the loss too high; metrics.jsonl names their samples under "
                f"{NOT_FINITE} and {LOSS_SPIKE}, launch/inspect_step.py shows them. The newest checkpoint is from "
                f"before: lower the learning rate, or leave out what is wrong, and go on from it",
                on_all_ranks=True,
            )
