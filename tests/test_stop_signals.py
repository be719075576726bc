"""StopSignals: what the first and the second signal do, and what is said of a stop that takes long."""

import os
import re
import signal
import time
from typing import Any

import pytest

from common.errors import Stopped
from learner import stop_signals
from learner.stop_signals import HANDLED, StopSignals


class Run:
    """What is asked to stop, and shows what it is told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.shown: list[str] = []

    def show(self, kind: str, values: dict[str, Any]) -> None:
        assert kind == "warning"
        self.shown.append(values["text"])

    def signals(self) -> StopSignals:
        return StopSignals(self.asked.append, lambda: 40, self.show)


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals, end: type[BaseException]) -> None:
    run, before = Run(), [signal.getsignal(one) for one in HANDLED]

    def twice() -> None:
        with run.signals():
            os.kill(os.getpid(), number)
            assert run.asked == [number.name]
            os.kill(os.getpid(), number)

    with pytest.raises(end):
        twice()
    assert run.asked == [number.name]
    assert [signal.getsignal(one) for one in HANDLED] == before


@pytest.mark.parametrize(
    ("phase", "told"),
    [("train", "no checkpoint yet 0.05 s after .* goes on from step 40"), ("evaluate", "goes on with phase evaluate")],
)
def test_ray_kills_a_job_soon_so_a_stop_that_takes_long_is_told(
    phase: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_signals, "STOP_WINDOW", 0.05)
    run = Run()
    with run.signals() as signals:
        signals.phase = phase
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 30
        while not run.shown and time.monotonic() < until:
            time.sleep(0.01)
    [text] = run.shown
    assert re.search(told, text)


def test_a_stop_in_time_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "STOP_WINDOW", 0.05)
    for number in HANDLED:
        run = Run()
        with run.signals():
            os.kill(os.getpid(), number)
            if number == signal.SIGINT:
                time.sleep(0.2)  # nothing kills the process of a terminal soon
        time.sleep(0.2)
        assert run.shown == []
