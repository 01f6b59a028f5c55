"""A signal that asks this process to stop, noted until somebody looks; needs no torch.

Imported and made before torch is, it leaves no gap in which the signal would end the process.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from shardscale.errors import ConfigError, StageError

__all__ = ["StopSignal"]

# The first two cannot be caught. The others say that this process is broken: their handler would
# return to the instruction that failed, for ever.
_UNUSABLE = {"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"}


class StopSignal:
    """Whether a signal has come, for ``scaler.listen``.

    The handler notes the signal, and then calls the handler of Python's that was there before, if
    it was the program's own. If whoever started this process blocked the signal, so that none would
    come too early, it is unblocked, and one that waited is delivered here. Processes that are
    forked later inherit the handler; those started anew do not.

    Args:
        name: The signal, as "USR2", "SIGUSR2", ``signal.SIGUSR2`` or its number.

    Raises:
        ConfigError: it cannot be used; lists those that can.
        StageError: this is not the main thread, the only one that may set handlers.

    >>> stop = StopSignal("USR2")
    >>> stop.received
    False
    >>> signal.raise_signal(signal.SIGUSR2)
    >>> stop.received, bool(stop), stop()
    (True, True, True)
    """

    def __init__(self, name: str | int = "USR2") -> None:
        number = _number_of(name)
        if threading.current_thread() is not threading.main_thread():
            raise StageError(
                f"StopSignal was made in the thread {threading.current_thread().name!r}, but only "
                "the main thread may set a handler. Make it there, before torch is imported."
            )
        self.received = False
        self._number = number
        self._before = signal.getsignal(number)
        signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})

    def __bool__(self) -> bool:
        return self.received

    def __call__(self) -> bool:
        """Whether the signal has come."""
        return self.received

    def ignore(self) -> None:
        """Let the signal do nothing from now on; for a process on its way out.

        Python gives up its handlers before the process is gone, and whoever repeats the signal
        until it is would end it then, with another exit code.
        """
        signal.signal(self._number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if callable(self._before) and self._before is not signal.default_int_handler:
            self._before(number, frame)


def _number_of(name: object) -> int:
    usable = {n for n in signal.valid_signals() if getattr(n, "name", "") not in _UNUSABLE}
    named = {n.name.removeprefix("SIG"): n for n in usable if isinstance(n, signal.Signals)}
    number = name
    if isinstance(name, str):
        # Some letters become ASCII's when they are made capitals.
        number = named.get(name.upper().removeprefix("SIG")) if name.isascii() else None
    # Python takes True for 1, and 10.0 for equal to 10.
    if isinstance(number, bool) or not isinstance(number, int) or number not in usable:
        raise ConfigError(
            f"the signal to stop is {name!r}, but must be one of {', '.join(sorted(named))}, or a "
            "signal's number as an int. Others cannot be caught, or would come again at once."
        )
    return number
