"""DeepSpeed's own files, written so that a failure is known to all ranks and a file is on the disk when it counts."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, cast

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine


class RecordingCheckpointEngine(TorchCheckpointEngine):
    """Writes, syncs and hashes each file. An error is kept, not raised: the other ranks would wait in a barrier of
    DeepSpeed's, and `take` hands it on when all are past that."""

    def __init__(self, plain: TorchCheckpointEngine):
        super().__init__()
        self.zipfile_serialization = plain.zipfile_serialization
        self._written: dict[Path, tuple[int, str]] = {}
        self._failure: Exception | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok)
        except OSError as error:
            self._failure = self._failure or error

    def save(self, state_dict: dict, path: str) -> None:
        try:
            with Path(path).open("wb") as file:
                hashed = _Hashed(file)
                torch.save(
                    state_dict, cast(BinaryIO, hashed), _use_new_zipfile_serialization=self.zipfile_serialization
                )
                file.flush()
                os.fsync(file.fileno())
            self._written[Path(path)] = Path(path).stat().st_size, hashed.digest.hexdigest()
        except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
            self._failure = self._failure or error

    def take(self) -> tuple[dict[Path, tuple[int, str]], Exception | None]:
        """The files that this rank has written since the last call, with bytes and SHA-256, and the first error."""
        taken = self._written, self._failure
        self._written, self._failure = {}, None
        return taken


class _Hashed:
    """A file that is only ever written on at its end, as `torch.save` does, hashed on the way."""

    def __init__(self, file: BinaryIO):
        self.digest = hashlib.sha256()
        self._file = file

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
