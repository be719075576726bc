"""EngineHost: several rollout actors in the threads of one process, for benchmarks of many engines on few cores."""

from threading import Thread
from typing import Any

from actors.producer import MakeProducer
from actors.rollout_actor import RolloutActor


class EngineHost:
    """Lives as long as its actors."""

    def __init__(self, *, names: list[str], buffer: Any, make: MakeProducer) -> None:
        self._actors = [RolloutActor(name=name, buffer=buffer, make=make) for name in names]

    def run(self) -> None:
        """All actors' lives."""
        threads = [Thread(target=actor.run) for actor in self._actors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """End them at once."""
        for actor in self._actors:
            actor.stop()

    def gauges(self) -> list[dict[str, float]]:
        """Theirs, one by one."""
        return [actor.gauges() for actor in self._actors]
