"""Studies: what a grid may say, what the numbers mean, and what the report says of them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_fixtures import ROOT, STUDY, claim, result, study

from actors.evaluation import Point, Setting
from common.errors import UserError
from learner.study.grid import load_study, plan
from learner.study.measures import (
    at_equal,
    at_passes,
    holm,
    interval,
    lookup,
    not_finite,
    p_value,
    saving,
    spent_to_reach,
    verdict,
)
from learner.study.report import differences, write_report
from learner.study.single_run import adaptation, slack

# -- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "deploy/studies").glob("*.yaml"))])
def test_every_study_of_the_repository_can_be_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    short, loaded = load_study(name)
    runs = plan(loaded)
    assert short == name
    assert len({run.digest for run in runs}) == len(runs)
    seeds = {run.seed for run in runs}
    assert len({run.warm_start_digest for run in runs}) == len(seeds)  # arms share their seed's warm start


def test_runs_go_seed_by_seed_and_arms_may_have_fewer() -> None:
    arms = STUDY["arms"] | {"few": {"about": "", "seeds": 1}}
    names = [run.name for run in plan(study(arms=arms))]
    assert names == ["one-seed0", "other-seed0", "few-seed0", "one-seed1", "other-seed1"]
    assert [run.seed for run in plan(study(), seeds=1)] == [0, 0]
    assert plan(study())[1].config.learner.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "arms"),
        ({"arms": {"before": {"about": ""}}}, "arm 'before': use small letters"),
        ({"arms": {"A b": {"about": ""}}}, "arm 'A b': use small letters"),
        ({"seeds": 0}, "seeds: Input should be greater than or equal to 1 (given 0)"),
        ({"seeds": True}, "seeds: Input should be a valid integer (given True)"),
        ({"title": "???"}, "Missing mandatory value: title"),
        ({"": 3}, "unknown key ''; valid keys: title"),
        ({"comparisons": [claim(arm="none")]}, "no arm 'none'; arms: one, other"),
        ({"comparisons": [claim(baseline="one")]}, "arm and baseline are both 'one'"),
        ({"comparisons": [claim(measure="nfe at lots")]}, "'lots' is no number of forward passes; e.g. nfe at 3000"),
        ({"comparisons": [claim(measure="nfe at nan")]}, "'nan' is no number"),
        ({"comparisons": [claim(measure="nef at 30")]}, "no run has 'nef'; did you mean nfe?"),
        ({"comparisons": [claim(measure="nfe at equal row")]}, "no axis 'row'; one of seconds, passes"),
        ({"comparisons": [claim(measure="nfe at equal seconds")]}, "compares two arms; give one as baseline"),
        ({"comparisons": [claim(measure="nonsense.x")]}, "no run has 'nonsense.x'; they begin with test, selected"),
        ({"comparisons": [claim(measure="test.after.frontier")]}, "no run has 'test.after.frontier'"),
        ({"comparisons": [claim(measure="test.after.aera")]}, "did you mean test.after.area?"),
        ({"comparisons": [claim(measure="test.after.saving", baseline="before")]}, "no run has 'test.before.saving'"),
        ({"overrides": ["run.seed=77"]}, "run.seed=77: a study sets it"),
        ({"overrides": ["run={name: mine}"]}, "run.name=mine: a study sets it"),
        ({"overrides": [".steps=2"]}, "override '.steps=2' is not of the form"),
        ({"overrides": ["replay.max_staleness=4"]}, "set replay.max_staleness=2 among the overrides"),
        ({"overrides": ["replay.admission=strict_fifo"]}, "replay.admission=strict_fifo: a study's runs are synch"),
        ({"overrides": ["rollout.actors=2"]}, "rollout.actors=2: a study's runs are synchronous and in one process"),
        ({"seed": 3}, "unknown key seed; did you mean seeds"),
        ({"arms": {"one": {"about": "", "override": []}}}, "unknown key arms.one.override; did you mean overrides"),
        ({"arms": {"one": {"about": "", "overrides": ["learner.step=3"]}}}, "arm one: unknown key learner.step; did"),
        ({"arms": {"one": {"about": "", "seeds": 3}}}, "arms.one.seeds=3 exceeds seeds=2"),
        (
            {"comparisons": [{"claim": "c", "arm": "one", "baseline": "before", "measure": "nfe at 50"}]},
            "nfe at 50 is not known of the warm start",
        ),
        ({"config": "nowhere.yaml"}, "arm one: config nowhere.yaml: no such file"),
    ],
)
def test_a_malformed_study_is_refused_before_anything_starts(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(STUDY | {"comparisons": []} | changes))  # JSON is YAML
    with pytest.raises(UserError, match=re.escape(message)):
        plan(load_study(str(path))[1])


def test_limits_of_rewards_are_those_of_the_evaluations() -> None:
    limits = ["rollout.reward_timeout=60", "rollout.reward_workers=2", "rollout.reward_memory_bytes=1073741824"]
    rollout = plan(study(overrides=limits))[0].config.rollout
    assert (rollout.reward_timeout, rollout.reward_workers, rollout.reward_memory_bytes) == (60.0, 2, 1 << 30)


def test_an_unknown_study_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"study 'sudko'.*known studies: .*quick.*sudoku"):
        load_study("sudko")


def test_digests_stay_and_see_what_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    quick = plan(load_study("quick")[1])[0]
    # another digest throws away every finished run, another warm-start digest every kept warm start
    assert (quick.digest, quick.warm_start_digest) == ("1d8b398fcac256eb", "46b1b243691e33c2")
    rows, folder = tmp_path / "rows", tmp_path / "model"
    folder.mkdir()
    for override, file in ((f"task.file={rows}", rows), (f"warm_start.file={rows}", rows)):
        seen = set()
        for content in ("one", "two", "one"):
            file.write_text(content)
            run = plan(study(overrides=[override]))[0]
            seen.add((run.digest, run.warm_start_digest))
        assert len(seen) == len({digest for digest, _ in seen}) == len({start for _, start in seen}) == 2
    digests = [plan(study(overrides=[f"model.path={folder}"]))[0].digest]
    for name, content in (("a", "one"), ("b", ""), ("a", "two")):
        (folder / name).write_text(content)
        digests.append(plan(study(overrides=[f"model.path={folder}"]))[0].digest)
    assert len(set(digests)) == 4


def test_an_arm_may_be_stale_and_then_its_runs_are_others() -> None:
    arms = {name: {"about": "", "staleness": stale} for name, stale in (("zero", 0), ("four", 4))}
    runs = plan(study(arms=arms, comparisons=[]))
    plain = plan(study(arms={"zero": {"about": ""}}, comparisons=[]))
    assert [run.staleness for run in runs[:2]] == [0, 4]
    assert runs[0].digest == plain[0].digest  # what finished before the key was there stays finished
    assert runs[1].digest != runs[0].digest
    assert runs[1].warm_start_digest == runs[0].warm_start_digest


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    # Student's sleep data (1908): extra sleep, mean 1.58, 95 % interval 0.70 to 2.46
    extra = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, half = interval(extra)
    assert (mean, mean - half, mean + half) == pytest.approx((1.58, 0.700, 2.460), abs=1e-3)
    assert interval([2.0]) == (2.0, math.inf)


@pytest.mark.parametrize(
    ("mean", "half", "expected", "said"),
    [
        (0.2, 0.1, "positive", "holds"),
        (0.2, 0.3, "positive", "undecided"),
        (-0.2, 0.1, "positive", "refuted"),
        (-0.2, 0.1, "negative", "holds"),
        (0.2, math.inf, "positive", "one seed"),
        (0.2, 0.1, "none", "refuted"),
        (0.2, 0.3, "none", "no difference seen"),
        (-0.2, 0.1, "any", "holds"),
        (-0.2, 0.3, "any", "undecided"),
    ],
)
def test_verdicts(mean: float, half: float, expected: str, said: str) -> None:
    assert verdict(mean, half, expected) == said


def test_p_values_are_students_and_adjusted_for_their_number() -> None:
    # the same data: t = 4.0621 on 9 degrees of freedom, p = .00283
    assert p_value([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]) == pytest.approx(0.00283, abs=1e-5)
    assert (p_value([2.0]), p_value([0.0, 0.0]), p_value([0.2, 0.2])) == (1.0, 1.0, 0.0)
    # Holm's procedure by hand: .005 * 4, .01 * 3, .03 * 2, then never below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_is_not_finite_is_found_and_has_no_verdict() -> None:
    assert not_finite({"a": 1, "b": [0.5, {"c": math.nan}]}) == "b.1.c"
    assert not_finite({"a": [-math.inf]}) == "a.0"
    assert not_finite({"a": [1.0, None, "nan", True]}) is None
    with pytest.raises(ValueError, match="mean=nan"):
        verdict(*interval([0.1, math.nan]), "positive")


def test_measures_are_found_where_they_stand() -> None:
    run = result("one", 0, 0.1)
    assert lookup(run, "test.after.area") == pytest.approx(0.3)
    assert lookup(run, "last.accuracy") == pytest.approx(0.4)
    assert lookup(run, "first.accuracy") == pytest.approx(0.3)
    assert lookup(run, "sampled_reward_costed at 25") == pytest.approx(0.225)
    assert at_passes(run, "sampled_reward_costed", 101) is None  # the run never got there
    assert lookup(run, "test.after.nothing") is None
    assert spent_to_reach(run, "sampled_reward_costed", 0.25, "seconds") == pytest.approx(25)
    assert spent_to_reach(run, "sampled_reward_costed", 0.2, "seconds") == 0
    assert spent_to_reach(run, "sampled_reward_costed", 0.31, "seconds") is None
    assert spent_to_reach(run, "sampled_reward_costed", 0.25, "forwards") == pytest.approx(230)  # half of 60 + 400


def test_two_runs_are_compared_where_both_had_spent_the_same() -> None:
    slow, fast = result("slow", 0, 0.1), result("fast", 0, 0.1)
    fast["validation"][1]["seconds"] = 25.0  # it gets as far in half of the time
    values = at_equal(slow, fast, "sampled_reward_costed at equal seconds")
    assert values == pytest.approx((0.25, 0.3))
    assert at_equal(slow, {}, "sampled_reward_costed at equal seconds") == (None, None)


def test_differences_are_paired_by_seed() -> None:
    by_arm = {
        "one": [result("one", 0, 0.3), result("one", 1, 0.5)],
        "other": [result("other", 1, 0.1), result("other", 2, 0.9)],
    }
    learns, beats = study().comparisons
    assert differences(learns, by_arm) == pytest.approx([0.3, 0.5])
    assert differences(beats, by_arm) == pytest.approx([0.4])
    alone = learns.model_copy(update={"baseline": None})
    assert differences(alone, by_arm) == pytest.approx([0.5, 0.7])


def test_saving_is_measured_at_equal_accuracy() -> None:
    base = [{"rule": "entropy_bound", "nfe": n, "accuracy": a} for n, a in ((2.0, 0.2), (4.0, 0.4), (8.0, 0.4))]
    base.append({"rule": "top_k", "nfe": 1.0, "accuracy": 1.0})  # another rule does not count
    assert saving(base, {"accuracy": 0.4, "nfe": 3.0}) == pytest.approx(0.25)
    assert saving(base, {"accuracy": 0.3, "nfe": 2.0}) == pytest.approx(1 - 2 / math.sqrt(8))
    assert saving(base, {"accuracy": 0.9, "nfe": 3.0}) == pytest.approx(0.25)  # beyond all of the base's
    assert saving(base, {"accuracy": 0.1, "nfe": 3.0}) == pytest.approx(-0.5)
    dips = [{"rule": "entropy_bound", "nfe": n, "accuracy": a} for n, a in ((2.0, 0.3), (4.0, 0.2), (8.0, 0.4))]
    assert saving(dips, {"accuracy": 0.3, "nfe": 1.5}) == pytest.approx(0.25)  # what costs more for less is not used
    assert lookup({"test": {"before": {"frontier": dips}, "after": {"operating": dips[0]}}}, "test.after.saving") == 0


def point(gamma: np.ndarray, nfe: np.ndarray, correct: np.ndarray, rule: str = "entropy_bound") -> Point:
    return Point(Setting("", rule, 1.0), correct, nfe, correct.astype(float), correct.astype(float), {}, gamma)


def test_adaptation_sees_gammas_that_follow_difficulty_and_pay() -> None:
    difficulty = np.repeat([1.0, 2.0], 50)
    gamma = np.where(difficulty == 1, 4.0, 1.0)
    good, bad = np.ones(100, bool), np.arange(100) % 2 == 0
    nfe = np.full(100, 4)
    found = adaptation(point(gamma, nfe, good), [point(gamma, nfe, good)], [point(gamma, nfe, bad)], difficulty, (2, 8))
    assert found["rank_correlation"] == pytest.approx(-1)
    assert found["gamma_ratio"] == pytest.approx(4)
    assert found["learned_minus_constant"] == pytest.approx(0.5)
    assert 0.35 < found["low"] < 0.5 < found["high"] < 0.65
    flat = adaptation(
        point(np.ones(100), nfe, good), [point(gamma, nfe, bad)], [point(gamma, nfe, bad)], difficulty, (2, 8)
    )
    assert (flat["rank_correlation"], flat["gamma_ratio"], flat["learned_minus_constant"]) == (0, 1, 0)


def test_slack_is_what_a_setting_per_difficulty_would_earn_and_noise_earns_nothing() -> None:
    difficulty = np.repeat([1.0, 2.0], 200)
    one, other = np.where(difficulty == 1, 1.0, 0.0), np.where(difficulty == 1, 0.2, 0.5)
    assert slack(np.stack([one, other]), difficulty) == pytest.approx((1.0 + 0.5) / 2 - 0.5)
    assert slack(np.stack([one, 0.9 * one]), difficulty) == 0
    noise = np.random.default_rng(0).random((9, 400))
    assert abs(slack(noise, difficulty)) < 0.05
    assert slack(noise[:, :1], difficulty[:1]) == 0  # one prompt cannot be parted into halves


def test_the_report_says_what_the_runs_say(tmp_path: Path) -> None:
    runs = plan(study())
    done = {run.name: result(run.arm, run.seed, {"one": 0.3, "other": 0.1}[run.arm] + run.seed / 100) for run in runs}
    path = write_report("name", study(), runs, done, tmp_path)
    text = path.read_text()
    assert "| it learns | one - before, `test.after.area` | 0.305 ± 0.064 | 2 | holds | 0.010 | 0.010 |" in text
    assert "| one beats other | one - other, `test.after.area` | 0.200 ± 0.000 | 2 | holds | 0.000 |" in text
    assert "4 of 4 runs" in text
    assert "What we learned" not in text
    told = write_report("told", study(findings="Nothing at all."), runs, done, tmp_path).read_text()
    assert told.index("| it learns |") < told.index("Nothing at all.") < told.index("## Arms")
    gone = tuple(f"claim {number}; its runs are lost" for number in range(5))
    fewer = write_report("fewer", study(withdrawn=gone), runs, done, tmp_path).read_text()
    assert "| 2 | holds, not after Holm | 0.010 | 0.063 |" in fewer, "six claims of seven have a larger p"
    assert (
        "the 2 claims of this table and the 5 that are withdrawn:\n\n- claim 0; its runs are lost\n- claim 1" in fewer
    )
    for name in ("frontier", "curves", "drift"):
        assert f"(name/{name}.png)" in text
        assert (tmp_path / "name" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "0 of 4 runs" in write_report("empty", study(), runs, {}, tmp_path).read_text()


def test_what_was_spent_does_not_depend_on_the_order_of_arms(tmp_path: Path) -> None:
    """Arms may start from other rewards: the warm start is sampled by each arm's own rule."""
    given = study(arms=dict(reversed(study().model_dump()["arms"].items())))
    rows = []
    for each in (study(), given):
        runs = plan(each)
        done = {run.name: result(run.arm, run.seed, {"one": 0.3, "other": 0.1}[run.arm]) for run in runs}
        for found in done.values():
            found["validation"][0]["sampled_reward_costed"] = {"one": 0.2, "other": 0.1}[found["arm"]]
        text = write_report("name", each, runs, done, tmp_path).read_text()
        rows.append({line for line in text.splitlines() if re.match(r"\| `(one|other)` \| \d of", line)})
    assert rows[0] == rows[1]
    assert any(line.startswith("| `one` | 2 of 2 | 50 (50 to 50) |") for line in rows[0])  # to .35 from .2 of .5


def test_the_report_names_what_is_missing_and_shows_what_there_is(tmp_path: Path) -> None:
    claims = [{"claim": "absent", "arm": "one", "measure": "adaptation.slack"}]
    given = study(comparisons=[*claims, {"claim": "later", "arm": "other", "measure": "test.after.area"}])
    runs = plan(given)
    done = {run.name: result("one", run.seed, (0.3, 0.0)[run.seed], jobs=2, cpus=8) for run in runs if run.arm == "one"}
    text = write_report("name", given, runs, done, tmp_path).read_text()
    assert "| absent | one, `adaptation.slack` | - | 0 | not measured | - | - |" in text
    assert "| later |" not in text  # its arm has not begun
    assert "2 at once on 8 CPUs" in text
    assert "| `one` | 2 of 2 | 25 (0 to 50) | 15 (0 to 30) | 12 (0 to 25) | 115 (0 to 230) |" in text
    assert "| 60 ± 0 |" in text  # rows forwarded
    bare = {name: {key: found[key] for key in ("arm", "seed")} for name, found in done.items()}
    assert "2 of 4 runs" in write_report("name", given, runs, bare, tmp_path).read_text()
