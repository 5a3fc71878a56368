"""DeepSpeed's own files, written so that a failure is known to all ranks and a file is on the disk when it counts."""

import hashlib
import os
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine


class RecordingCheckpointEngine(TorchCheckpointEngine):
    """Writes, syncs and hashes each file. An error is kept, not raised: the other ranks would wait in a barrier of
    DeepSpeed's, and `take` hands it on when all are past that."""

    def __init__(self, plain: TorchCheckpointEngine):
        super().__init__()
        self.zipfile_serialization = plain.zipfile_serialization
        self._written: dict[Path, str] = {}
        self._failure: Exception | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok)
        except OSError as error:
            self._failure = self._failure or error

    def save(self, state_dict: dict, path: str) -> None:
        try:
            with Path(path).open("wb") as file:
                torch.save(state_dict, file, _use_new_zipfile_serialization=self.zipfile_serialization)
                file.flush()
                os.fsync(file.fileno())
            self._written[Path(path)] = file_hash(Path(path))
        except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
            self._failure = self._failure or error

    def take(self) -> tuple[dict[Path, str], Exception | None]:
        """The files that this rank has written since the last call, with their hashes, and the first error."""
        taken = self._written, self._failure
        self._written, self._failure = {}, None
        return taken


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
