"""What fuzzing found, and what was wrong then: each input stays, and ``make test`` runs it."""

from __future__ import annotations

CRASHES: dict[str, list[bytes]] = {
    # No fault of the code: a refusal and a frame without end in one piece; the target demanded too much.
    "hello_frames": [
        bytes.fromhex(
            "260a2408451a20808b82838485868788898a8b8c278e908f90919293949596970442260a2408451a"
            "208081828384808182838485868788898a8b8c278e8f909192939495969785868788898a8b8c8d8e"
            "8f04420208069d"
        )
    ],
    # tomllib raises RecursionError, which was shown with a traceback instead of a sentence.
    "configs": [b"a=" + b"[" * 5000, b"a=" + b"{a=" * 3000],
}
"""Target -> inputs."""
