"""What p2pd prints: the last lines kept for explanations, everything in a bounded log file. No event loop here."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Final

MAX_LINES: Final = 50
"""Lines kept in memory."""
MAX_LINE_CHARS: Final = 500
"""Longer lines are cut there."""
MAX_LOG_BYTES: Final = 5 * 1024 * 1024
"""Size at which the log becomes ``.1`` and a new one begins: at most twice as much on disk."""


class OutputTail:
    """Takes p2pd's output as it comes, in any cutting."""

    def __init__(self, log_path: Path | None) -> None:
        """``log_path``: file to write to as well, begun anew (the one before becomes ``.1``); None = none.

        A log that cannot be written is given up silently: p2pd matters more.
        """
        self.lines: deque[str] = deque(maxlen=MAX_LINES)
        """Whole lines, newest last, without control characters."""
        self._partial = bytearray()
        self._log_path = log_path
        self._log_fd: int | None = None
        self._log_bytes = 0
        self._begin_log()

    def feed(self, data: bytes) -> None:
        """Bytes that p2pd wrote; ``b""`` at the end of its output."""
        self._write_log(data)
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._take(piece)
            self._end_line()
        self._take(rest)
        if not data:
            self._end_line()

    def close(self) -> None:
        """Close the log file; idempotent."""
        fd, self._log_fd = self._log_fd, None
        if fd is not None:
            os.close(fd)

    def _take(self, piece: bytes) -> None:
        room = MAX_LINE_CHARS - len(self._partial)
        self._partial += piece[:room]

    def _end_line(self) -> None:
        text = self._partial.decode(errors="replace")
        self._partial.clear()
        # A peer's text may end up in p2pd's log, and the log on somebody's terminal.
        text = "".join(char if char.isprintable() else " " for char in text).rstrip()
        if text:
            self.lines.append(text)

    def _begin_log(self) -> None:
        if self._log_path is None:
            return
        self.close()
        try:
            if self._log_path.exists():
                os.replace(self._log_path, self._log_path.with_name(self._log_path.name + ".1"))
            self._log_fd = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError:
            self._log_path = None
        self._log_bytes = 0

    def _write_log(self, data: bytes) -> None:
        if self._log_bytes + len(data) > MAX_LOG_BYTES:
            self._begin_log()
        if self._log_fd is None:
            return
        try:
            self._log_bytes += os.write(self._log_fd, data)
        except OSError:
            self.close()
            self._log_path = None
