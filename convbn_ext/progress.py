"""Residual and rate on standard error: one line rewritten on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_TERMINAL_SECONDS, _PLAIN_SECONDS = 0.1, 5.0


class Progress:
    """Context manager that shows ``step(residual)`` now and then.

    Args:
        label: what is being done.
        enabled: False makes every call cheap and silent.
    """

    def __init__(self, label: str, enabled: bool = True) -> None:
        self.label, self.enabled = label, enabled
        self.steps, self.residual = 0, float("nan")
        self.terminal = sys.stderr.isatty()
        self.start = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def step(self, residual: float) -> None:
        """Count one step that left this relative residual."""
        self.steps, self.residual = self.steps + 1, residual
        now = time.monotonic()
        if self.enabled and now - self.shown > (_TERMINAL_SECONDS if self.terminal else _PLAIN_SECONDS):
            self.shown = now
            self._write(end="" if self.terminal else "\n")

    def _write(self, end: str) -> None:
        seconds = time.monotonic() - self.start
        rate = self.steps / seconds if seconds > 0 else 0.0
        line = f"{self.label}: step {self.steps}, residual {self.residual:.2e}, {rate:.0f} steps/s, {seconds:.1f} s"
        print(f"\r{line}\x1b[K" if self.terminal else line, end=end, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._write(end="\n")
