"""Which p2pd to start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lloom_sidecar.errors import StartError

_PACKAGED = Path(__file__).parent.parent / "_bin" / "p2pd"


def find_p2pd(configured: Path | None) -> Path:
    """The configured one, else the one inside this package, else PATH's.

    Raises StartError, one sentence, when there is none.
    """
    if configured is not None:
        return configured
    if _PACKAGED.is_file() and os.access(_PACKAGED, os.X_OK):
        return _PACKAGED
    found = shutil.which("p2pd")
    if found is None:
        raise StartError(
            f"there is no p2pd: {_PACKAGED} does not exist and PATH has none; install the package again with "
            "`pip install .`, or name one with --p2pd PATH"
        )
    return Path(found)
