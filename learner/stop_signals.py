"""StopSignals: Ctrl-C and SIGTERM of a driver ask its run to stop; a second one ends the driver at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from common.errors import Stopped

STOP_WINDOW = 2.5  # seconds; Ray kills a job's driver 3 s after its SIGTERM (RAY_JOB_STOP_WAIT_TIME_S)
HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Handles the signals from `__enter__` to `__exit__`, in the main thread."""

    def __init__(
        self, stop: Callable[[str], Any], newest_step: Callable[[], int], show: Callable[[str, dict[str, Any]], None]
    ) -> None:
        """
        Args:
            stop: called with the name of the first signal.
            newest_step: of the newest checkpoint; asked for when the run has not ended in `STOP_WINDOW`.
            show: called with what a person should know then, as an event `warning`.
        """
        self._stop, self._newest_step, self._show = stop, newest_step, show
        self._first: int | None = None
        self._second: int | None = None
        self._alarm = threading.Timer(STOP_WINDOW, self._late)
        self._alarm.daemon = True
        self._previous: dict[int, Any] = {}
        self.phase = ""
        """Of the run; kept by whoever hears of it."""

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._on_signal) for number in HANDLED}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._alarm.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self._second == signal.SIGTERM:
            raise Stopped("SIGTERM")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._first is not None:
            self._second = number
            raise KeyboardInterrupt  # what Ray's waiting lets through, whatever the signal
        self._first = number
        self._stop(signal.Signals(number).name)  # told by the run, as its event: this may interrupt `show` itself
        self._alarm.start()

    def _late(self) -> None:
        if self._first == signal.SIGINT:  # nothing kills this process soon
            return
        if self.phase != "train":
            text = f"still ending {STOP_WINDOW:g} s after the signal; --resume goes on with phase {self.phase}"
        else:
            text = (
                f"no checkpoint yet {STOP_WINDOW:g} s after the signal: the step in hand takes longer. If this process "
                f"is killed now (Ray: 3 s after SIGTERM), --resume goes on from step {self._newest_step()}"
            )
        self._show("warning", {"text": text})
