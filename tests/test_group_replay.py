"""`diffpo replay`: a saved group agrees with the weights that drew it; what was changed in it is found and named."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from misbehaving_task import HangingTask

from actors.reveal_rules import entropy_bound
from common.checkpoint_store import CheckpointStore
from common.config import Config
from common.config_file import dump_config, load_config
from common.errors import RunError, UserError
from common.lease import FinishedGroup
from common.policy import Policy
from common.policy_loading import build_policy
from common.segment_folder import SegmentFolder
from common.tasks import build_task
from common.trajectory import decode_group
from common.weights import to_flat
from learner.cli import main
from learner.group_replay import replay_group, replay_saved, same_sets
from learner.replay_verdict import GroupReplay
from learner.run_directory import RunDirectory
from learner.saved_group import find_group
from learner.synchronous_rollout import SynchronousRollout

NUMBER = 7
TINY = [
    *("task.name=sudoku", "model.hidden_size=16", "model.layers=2", "model.heads=2", "model.intermediate_size=32"),
    *("learner.group_size=4", "rollout.slots=4", "sampler.max_prompt_tokens=16", "sampler.max_completion_tokens=16"),
    *("learner.autocast=false", "replay.drop_no_spread=false", "sampler.threshold.gamma_init=1.5"),
]


def configured(*overrides: str) -> Config:
    return load_config(None, [*TINY, *overrides])


def policy_of(config: Config, seed: int = 0) -> Policy:
    """Not flat, so that weights of another seed say something else."""
    task = build_task(config.task)
    policy = build_policy(config.model, config.sampler.threshold, alphabet=task.alphabet, seed=seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(15.0)
        weight = policy.head.linear.weight
        weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        policy.calibration.log_gamma_scale.fill_(0.3)
        policy.calibration.log_reveal_temperature.fill_(0.2)
    return policy


def drawn_group(config: Config, *, version: int = 3, adopt: Policy | None = None) -> FinishedGroup:
    """A group that the engine draws with seed 0's weights, from its second step on with those of `adopt`."""
    rollout = SynchronousRollout(config, build_task(config.task), policy_of(config))
    rollout.engine.version = version
    if adopt is not None:
        plain, flat = rollout.engine.step, to_flat(adopt)

        def step() -> Any:
            ended = plain()
            if rollout.engine.version == version:
                rollout.adopt(flat, version + 1)
            return ended

        rollout.engine.step = step
    [group] = rollout._groups(1)
    return replace(group, number=NUMBER)


def changed(group: FinishedGroup, change: Callable[[list[dict[str, Any]]], None]) -> FinishedGroup:
    """The group after a change of its rows."""
    table = decode_group(group.payload)
    rows = table.to_pylist()
    change(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=table.schema))
    return replace(group, payload=sink.getvalue().to_pybytes())


def replayed(config: Config, group: FinishedGroup, *, seed: int = 0, version: int | None = 3) -> GroupReplay:
    policy, table = policy_of(config, seed), decode_group(group.payload)
    return replay_group(policy, config, build_task(config.task), table, version=version, tolerance=1e-3)


@pytest.fixture(scope="module")
def config() -> Config:
    return configured()


@pytest.fixture(scope="module")
def group(config: Config) -> FinishedGroup:
    return drawn_group(config)


@pytest.fixture
def run(config: Config, group: FinishedGroup, tmp_path: Path) -> RunDirectory:
    """A run with the group in its segments, the weights that drew it as version 3, and another checkpoint."""
    directory = RunDirectory(tmp_path / "runs" / "made")
    (directory.path).mkdir(parents=True)
    (directory.path / "config.yaml").write_text(dump_config(config))
    SegmentFolder(directory.segments).write([replace(group, number=5), group])
    for seed, step, version in ((0, 3, 3), (1, 6, 6)):
        checkpoint(directory, policy_of(config, seed), step, version)
    return directory


def checkpoint(run: RunDirectory, policy: Policy, step: int, version: int) -> None:
    draft = CheckpointStore(run.path / "checkpoints").begin(step)
    policy.save(draft.path)
    draft.commit(version=version, journal_index=0)


def folder_of(run: RunDirectory, step: int) -> Path:
    return run.path / "checkpoints" / f"step-{step:06d}"


VARIANTS = [
    [],
    ["sampler.block_length=4"],
    ["sampler.temperature=0.7", "learner.surrogate=coupled_masks", "learner.importance_weight=self_normalised"],
    ["sampler.rule=sampled_entropy_bound"],
    ["sampler.rule=confidence", "sampler.confidence_threshold=0.4", "learner.train=model"],
    ["sampler.rule=top_k", "sampler.tokens_per_step=3", "learner.train=model", "learner.kl_beta=0.1"],
    ["learner.train=threshold", "sampler.threshold.head=log_normal"],
    ["learner.train=model", "replay.max_staleness=0"],
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_a_group_agrees_with_the_weights_that_drew_it(overrides: list[str]) -> None:
    config = configured(*overrides)
    found = replayed(config, drawn_group(config))
    assert found.agrees
    assert found.verdict == f"agrees within 0.001: {len(found.tokens)} tokens"
    assert not found.differing
    assert max(one.max_difference for one in found.completions) < 1e-4
    checked = config.sampler.rule == "entropy_bound"
    for one in found.completions:
        assert sorted(one.steps) == (list(range(1, one.nfe + 1)) if checked else [])
        assert all(one.steps.values())


def test_loss_terms_are_those_of_a_step_on_the_group(config: Config, group: FinishedGroup) -> None:
    """At inner update 0 the ratio is 1, so each token's objective is its weight times the advantage."""
    found = replayed(config, group)
    for token in found.tokens:
        assert (token.weight is not None) == token.scored
        if token.scored and token.surrogate is not None and token.weight is not None:
            expected = min(config.learner.weight_cap, math.exp(token.surrogate - token.logprob.recorded))
            assert token.weight == pytest.approx(expected, rel=1e-4)
            assert token.ratio == 1.0
            advantage = found.completions[token.completion].advantage
            assert token.objective == pytest.approx(token.weight * advantage, rel=1e-5)
    objectives = [one.objective for one in found.completions if one.objective is not None]
    assert found.means["model_objective"] == pytest.approx(float(np.mean(objectives)), rel=1e-5)


def flip_logprob(rows: list[dict[str, Any]]) -> None:
    rows[1]["behaviour_logprob"][4] += 0.01


def flip_token(rows: list[dict[str, Any]]) -> None:
    token = rows[1]["completion_ids"][4]
    rows[1]["completion_ids"][4] = 4 if token != 4 else 5


def lose_logprob(rows: list[dict[str, Any]]) -> None:
    rows[1]["behaviour_logprob"][4] = math.nan


def flip_entropy(rows: list[dict[str, Any]]) -> None:
    rows[1]["entropy"][4] -= 0.01


@pytest.mark.parametrize("change", [flip_logprob, flip_token, lose_logprob, flip_entropy])
def test_a_changed_token_is_named_first(config: Config, group: FinishedGroup, change: Callable) -> None:
    found = replayed(config, changed(group, change))
    assert not found.agrees
    first = found.differing[0]
    assert (first.completion, first.position) == (1, 4)
    assert {token.completion for token in found.differing} == {1}
    assert f"first at completion 1, position 4 (step {first.step})" in found.verdict
    if change is not flip_token:
        assert len(found.differing) == 1


def shift_nfe(rows: list[dict[str, Any]]) -> None:
    rows[1]["nfe"] += 1


def shift_reward(rows: list[dict[str, Any]]) -> None:
    rows[2]["reward"] += 0.5


def lose_reward(rows: list[dict[str, Any]]) -> None:
    rows[2]["reward"] = math.nan


def shift_gamma(rows: list[dict[str, Any]]) -> None:
    rows[0]["gamma_logprob"] -= 0.5


def shift_step(rows: list[dict[str, Any]]) -> None:
    """What was revealed in the last step is told to be of the first."""
    last = rows[0]["nfe"]
    at = rows[0]["reveal_step"].index(last)
    assert last > 1
    rows[0]["reveal_step"][at] = 1


def other_prompt(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["group_id"] = 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shift_nfe, "completion 1: NFE recorded"),
        (shift_reward, "completion 2: reward recorded"),
        (lose_reward, "completion 2: reward recorded nan"),
        (shift_gamma, "completion 0: log-prob of gamma recorded"),
        (shift_step, "completion 0, step 1: revealed"),
        (other_prompt, "the prompt is not the task's at cursor 1"),
    ],
)
def test_what_else_was_changed_is_named(config: Config, group: FinishedGroup, change: Callable, words: str) -> None:
    found = replayed(config, changed(group, change))
    assert not found.agrees
    assert any(line.startswith(words) for line in found.wrong)


def test_other_weights_differ_and_nothing_is_wrong(config: Config, group: FinishedGroup) -> None:
    for version in (4, None):
        found = replayed(config, group, seed=1, version=version)
        assert found.agrees
        assert found.differing
        assert found.expected
        assert found.verdict.startswith("not comparable: none that these weights must agree on")
    broken = replayed(config, changed(group, lose_logprob), seed=1, version=4)
    assert not broken.agrees, "what is no number is wrong under any weights"
    assert "1 of" in broken.verdict


def test_tokens_of_each_version_are_held_to_its_weights(config: Config) -> None:
    mixed = drawn_group(config, adopt=policy_of(config, seed=1))
    for seed, version in ((0, 3), (1, 4)):
        found = replayed(config, mixed, seed=seed, version=version)
        assert {token.version for token in found.tokens} == {3, 4}
        assert found.agrees
        assert {token.version for token in found.differing} == {7 - version}
        comparable = sum(token.version == version for token in found.tokens)
        assert found.verdict.startswith(f"agrees within 0.001 on the {comparable} tokens")
        assert all(one.comparable == (version == 3) for one in found.completions)


def test_cached_passes_are_not_held_to_exact_ones() -> None:
    config = configured("sampler.cache=dual", "sampler.block_length=8")
    found = replayed(config, drawn_group(config))
    assert found.agrees
    assert not any(token.comparable for token in found.tokens)
    assert any(line.startswith("sampler.cache=dual") for line in found.notes)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("completion_ids", 99, "token id 99"), ("reveal_step", 0, "reveal step 0"), ("reveal_step", 99, "reveal step 99")],
)
def test_what_cannot_be_computed_is_refused(
    config: Config, group: FinishedGroup, name: str, value: int, words: str
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[3][name][2] = value

    with pytest.raises(RunError, match=f"completion 3 has {words}"):
        replayed(config, changed(group, change))


def test_a_reward_that_fails_is_named(config: Config, group: FinishedGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task(config.task)

    def broken(*_: object) -> dict[str, float]:
        raise ZeroDivisionError("no answer")

    monkeypatch.setattr(task, "rewards", broken)
    table = decode_group(group.payload)
    found = replay_group(policy_of(config), config, task, table, version=3, tolerance=1e-3)
    assert found.verdict == "differs: rewards cannot be recomputed: ZeroDivisionError: no answer"


def test_a_reward_that_hangs_costs_its_time_out(group: FinishedGroup) -> None:
    config = configured("rollout.reward_timeout=1")
    table = decode_group(group.payload)
    found = replay_group(policy_of(config), config, HangingTask(config.task), table, version=3, tolerance=1e-3)
    assert found.verdict.startswith("differs: rewards cannot be recomputed: RewardTimeout: reward exceeded")


def test_sets_are_the_same_within_a_tolerance() -> None:
    """What the rule chooses from entropies that are off by less is the same; a set that lacks its best is not."""
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(2000, 4, generator=generator).round(decimals=1)
    gamma = (2 * torch.rand(2000, generator=generator)).round(decimals=1)
    active = torch.rand(2000, 4, generator=generator) < 0.8
    active[:, 0] = True
    exact = entropy_bound(entropy, entropy, active, gamma)
    noisy = entropy_bound(entropy + 0.02 * (torch.rand(2000, 4, generator=generator) - 0.5), entropy, active, gamma)
    assert (noisy != exact).any()
    assert same_sets(entropy, active, noisy, gamma, 0.011).all()
    unlike = exact.clone()
    unlike[torch.arange(2000), entropy.masked_fill(~exact, torch.inf).argmin(-1)] = False
    several = unlike.any(-1) & (
        entropy.masked_fill(~exact, torch.inf).amin(-1) < entropy.masked_fill(~unlike, torch.inf).amin(-1)
    )
    assert several.any()
    assert not same_sets(entropy, active, unlike, gamma, 0.011)[several].any()


# -- in a run -----------------------------------------------------------------------------------------------------


def test_weights_of_the_tokens_version_are_chosen(run: RunDirectory, config: Config) -> None:
    source, found = replay_saved(run, config, NUMBER, None, 1e-3)
    assert found.agrees
    assert source["weights"] == str(folder_of(run, 3))
    assert (source["weights_version"], source["why"]) == (3, "drew tokens")
    assert source["place"] == str(run.segments)
    assert list(source["token_versions"]) == ["3"]


def test_weights_are_known_by_whatever_path(run: RunDirectory, config: Config, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.path)
    given = str(tmp_path / "link" / folder_of(run, 3).relative_to(run.path))
    for one in (run, RunDirectory(tmp_path / "link")):
        source, found = replay_saved(one, config, NUMBER, given, 1e-3)
        assert (source["weights_version"], source["weights"], found.agrees) == (3, given, True)


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [({1: 2, 2: 4}, 2), ({1: 4, 2: 9}, 1), ({1: 1, 2: 2}, 2), ({1: 1}, 1), ({}, 0)],
)
def test_else_the_next_weights_are_chosen(
    run: RunDirectory, config: Config, versions: dict[int, int], chosen: int
) -> None:
    """By step: the next later version, or the latest; version 0 is the warm start, which is older than all here."""
    policy_of(config).save(run.path / "warm_start")
    for step in (3, 6):
        folder_of(run, step).rename(run.path / f"away-{step}")
    for step, version in versions.items():
        checkpoint(run, policy_of(config, 1), step, version)
    source, found = replay_saved(run, config, NUMBER, None, 1e-3)
    assert source["weights"] == str(folder_of(run, chosen) if chosen else run.warm_start)
    assert source["why"] == "nearest to the tokens' versions"
    assert found.agrees


def test_a_group_that_was_set_aside_is_replayed_with_its_policy(
    run: RunDirectory, config: Config, group: FinishedGroup
) -> None:
    folder = run.path / "set_aside" / "step-000004"
    policy_of(config, 0).save(folder)
    (folder / "why.json").write_text(json.dumps({"step": 4, "version": 3, "reason": "NaN", "numbers": [NUMBER]}))
    SegmentFolder(folder / "groups").write([changed(group, lose_logprob)])
    SegmentFolder(folder_of(run, 3) / "groups").write([replace(group, number=9)])
    source, found = replay_saved(run, config, NUMBER, None, 1e-3)
    assert source["weights"] == str(folder)
    assert (source["weights_version"], source["also"]) == (3, [str(run.segments)])
    assert not found.agrees
    elsewhere, found = replay_saved(run, config, 9, None, 1e-3)
    assert elsewhere["place"] == str(folder_of(run, 3) / "groups")
    assert found.agrees


def test_a_damaged_file_hides_no_other(run: RunDirectory) -> None:
    folder = SegmentFolder(run.segments)
    Path(folder.file(3)).write_bytes(b"ARROW1")
    assert find_group(run, NUMBER).group.number == NUMBER
    with pytest.raises(UserError, match=r"group 8 .*segments: 5, 7; not readable: segment .*segment-00000003"):
        find_group(run, 8)


def diffpo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["diffpo", "replay", *arguments])
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_command(
    run: RunDirectory,
    group: FinishedGroup,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run.path.parents[1])
    code, out, err = diffpo(monkeypatch, capsys, "made", str(NUMBER))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("agrees within 0.001")
    code, out, err = diffpo(monkeypatch, capsys, str(run.path), str(NUMBER), "--weights", str(folder_of(run, 6)))
    assert (code, err) == (0, "")
    assert "other weights" in out
    SegmentFolder(run.segments).write([replace(changed(group, lose_logprob), number=8)])
    code, out, err = diffpo(monkeypatch, capsys, "made", "8", "--json")
    assert code == 1
    assert err.startswith("run failed: group 8: differs: 1 of")
    found = json.loads(out)
    [wrong] = [token for token in found["tokens"] if token["differs"]]
    assert (wrong["completion"], wrong["position"], wrong["logprob"]["recorded"]) == (1, 4, "nan")
    assert found["agrees"] is False
    for arguments, words in (
        (("made", "6"), "group 6 is not in the files"),
        (("made", "6"), "segments: 5, 7-8"),
        (("gone", "7"), "run 'gone': no folder of that name, nor runs/gone; runs: made"),
        (("made", "7", "--weights", "nowhere"), "nowhere: no config.json there"),
    ):
        code, out, err = diffpo(monkeypatch, capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert words in err


def test_a_run_without_weights_says_so(run: RunDirectory, config: Config) -> None:
    for step in (3, 6):
        folder_of(run, step).rename(run.path / f"away-{step}")
    with pytest.raises(UserError, match="neither checkpoints nor a warm start; give the weights with --weights"):
        replay_saved(run, config, NUMBER, None, 1e-3)
