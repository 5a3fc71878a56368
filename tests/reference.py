"""Where the reference data lies: the folder `shared` beside the checkout, or the one `MQWEN_SHARED` names."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("MQWEN_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def shared(name: str) -> Path:
    """Path of a file or folder of the reference data; skips the test that asks for it where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference data {path} is absent; MQWEN_SHARED names the folder that holds it")
    return path
