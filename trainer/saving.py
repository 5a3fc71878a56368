"""Saving without standing still.

    training waits:   DeepSpeed's files, and a copy of the trained weights in rank 0's memory
    beside training:  the export, its hashes, manifest.json, then the checkpoint's name, then `latest`

Everything is written into a folder with another name, and is on the disk before that becomes the checkpoint's.
"""

import contextlib
import json
import math
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError

from trainer import export, lora, manifest
from trainer.card import BASE_CARD, ModelCard
from trainer.checkpoint import BEST, DEEPSPEED, STATE, RunState, existing, name_of, read_best, sweep
from trainer.config import CheckpointConfig
from trainer.data.writer import sync, write_whole
from trainer.dist import World, gather, log, on_main_rank, on_ranks, raise_together
from trainer.engine import full_weights
from trainer.errors import CheckpointError, UserError
from trainer.folders import EXPORT, LATEST
from trainer.frozen import FrozenWeights
from trainer.models.processing_mqwen_vl import MQWenVLProcessor
from trainer.run_lock import RunLock


class Saver:
    """Writes the checkpoints of a run, one at a time.

    resumed_from: checkpoint whose frozen files are shared, if its weights are those of the engine.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        world: World,
        output_dir: Path,
        retention: CheckpointConfig,
        processor: MQWenVLProcessor,
        card: ModelCard,
        resumed_from: Path | None,
        resumed_fingerprint: str,
    ):
        self.engine, self.world, self.output_dir, self.retention = engine, world, output_dir, retention
        self.processor, self.card = processor, card
        self.frozen = FrozenWeights(engine)
        self.failure: UserError | None = None
        """On rank 0: why the last checkpoint could not be written. All ranks are to hear of it at the next step."""
        self._lock: RunLock | None = None
        self._abandoned = False
        self._file_mode = export.usual_file_mode()
        self._has_adapter = any(lora.is_adapter(name) for name, _ in engine.module.named_parameters())
        self._model_folder = lora.BASE if self._has_adapter else EXPORT
        """Folder in a checkpoint that has the complete model."""
        self._newest = resumed_from if resumed_fingerprint == self.frozen.fingerprint else None
        self._thread: threading.Thread | None = None
        export.describe(engine.module)

    def save(self, state: RunState, held_out_loss: float | None = None, lock: RunLock | None = None) -> None:
        """Takes down a checkpoint; it counts once `wait`, or rank 0's log, says so. All ranks call this.

        held_out_loss: of this step, if it is known: the best is kept. lock: of the folder; nothing counts once it is
        lost.

        Raises CheckpointError on all ranks, and leaves everything as it was, where one of them cannot write its part,
        where the checkpoint before could not be written, or where frozen weights have changed.
        """
        self.wait()
        self._lock = lock
        self.frozen.check()
        started, final = time.monotonic(), self.output_dir / name_of(state.step)
        partial = final.with_name(f".{final.name}.partial")

        def start() -> None:
            shutil.rmtree(partial, ignore_errors=True)  # left by a save that was killed
            partial.mkdir()

        on_ranks(self.world.is_main, lambda: _named(final, start))
        self.engine.save_checkpoint(str(partial), tag=DEEPSPEED, save_latest=False, exclude_frozen_parameters=True)
        written, failure = self.engine.checkpoint_engine.take()
        try:
            raise_together(_refusal(final, failure) if failure else None)
        except CheckpointError:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        own = {str(file.relative_to(partial)): entry for file, entry in written.items()}
        entries = {name: entry for of_rank in gather(own) for name, entry in of_rank.items()}
        trained, frozen = full_weights(self.engine, trained=True), self._frozen_weights()
        if self.world.is_main:
            arguments = final, partial, state, held_out_loss, entries, trained, frozen, started
            # A daemon: who ends at once (a second Ctrl-C) leaves a partial folder, which the next start removes.
            self._thread = threading.Thread(target=self._finish, args=arguments, name="saver", daemon=True)
            self._thread.start()

    def _frozen_weights(self) -> dict[str, torch.Tensor] | Path | None:
        """What `export.write` takes: the newest export, if it is still there, else the weights. All ranks call this."""
        if not self.frozen.names:
            return None

        def there() -> bool:
            return self._newest is not None and bool(export.frozen_files(self._newest / self._model_folder))

        if on_main_rank(self.world, there):
            assert not self.world.is_main or self._newest
            return self._newest / self._model_folder if self._newest else None
        return lora.split(full_weights(self.engine, trained=False))[0]

    def _finish(self, final: Path, partial: Path, *parts: Any) -> None:
        """The part beside training, on rank 0."""
        try:
            _named(final, lambda: self._write(final, partial, *parts))
        except UserError as error:
            self.failure = error
            log.error("%s", error)
            shutil.rmtree(partial, ignore_errors=True)
        except BaseException as error:  # a thread's error would be lost
            self.failure = CheckpointError(f"{final}: cannot be saved ({error!r}); the checkpoints before are whole")
            raise

    def _write(
        self, final: Path, partial: Path, state: RunState, held_out_loss: float | None, entries: manifest.Entries,
        trained: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor] | Path | None, started: float,
    ) -> None:  # fmt: skip
        model, folder = self.engine.module, partial / self._model_folder
        own, adapter = lora.split(trained)
        card = self.card.text(state.step, held_out_loss)
        about = BASE_CARD if self._has_adapter else card
        linked = export.write(model, own, frozen, folder, self.processor, about, self._file_mode)
        folders = [folder]
        if self._has_adapter:
            folders.append(partial / EXPORT)
            base, tokenizer = final / lora.BASE, self.processor.tokenizer
            lora.write_adapter(model, adapter, base, partial / EXPORT, tokenizer, card, self._file_mode)
        (partial / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")
        known = {}
        if isinstance(frozen, Path):  # on the disk, and hashed, already
            before = manifest.read(frozen.parent)
            known = {name: before[name] for name in (f"{folder.name}/{file}" for file in linked)}
        for file in [partial / STATE, *(file for each in folders for file in each.iterdir())]:
            name = str(file.relative_to(partial))
            if name not in known:
                sync(file)
                known[name] = file.stat().st_size, manifest.file_hash(file)
        manifest.write(partial, {**entries, **known})
        for path in (partial / manifest.MANIFEST, partial / DEEPSPEED, *folders, partial):
            sync(path)
        if self._lock:
            self._lock.check()
        if self._abandoned:
            return
        _announce(partial, final)
        self._newest = final
        log.info("saved %s, whole after %.1f s", final, time.monotonic() - started)
        if self.retention.keep_best and held_out_loss is not None:
            note_best(self.output_dir, state.step, held_out_loss)
        remove_old(self.output_dir, final, self.retention)

    def wait(self) -> None:
        """Returns once no checkpoint is being written. All ranks call this. Raises, on all, why one could not be."""
        self.join()
        failure, self.failure = self.failure, None
        raise_together(failure)

    def join(self) -> None:
        """Waits on this rank alone."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def settle(self) -> None:
        """As `wait`, for a run that has failed already: what goes wrong is in the log. All ranks call this."""
        with contextlib.suppress(UserError):
            self.wait()

    def abandon(self) -> None:
        """Gives up a checkpoint that is still being written: it will not count. One that is whole stays."""
        self._abandoned = self._thread is not None


def _named(final: Path, task: Any) -> None:
    """Runs a part of saving; what the disk refuses becomes a CheckpointError."""
    try:
        task()
    except (OSError, SafetensorError) as error:
        raise _refusal(final, error) from error


def _refusal(final: Path, error: Exception) -> CheckpointError:
    # PyTorch's writer says where it failed; what the disk said is behind it.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
    return CheckpointError(
        f"{final}: cannot be saved ({reason}); the checkpoints before it are as they were. Make room, or mend the "
        f"folder, and start again: --resume auto goes on from the last whole one"
    )


def _announce(partial: Path, final: Path) -> None:
    """Gives a whole checkpoint its name, and then moves the pointer to it."""
    output_dir, replaced = final.parent, final.with_name(f".{final.name}.replaced")
    if final.exists():  # saved before, by a run that went on from an older one
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    write_whole(output_dir / LATEST, final.name + "\n")


def remove_old(output_dir: Path, newest: Path, retention: CheckpointConfig) -> None:
    """Removes the oldest checkpoints, but never the newest, the best, or one that is kept for its step. What the disk
    refuses, as NFS does while somebody reads it, is logged, and tried again the next time."""
    sweep(output_dir)
    if not retention.keep_last:
        return
    # After a resume from an older checkpoint the newest is not the one with the highest step.
    others = [path for path in existing(output_dir) if path != newest]
    for old in others[: max(0, len(others) + 1 - retention.keep_last)]:
        kept_for_its_step = retention.keep_every and int(old.name.rpartition("-")[2]) % retention.keep_every == 0
        if not kept_for_its_step and old.name != read_best(output_dir).get("checkpoint"):
            try:  # first the name: nobody is to take what is half removed for a checkpoint
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))
            except OSError as error:
                log.warning("%s cannot be removed (%s)", old, error)


def note_best(output_dir: Path, step: int, held_out_loss: float) -> None:
    """Points best.json to a step's checkpoint, if there is one and its held-out loss is the lowest so far."""
    if (output_dir / name_of(step)).is_dir() and held_out_loss < read_best(output_dir).get("held_out_loss", math.inf):
        best = {"checkpoint": name_of(step), "held_out_loss": held_out_loss}
        write_whole(output_dir / BEST, json.dumps(best) + "\n")
