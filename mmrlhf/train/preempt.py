"""Preemption: a first SIGTERM or SIGINT asks the run to finish its step and save; a second one ends it at once.

The handler only notes the request and gives both signals back to the system, so that the next one kills the process
even inside a long kernel (a checkpoint cut in half is never read, see `checkpoint`). Leaving the `with` block restores
whatever handlers were there. Outside the main thread Python allows no handlers: then nothing is installed, and
`installed` is False.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(SystemExit):
    """The run stopped because it was told to; the exit code is 128 + signal (143 for SIGTERM).

    `saved`: whether a checkpoint was written at the end; before the first step there is nothing to save.
    """

    def __init__(self, signum: int, *, saved: bool = False):
        super().__init__(128 + signum)
        self.signum, self.saved = signum, saved

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}" + (" after saving" if self.saved else "")


class Preemption:
    """`with Preemption() as preemption:` then ask `preemption.requested` between steps: the signal, or None."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self.installed = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._before[signum] = signal.signal(signum, self._note)
            self.installed = True
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            # None: a handler installed outside Python, which Python cannot put back
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._before.clear()
        self.installed = False

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.requested = signum
        told = f"\nmmrlhf: {signal.Signals(signum).name}: stopping after this step; a second signal stops at once\n"
        os.write(2, told.encode())  # print may not be called from inside a print that the signal interrupted
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def check(self, *, saved: bool = False) -> None:
        """Raise Preempted if a signal came; `saved` says whether the caller has just written a checkpoint."""
        if self.requested is not None:
            raise Preempted(self.requested, saved=saved)
