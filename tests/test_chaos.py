"""A short version of `diffpo bench chaos`: kills in a simulated run, and nothing lost or trained twice."""

from pathlib import Path

import pytest

from learner.benchmarks.chaos import ACTOR, BUFFER, DRIVER, LEARNER, ChaosRun, account, simulated


@pytest.mark.slow
def test_every_part_is_killed_and_nothing_is_lost_or_trained_twice(tmp_path: Path) -> None:
    run = ChaosRun(tmp_path, "kills", "simulated", simulated(60, actors=2, slots=6))
    run.wait_for("some steps", lambda: run.steps() > 12)  # behind a checkpoint
    for kind in (ACTOR, BUFFER, LEARNER, DRIVER):
        run.wait_for(f"a {kind}", lambda kind=kind: run.victims(kind))[0].kill()
        if kind == DRIVER:
            run.end()
            run.start("resume")
        before = run.steps()
        run.wait_for(f"steps after the death of the {kind}", lambda before=before: run.steps() > before + 3)
    assert run.end() == 0
    found = account(run)
    assert (found["groups_lost"], found["groups_twice"], found["regenerated"]) == (0, 0, 0)
    assert (found["trained"], found["set_aside"]) == (60 * 8, 8)
