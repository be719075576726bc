"""BufferLink: what a buffer that came back is told, in which order, and what it need not be told any more."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
from buffer_fixtures import unavailable
from ray.exceptions import ActorDiedError, RayTaskError

from common.lease import Export, RejoinFirst, Sample
from common.weight_store import UNPUBLISHED
from learner import buffer_link
from learner.buffer_link import BufferLink

BATCH = Sample([4, 5], [b"", b""], 2, [0, 0], [1.0, 1.0], {})
REPLIES: dict[str, Any] = {
    "sample": BATCH,
    "publish": False,
    "rewind": 1_000_004,
    "export": Export(9, b"journal", b"groups", {}),
}
CALLS: dict[str, Callable[[BufferLink], Any]] = {
    "sample": lambda link: link.sample(),
    "publish": lambda link: link.publish(3, weights(3), [4, 5]),
    "set_aside": lambda link: link.set_aside([4, 5], "no good"),
    "rewind": lambda link: link.rewind(7, 4),
    "export": lambda link: link.export(),
    "settle": lambda link: link.settle(6, 1),
}


ONCE = ("publish", "set_aside")
"""What was published is part of what the buffer is told; what it still has to set aside comes again with `sample`."""


def asks_to_rejoin() -> Exception:
    """It died and came back while the learner was busy."""
    return RayTaskError("call", "a traceback", RejoinFirst("rejoin first")).as_instanceof_cause()


class Buffer:
    """Remembers what it was told; dead for the next calls of a name."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[Any, ...]]] = []
        self.dead: Counter[str] = Counter()
        self.error: Callable[[], Exception] = unavailable

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Callable[[], Any]:
                return lambda: self.answer(name, arguments)

        return Method

    def answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self.told.append((name, arguments))
        if self.dead[name]:
            self.dead[name] -= 1
            raise unavailable() if name == "rejoin" else self.error()
        return REPLIES.get(name)

    def names(self) -> list[str]:
        return [name for name, _ in self.told]


def weights(version: int) -> np.ndarray:
    return np.full(3, version, np.float32)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda call: call())
    monkeypatch.setattr(ray, "put", lambda flat: flat)
    monkeypatch.setattr(buffer_link, "RETRY_SECONDS", 0.001)


@pytest.fixture
def buffer() -> Buffer:
    return Buffer()


@pytest.fixture
def link(buffer: Buffer) -> BufferLink:
    """After two steps."""
    found = BufferLink(buffer)
    for version, trained in ((0, []), (1, [0, 1]), (2, [2, 3])):
        found.publish(version, weights(version), trained)
    buffer.told.clear()
    return found


@pytest.mark.parametrize("error", [unavailable, asks_to_rejoin])
@pytest.mark.parametrize("deaths", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_a_buffer_that_came_back_is_told_first_and_asked_again(
    buffer: Buffer, link: BufferLink, name: str, deaths: int, error: Callable[[], Exception]
) -> None:
    buffer.dead[name] = 1 if name in ONCE else deaths
    buffer.dead["rejoin"] = 2  # it dies once more, and again
    buffer.error = error
    reply = CALLS[name](link)
    assert reply == (None if name in ONCE else REPLIES.get(name))
    told = [name, "rejoin", "rejoin", "rejoin"]
    if name not in ONCE:
        told += [name, "rejoin"] * (deaths - 1) + [name]
    assert buffer.names() == told
    asked = [arguments for called, arguments in buffer.told if called == name]
    assert all(arguments == asked[0] for arguments in asked)

    history: list[tuple[int, list[int]]] = [(0, []), (1, [0, 1]), (2, [2, 3])]
    if name == "publish":
        history.append((3, [4, 5]))
    if name == "settle":
        history = history[2:]
    for called, (snapshot, told_history, sampled) in (one for one in buffer.told if one[0] == "rejoin"):
        assert called == "rejoin"
        assert snapshot.version == history[-1][0]
        assert (snapshot.payload[0] == weights(snapshot.version)).all()
        assert told_history == history
        assert list(sampled) == []


@pytest.mark.parametrize("name", ["rewind", "sample", "export"])
def test_before_the_first_publication_there_is_nothing_to_tell(buffer: Buffer, name: str) -> None:
    buffer.dead[name] = 2
    assert CALLS[name](BufferLink(buffer)) == REPLIES[name]
    assert buffer.names() == [name] * 3


def test_a_buffer_that_asks_is_answered_before_the_first_publication_too(buffer: Buffer) -> None:
    buffer.dead["export"], buffer.error = 1, asks_to_rejoin
    assert CALLS["export"](BufferLink(buffer)) == REPLIES["export"]
    assert buffer.told == [("export", ()), ("rejoin", (UNPUBLISHED, [], ())), ("export", ())]


def test_what_a_durable_checkpoint_contains_is_not_told_again(buffer: Buffer, link: BufferLink) -> None:
    for version, upto, left in ((3, 1, [2, 3]), (4, 1, [2, 3, 4]), (5, 4, [5]), (6, 6, [])):
        link.publish(version, weights(version), [2 * version, 2 * version + 1])
        link.settle(version, upto)
        buffer.told.clear()
        buffer.dead["sample"] = 1
        link.sample()
        [(snapshot, history, _)] = [arguments for name, arguments in buffer.told if name == "rejoin"]
        assert snapshot.version == version, "the newest weights are told in any case"
        assert [told for told, _ in history] == left


def test_whether_the_buffer_is_closed_is_the_publications_reply(
    buffer: Buffer, link: BufferLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not link.closed
    monkeypatch.setitem(REPLIES, "publish", True)
    link.publish(3, weights(3), [4, 5])
    assert link.closed


ERRORS = [ActorDiedError, lambda: RayTaskError("call", "a traceback", unavailable()).as_instanceof_cause()]


@pytest.mark.parametrize("error", ERRORS, ids=["dead for good", "raised by the living buffer"])
@pytest.mark.parametrize("name", [*CALLS, "rejoin"])
def test_any_other_failure_is_the_learners_end(
    buffer: Buffer, link: BufferLink, name: str, error: Callable[[], Exception]
) -> None:
    if name == "rejoin":
        buffer.dead["sample"] = 1
        buffer.answer = answers_with(buffer, "rejoin", error)  # type: ignore[method-assign]
        name = "sample"
    else:
        buffer.dead[name], buffer.error = 1, error
    with pytest.raises((ActorDiedError, RayTaskError)):
        CALLS[name](link)
    assert buffer.names().count(name) == 1


def answers_with(buffer: Buffer, name: str, error: Callable[[], Exception]) -> Callable[[str, tuple], Any]:
    """The buffer's answers, with an error of its own for one call."""
    plain = buffer.answer

    def answer(called: str, arguments: tuple) -> Any:
        if called == name:
            raise error()
        return plain(called, arguments)

    return answer
