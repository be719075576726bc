"""Two ranks on gloo train the very weights that one trains, save what one can go on from, and die together."""

import copy
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import torch
from learner_fixtures import generate_batch, learner_config, tiny_policy
from torch import nn

import common.token_scores
from common.adapter import adapt, learned_parameters
from common.config import LoraConfig
from common.config_file import load_config
from common.errors import UserError
from common.policy import Policy
from common.weights import base_arrays, local_part, not_finite, sharded, to_flat, whole
from learner.batch import Batch
from learner.learner import Learner
from learner.rank_actor import ENDING, RankActor
from learner.ranks import Ranks
from learner.run_directory import RunDirectory
from learner.trainer import BatchRefused

ROOT = Path(__file__).parents[1]
COUNT = 2
CONFIG = load_config(None, ["task.name=sudoku", f"learner.ranks={COUNT}", "run.stall_timeout=6"])


def second_rank(port: int, orders: Connection) -> None:
    """The other process: does what it is told together with the test."""
    torch.set_num_threads(1)
    ranks = Ranks.join(Ranks.store("127.0.0.1", port, COUNT), 1, CONFIG)
    while order := orders.recv():
        function, arguments = order
        try:
            orders.send(function(ranks, *arguments))
        except Exception as error:
            orders.send(error)
    ranks.leave()


class Both:
    """Runs a function on both ranks."""

    def __init__(self, ranks: Ranks, orders: Connection) -> None:
        self._ranks, self._orders = ranks, orders

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
        self._orders.send((function, arguments))
        try:
            mine = function(self._ranks, *arguments)
        finally:
            assert self._orders.poll(60)
            theirs = self._orders.recv()
        if isinstance(theirs, Exception):
            raise theirs
        return mine, theirs


def listening() -> set[tuple[str, int]]:
    """Addresses and ports of this process."""
    return {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    before = listening()
    store = Ranks.store("127.0.0.1", 0, COUNT)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=second_rank, args=(store.port, there), daemon=True)
    process.start()
    ranks = Ranks.join(store, 0, CONFIG)
    assert {address for address, _ in listening() - before} == {"127.0.0.1"}
    yield Both(ranks, here)
    here.send(None)
    ranks.leave()
    process.join(20)
    assert process.exitcode == 0


def batches() -> list[Batch]:
    """The same in every process; of three groups, so that one rank has more than the other."""
    policy = tiny_policy()
    return [generate_batch(policy, sizes=(4, 4, 4)), generate_batch(policy, sizes=(2, 4, 3)), generate_batch(policy)]


def opened(ranks: Ranks, changes: dict[str, Any]) -> Learner:
    """Ranks other than the first begin with other weights, which they must not keep."""
    changes = {"learning_rate": 0.01, "threshold_learning_rate": 0.01, "drift_remedy": "none", **changes}
    lora = changes.pop("lora", False)
    tied = changes.pop("tied", False)
    policy = tiny_policy(seed=0 if ranks.leads else 9)
    if tied:
        model: Any = policy.model
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    if lora:
        adapt(policy.model, LoraConfig(rank=2), None, seed=0 if ranks.leads else 9)
    return Learner(policy, learner_config(**changes), ranks)


def numbers(parameters: list[tuple[str, nn.Parameter]], *, gradient: bool = False) -> dict[str, np.ndarray]:
    found = {}
    for name, parameter in parameters:
        value = parameter.grad if gradient else parameter.detach()
        if value is not None:
            found[name] = whole(value).numpy().copy()
    return found


def trained(ranks: Ranks, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    changes = dict(changes)
    rows = changes.pop("rows_per_piece", 1000)
    learner = opened(ranks, changes)
    size = rows * 4 * learner.policy.model.config.vocab_size
    with patch.object(common.token_scores, "LOGIT_BYTES", size):
        metrics = [learner.step(batch, version=n) for n, batch in enumerate(batches()[:steps])]
    learned = learned_parameters(learner.policy)
    return {
        "weights": numbers(learned),
        "gradients": numbers(learned, gradient=True),
        "metrics": metrics,
        "sharded": sum(sharded(parameter) for parameter in learner.policy.parameters()),
        "local": sum(p.to_local().numel() if sharded(p) else 0 for p in learner.policy.parameters()),  # type: ignore
        "whole": sum(p.numel() if sharded(p) else 0 for p in learner.policy.parameters()),
    }


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


WAYS = {
    "joint": {"train": "joint"},
    "many passes": {"train": "joint", "micro_batch_tokens": 30, "inner_updates": 2},
    "clipped": {"train": "joint", "grad_clip": 1e-3, "weight_decay": 0.1},
    "threshold": {"train": "threshold"},
    "reference": {"train": "model", "kl_beta": 0.1},
    "self-normalised": {"train": "model", "importance_weight": "self_normalised", "inner_updates": 2},
    "lora": {"train": "joint", "lora": True, "kl_beta": 0.1},
    "tied": {"train": "joint", "tied": True},
    "coupled": {"train": "model", "surrogate": "coupled_masks", "prompt_masking": 0.2, "diagnostics_every": 1},
    "pieces": {"train": "joint", "rows_per_piece": 3, "micro_batch_tokens": 30, "kl_beta": 0.1},
    "checkpointed": {"train": "joint", "rows_per_piece": 3, "activation_checkpointing": True, "inner_updates": 2},
    "checkpointed lora": {"train": "model", "rows_per_piece": 3, "activation_checkpointing": True, "lora": True},
}
"""Ranks have unlike numbers of scored positions, so of pieces of logits."""


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_what_one_trains(both: Both, way: str) -> None:
    wanted = trained(Ranks(), WAYS[way], 3)
    found, other = both(trained, WAYS[way], 3)
    assert_close(found["gradients"], wanted["gradients"])
    assert_close(found["weights"], wanted["weights"])
    for name, value in found["weights"].items():
        assert np.array_equal(value, other["weights"][name])  # ranks do not drift apart
    for mine, theirs, alone in zip(found["metrics"], other["metrics"], wanted["metrics"], strict=True):
        assert mine == theirs
        rows = "learner_rows_forwarded"
        assert mine.keys() == alone.keys()
        assert {k: v for k, v in mine.items() if k != rows} == pytest.approx(
            {k: v for k, v in alone.items() if k != rows}, rel=1e-6, abs=1e-9
        )
    assert wanted["sharded"] == 0
    assert found["sharded"] > 15
    assert found["local"] + other["local"] == found["whole"]
    assert abs(found["local"] - other["local"]) < 0.2 * found["whole"]


def test_single_precision_too(both: Both) -> None:
    def changed(learner: Learner) -> dict[str, np.ndarray]:
        return numbers(learned_parameters(learner.policy))

    policy = tiny_policy(double=False)
    learner = Learner(policy, learner_config(train="model", learning_rate=0.01, drift_remedy="none"))
    learner.step(batches()[0], version=0)
    found, _ = both(single_precision_step)
    assert_close(found, changed(learner), 1e-5)


def single_precision_step(ranks: Ranks) -> dict[str, np.ndarray]:
    config = learner_config(train="model", learning_rate=0.01, drift_remedy="none")
    learner = Learner(tiny_policy(double=False), config, ranks)
    learner.step(batches()[0], version=0)
    return numbers(learned_parameters(learner.policy))


def refused(ranks: Ranks) -> tuple[str, bool]:
    """A number that is none in one group: only the rank that has it sees it."""
    learner = opened(ranks, {"train": "model", "inner_updates": 2})
    before = numbers(learned_parameters(learner.policy))
    batch, *_ = batches()
    behaviour = batch.behaviour_logprob.clone()
    behaviour[batch.group == 1] = torch.nan
    try:
        learner.step(replace(batch, behaviour_logprob=behaviour), version=0)
    except BatchRefused as error:
        after = numbers(learned_parameters(learner.policy))
        return str(error), all(np.array_equal(before[name], after[name]) for name in before)
    return "trained", False


def test_all_ranks_refuse_a_batch_or_none(both: Both) -> None:
    mine, theirs = both(refused)
    assert mine == theirs
    assert mine[1]
    assert "weights unchanged" in mine[0]


def published(ranks: Ranks, lora: bool) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    policy = opened(ranks, {"lora": lora}).policy
    buffers = [to_flat(policy, narrow=narrow, keep=ranks.leads) for narrow in (False, True)]
    return buffers[0], base_arrays(policy, keep=ranks.leads), buffers[1]


@pytest.mark.parametrize("lora", [False, True])
def test_rank_0_publishes_everything(both: Both, lora: bool) -> None:
    found, other = both(published, lora)
    wanted = published(Ranks(), lora)
    assert np.array_equal(found[0], wanted[0])
    assert np.array_equal(found[2], wanted[2])
    assert all(np.array_equal(one, two) for one, two in zip(found[1], wanted[1], strict=True))
    assert bool(found[1]) == lora
    assert other[0].size == other[2].size == len(other[1]) == 0


def counted(ranks: Ranks) -> float:
    policy = opened(ranks, {}).policy
    model: Any = policy.model
    with torch.no_grad():
        if not ranks.leads:
            local_part(model.get_input_embeddings().weight)[:2, 0] = torch.nan
        model.get_output_embeddings().weight[0, :3] = torch.inf
    return ranks.sum(not_finite(policy, keep=ranks.leads))[0]


def test_numbers_that_are_not_finite_are_counted_once(both: Both) -> None:
    assert both(counted) == (5, 5)


def test_a_rank_leaves_when_it_is_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Ranks] = []
    monkeypatch.setattr(Ranks, "leave", lambda ranks: left.append(ranks))
    actor = RankActor(config=CONFIG, rank=1)
    actor.order(ENDING)
    actor.follow()
    assert len(left) == 1


def saved_after(ranks: Ranks, changes: dict[str, Any], given: dict[str, Any] | None, steps: range) -> Any:
    """Go on from a saved state, through some steps; the state then."""
    learner = opened(ranks, changes)
    if steps.start:
        ranks.load(learner.policy, given["policy"] if given is not None and ranks.leads else None)
        learner.restore(given["learner"] if given is not None and ranks.leads else None)
        assert learner.steps_done == steps.start
    for step in steps:
        learner.step(batches()[step % 3], version=step)
    from common.adapter import learned_state

    return ranks.kept({"policy": learned_state(learner.policy), "learner": learner.state()})


@pytest.mark.parametrize("way", ["joint", "lora", "tied"])
def test_one_goes_on_where_two_were_and_two_where_one_was(both: Both, way: str) -> None:
    changes = WAYS[way]
    alone = saved_after(Ranks(), changes, None, range(0, 4))
    one = saved_after(Ranks(), changes, None, range(0, 1))
    two, nothing = both(saved_after, changes, one, range(1, 3))
    assert all(value is None for value in nothing["policy"].values())
    assert list(two["learner"]) == list(alone["learner"])
    assert two["learner"]["optimizer"]["param_groups"][0]["params"] == list(
        range(len(two["learner"]["optimizer"]["param_groups"][0]["params"]))
    )
    back = saved_after(Ranks(), changes, copy.deepcopy(two), range(3, 4))
    for name, value in alone["policy"].items():
        torch.testing.assert_close(back["policy"][name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert back["learner"]["steps_done"] == alone["learner"]["steps_done"] == 4
    for number, moments in alone["learner"]["optimizer"]["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(back["learner"]["optimizer"]["state"][number][key], value)


def another_policy(ranks: Ranks) -> str:
    learner = opened(ranks, {})
    state = {"model.x": torch.zeros(2)}
    try:
        if ranks.leads:
            ranks.load(learner.policy, state)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_state_of_another_policy_is_refused_before_anything_is_sent(both: Both) -> None:
    assert "has shape None there" in both(another_policy)[0]


def test_a_pass_that_does_not_count_is_within_the_budget_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank makes nine passes; every group has to be cut in two."""
    batch, *_ = batches()
    budget = 3 * (batch.prompts.shape[1] + batch.length)
    learner = Learner(tiny_policy(), learner_config(train="model", micro_batch_tokens=budget))
    monkeypatch.setattr(Ranks, "most", lambda *_: 9)
    learner._ranks = Ranks(1, COUNT)
    micro, fillers = learner._share(batch, batch.reward)
    assert (len(micro), fillers) == (9, 7)
    for part, advantage in micro:
        rows = len(part.prompts) + len(part.seed)  # of two passes, the first is the group's
        assert rows * (part.prompts.shape[1] + part.length) <= budget
        assert torch.equal(part.reward, advantage)


def test_groups_are_shared_by_cost() -> None:
    costs = torch.tensor([5, 1, 1, 1, 1, 1])
    shares = [Ranks(rank, 2).share(costs) for rank in (0, 1)]
    assert torch.equal(shares[0], ~shares[1])
    assert [int(costs[share].sum()) for share in shares] == [5, 5]


def test_more_ranks_than_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"ranks=9 exceeds groups_per_step=8, and groups are what ranks share"):
        load_config(None, ["task.name=sudoku", "learner.ranks=9", "learner.groups_per_step=8"])


# -- as a whole run ---------------------------------------------------------------------------------------------------

RUN = [
    *("model.hidden_size=32", "model.layers=2", "model.heads=2", "model.intermediate_size=64", "model.lora.rank=2"),
    *("warm_start.steps=5", "warm_start.batch_size=16", "warm_start.threads=1", "learner.groups_per_step=4"),
    *("learner.group_size=4", "rollout.slots=32", "replay.drop_no_spread=false", "evaluation.prompts=8"),
    *("evaluation.gammas=[3]", "evaluation.confidences=[]", "evaluation.tokens_per_step=[]"),
    *("evaluation.drift_every=2", "evaluation.drift_prompts=8", "rollout.precision=bfloat16", "rollout.cpus=0.5"),
    *("learner.cpus=0.5", f"learner.ranks={COUNT}", "run.checkpoint_every=2", "run.name=run", "learner.kl_beta=0.01"),
]


def rank_actors(of: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in of.children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RankActor"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_along_and_the_run_goes_on(tmp_path: Path) -> None:
    """Adapters, published as bfloat16, by two ranks, of which one is killed; later the run is stopped."""
    base = [sys.executable, "-m", "learner", "train", "--config", "deploy/configs/sudoku.yaml"]
    process = subprocess.Popen(
        [*base, *RUN, f"run.root={tmp_path}"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    run = tmp_path / "run"

    def steps() -> list[float]:
        rows = RunDirectory(run).read_metrics() if (run / "metrics.jsonl").exists() else []
        return [row["learner_steps"] for row in rows if row["kind"] == "step"]

    def wait(condition: Callable[[list[float]], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition(steps()):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(process.communicate()[0][-3000:])
            time.sleep(0.1)

    wait(lambda done: 3 in done)
    [victim] = rank_actors(psutil.Process(process.pid))
    victim.kill()
    wait(lambda done: any(later <= earlier for earlier, later in pairwise(done)))  # trained again, from a checkpoint
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output[-3000:]
    assert "the learner died and is started again" in " ".join(output.split())
    newest = max((run / "checkpoints").iterdir())
    assert newest.name == f"step-{int(steps()[-1]):06d}"
    assert sorted(file.name for file in newest.glob("*.safetensors")) == [
        "adapter_model.safetensors",
        "threshold.safetensors",
    ]


def test_policies_are_unchanged_without_ranks() -> None:
    """One rank alone keeps plain parameters."""
    policy: Policy = tiny_policy()
    Ranks().shard(policy)
    assert not any(sharded(parameter) for parameter in policy.parameters())
