"""The record of a run: metrics.jsonl, TensorBoard, one progress bar.

Rank 0 alone writes. metrics.jsonl has a line for every optimizer step; on resume, lines and points behind the
checkpoint are dropped, so no step appears twice.
"""

import html
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from trainer.answers import Question
from trainer.dist import log
from trainer.guard import LOSS_SPIKE, NOT_FINITE

GIB = 2**30

PARTS = ("data", "forward", "backward", "optimizer")
"""Of a step whose share of its time is shown."""


class Recorder:
    """Writes what a step measured to every place where people look."""

    def __init__(self, output_dir: Path, name: str, step: int, last_step: int, every_steps: int, enabled: bool):
        self.every_steps = every_steps
        self.last_step = last_step
        self.enabled = enabled
        if not enabled:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        file = output_dir / "metrics.jsonl"
        keep_lines(file, lambda line: line["step"] <= step)
        self._file = file.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1)
        # Quiet when the output is not a terminal.
        self._bar = tqdm(total=last_step, initial=step, desc=name, unit="step", disable=None)

    def step(self, line: dict[str, Any]) -> None:
        """Records one optimizer step: a line of metrics.jsonl, and every so often a log line and a point."""
        if not self.enabled:
            return
        # What is no number is none in JSON either.
        found = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        self._file.write(json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        step = line["step"]
        for kind in (NOT_FINITE, LOSS_SPIKE):
            if kind in line:
                self._tensorboard.add_text(f"train/{kind}", html.escape(", ".join(line[kind])), step)
        self._bar.update(1)
        self._bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
        if step % self.every_steps and step not in (1, self.last_step):
            return
        seconds = line["step_time"]
        points: dict[str, float | None] = {
            "loss": line["loss"], "grad_norm": line["grad_norm"], "epoch": line["epoch"],
            "data_wait_seconds": line["data_time"], "step_seconds": seconds, "memory_gib": peak_memory() / GIB,
            **{f"{what}_per_second": line[what] / seconds for what in ("tokens", "supervised_tokens", "images")},
            **{f"share/{part}": line[f"{part}_time"] / seconds for part in PARTS},
            **{name: line[name] for name in ("tflops", "mfu", "hfu")},
            **{name: line[name] for name in ("skipped_steps", "truncated_samples", "bad_samples")},
            **{f"epoch/{source}": epoch for source, epoch in line.get("epochs", {}).items()},
            **{f"learning_rate/{part}": rate for part, rate in line["learning_rate"].items()},
        }  # fmt: skip
        for name, value in points.items():
            if value is None:
                continue  # the gradient norm of a skipped step, or a share of a peak that is not known
            self._tensorboard.add_scalar(f"train/{name}", value, step)
        self._tensorboard.flush()
        if self._bar.disable:
            log.info(
                "step %d/%d  loss %.4f  grad_norm %.3f  %.0f tokens/s  data wait %.0f%%%s", step, self.last_step,
                line["loss"], line["grad_norm"] or math.nan, line["tokens"] / seconds,
                100 * line["data_time"] / seconds, f"  MFU {line['mfu']:.1%}" if line["mfu"] else "",
            )  # fmt: skip

    def evaluation(self, step: int, loss: float) -> None:
        """Records a held-out loss."""
        if self.enabled:
            self._tensorboard.add_scalar("eval/loss", loss, step)
            self._tensorboard.flush()
        log.info("step %d  held-out loss %.4f", step, loss)

    def answers(self, step: int, answered: list[tuple[Question, str]]) -> None:
        """Records what the model answers to held-out samples: a table, and the pictures in its order."""
        if not self.enabled or not answered:
            return
        rows = [("sample", "question", "expected", "answer"), ("---",) * 4]
        rows += [(q.key, q.text, q.expected, answer) for q, answer in answered]
        table = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
        self._tensorboard.add_text("eval/answers", table, step)
        pictures = [question.pixel_values for question, _ in answered if len(question.pixel_values)]
        if pictures:
            self._tensorboard.add_images("eval/pictures", torch.cat(pictures), step)
        self._tensorboard.flush()

    def pause(self, step: int, seconds: float) -> None:
        """Records how long a save has kept training waiting."""
        if self.enabled:
            self._tensorboard.add_scalar("train/save_seconds", seconds, step)
            self._tensorboard.flush()
        log.info("step %d  saving took %.1f s", step, seconds)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.enabled:
            self._bar.close()
            self._tensorboard.close()
            self._file.close()


def _cell(text: str) -> str:
    """Someone's text as a cell of a Markdown table, and nothing else."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;")


def peak_memory() -> int:
    """Bytes: the most that the accelerator's allocator held, or the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_lines(file: Path, kept: Callable[[dict], bool]) -> list[dict]:
    """Keeps the lines of a JSONL file that are wanted, and drops a last one that a kill cut short; what is kept."""
    if not file.exists():
        return []
    lines, entries = [], []
    # Not `splitlines`: a key may hold what ends a line for Python, but not for JSON.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if kept(entry := json.loads(line)):
                lines.append(line + "\n")
                entries.append(entry)
        except (ValueError, KeyError, TypeError):
            continue
    partial = file.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(file)
    return entries
