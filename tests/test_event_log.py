"""EventLog: who waits for news hears of it, once."""

import asyncio

import pytest

from learner.event_log import EventLog


def test_who_waits_is_woken_and_gets_what_is_new() -> None:
    async def scenario() -> None:
        log = EventLog()
        await log.tell("phase", {"phase": "train"})
        assert await log.after(0) == [("phase", {"phase": "train"})]
        waiting = asyncio.create_task(log.after(1))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await log.warn("first")
        assert await waiting == [("warning", {"text": "first"})]
        await log.warn("second")
        assert log.newest("warning") == {"text": "second"}
        assert log.newest("step") == {}
        assert await log.after(1) == [("warning", {"text": "first"}), ("warning", {"text": "second"})]
        with pytest.raises(ValueError, match="events before number 1 are forgotten, and 0 was asked for"):
            await log.after(0)

    asyncio.run(scenario())


def test_other_threads_warn_and_after_the_end_nobody_minds() -> None:
    async def scenario() -> EventLog:
        log = EventLog()
        warn = warners[0] = log.warner()
        await asyncio.to_thread(warn, "a tracker is off")
        assert await log.after(0) == [("warning", {"text": "a tracker is off"})]
        return log

    warners: dict = {}
    asyncio.run(scenario())
    warners[0]("too late")
