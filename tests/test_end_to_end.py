"""The main job as a user starts it: to the end, stopped, with parts that die, resumed, and as a submitted Ray job."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from run_fixtures import ENDLESS, ROOT, command, rows, start, wait_for_step
from transformers import AutoModelForCausalLM

from common.config_file import load_config
from common.metrics import CATALOGUE, PREFIX
from common.policy_loading import load_policy
from common.version import LINEAGE, step_of
from common.weight_store import digest
from common.weights import to_flat
from learner.reference_loop import reference_loop
from learner.run_directory import RunDirectory
from learner.study.single_run import SingleRun


# additive cost: an untrained model never solves countdown, and then only NFE tells completions apart
@pytest.mark.parametrize(
    ("config", "staleness", "cost"),
    [("sudoku", 0, "multiplicative"), pytest.param("countdown", 2, "additive", marks=pytest.mark.slow)],
)
def test_runs_to_the_end(config: str, staleness: int, cost: str, tmp_path: Path) -> None:
    """Warm start, asynchronous (and synchronous) training, evaluation, plot; every token within the bound."""
    done = subprocess.run(
        command(
            config,
            tmp_path,
            "learner.steps=6",
            f"replay.max_staleness={staleness}",
            f"learner.cost={cost}",
            "run.checkpoint_every=2",
            "learner.micro_batch_tokens=65536",  # the whole batch, as in the reference loop
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    run = tmp_path / "run"
    assert done.returncode == 0, done.stdout + done.stderr
    assert "frontier gain" in done.stdout
    steps = rows(run)
    assert [row["learner_steps"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert max(row["replay_staleness_max"] for row in steps) <= staleness
    first_tokens = [row["learner_weight_mean{reveal_step=1}"] for row in steps if row["replay_staleness_max"] == 0]
    assert first_tokens, "the first batch is always at staleness 0"
    # the free gauge: tokens of step 1 were drawn given z_0; bf16 autocast in learner and rollout leaves some noise
    assert first_tokens == pytest.approx([1.0] * len(first_tokens), abs=0.05)
    assert (run / "pareto.png").read_bytes().startswith(b"\x89PNG")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert {row["rule"] for row in evaluation["settings"]["after"]} == {"entropy_bound", "confidence", "top_k"}
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]
    before = AutoModelForCausalLM.from_pretrained(run / "warm_start").state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000006").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if staleness == 0:
        assert_a_single_process_trains_the_same(run)


def assert_a_single_process_trains_the_same(run: Path) -> None:
    """The synchronous run of the studies and the reference loop end with the very weights of the distributed run."""
    config = load_config(run / "config.yaml", [])
    started = load_policy(run / "warm_start", config.model, config.sampler.threshold)
    ended = load_policy(run / "checkpoints" / "step-000006", config.model, config.sampler.threshold)
    threads = torch.get_num_threads()
    try:
        single = SingleRun(config, to_flat(started.model))
        result = single.run()
        *_, last = reference_loop(config, started)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert digest(to_flat(single.learner.policy)) == last.digest == digest(to_flat(ended))
    assert [point["step"] for point in result["validation"]] == [0, 2, 4, 6]
    drift = [row["drift_nfe"] for row in rows(run) if "drift_nfe" in row]
    assert [point["drift_nfe"] for point in result["validation"][1:]] == pytest.approx(drift)
    json.dumps(result)


def test_sigterm_ends_with_a_checkpoint_and_metrics_were_served(tmp_path: Path) -> None:
    """The endpoint serves catalogue names only; SIGTERM leaves a checkpoint of the last step and exit code 143."""
    process = start("sudoku", tmp_path, ENDLESS)
    run = tmp_path / "run"
    wait_for_step(process, run, 3)
    target = json.loads((run / "metrics_target.json").read_text())[0]["targets"][0]
    assert target.startswith("127.0.0.1:")
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as reply:
        lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
    names = {line.split("{")[0].split(" ")[0] for line in lines}
    assert names <= {sample for metric in CATALOGUE.values() for sample in metric.samples}
    assert {f"{PREFIX}{name}" for name in ("learner_steps_total", "replay_groups", "rollout_actors")} <= names
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    last = json.loads(max((run / "checkpoints").glob("step-*/manifest.json")).read_text())
    assert last["step"] == rows(run)[-1]["learner_steps"]
    assert not (run / "evaluation.json").exists()


@pytest.mark.slow
def test_a_dead_fleet_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    """A killed actor is replaced while training goes on; when restarts are exhausted the run fails and says why."""
    process = start("sudoku", tmp_path, ENDLESS, "rollout.max_restarts=1")
    run = tmp_path / "run"
    wait_for_step(process, run, 2)
    kill(process.pid, "RolloutActor")
    wait_for_step(process, run, len(rows(run)) + 12)  # more than was buffered: the replacement generates
    kill(process.pid, "RolloutActor")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "all 1 rollout actors are dead" in output


@pytest.mark.slow
def test_rollout_actors_are_added_and_drained_while_the_run_trains(tmp_path: Path) -> None:
    """`diffpo scale` from another process: nothing is lost or leased twice, and training goes on."""
    run = tmp_path / "run"

    def scale(actors: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "learner", "scale", str(run), "--actors", str(actors)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    def wait_for_actors(count: int) -> None:
        deadline = time.monotonic() + 60
        while metric(run, "rollout_actors") != count:
            assert time.monotonic() < deadline, count
            time.sleep(0.5)

    process = start("sudoku", tmp_path, ENDLESS, "rollout.cpus=0.2", "run.stall_timeout=100")
    wait_for_step(process, run, 2)
    done = scale(3)
    assert (done.returncode, done.stdout) == (0, f"{run}: 1 -> 3 rollout actors\n"), done.stderr
    wait_for_actors(3)
    wait_for_step(process, run, len(rows(run)) + 10)
    assert scale(1).returncode == 0
    wait_for_actors(1)
    wait_for_step(process, run, len(rows(run)) + 10)
    assert (metric(run, "rollout_restarts_total"), metric(run, "replay_wasted_groups_total")) == (0, 0)
    for actors, cause in ((0, "0 rollout actors; a run needs at least 1"), (-2, "-2 rollout actors")):
        refused = scale(actors)
        assert refused.returncode == 2
        assert cause in refused.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    refused = scale(2)
    assert refused.returncode == 2
    assert "is not going" in refused.stderr


def metric(run: Path, name: str) -> float:
    """One value from a run's endpoint."""
    target = json.loads((run / "metrics_target.json").read_text())[0]["targets"][0]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f'{PREFIX}{name}{{run="run"}} '))


@pytest.mark.slow
def test_a_run_survives_its_learner_its_buffer_and_its_driver(tmp_path: Path) -> None:
    """SIGKILL to each of them in turn; `--resume` finishes the run, and no group that was accepted is lost."""
    run = tmp_path / "run"
    process = start("sudoku", tmp_path, ENDLESS, "run.checkpoint_every=2", "replay.max_staleness=1")
    wait_for_step(process, run, 3)
    for part in ("LearnerActor", "ReplayBuffer"):
        kill(process.pid, part)
        wait_for_step(process, run, len(rows(run)) + 4)  # more than was buffered: groups are generated again
    assert (metric(run, "learner_restarts_total"), metric(run, "replay_lost_groups_total")) == (1, 0)
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert "the learner died and is started again" in output
    assert not (run / "evaluation.json").exists()

    steps = int(rows(run)[-1]["learner_steps"]) + 4
    resume = [sys.executable, "-m", "learner", "train", "--resume", str(run), f"learner.steps={steps}"]
    resumed = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert json.loads((run / "evaluation.json").read_text())["steps"] == steps
    versions = [int(row["weights_version"]) for row in rows(run)]
    after = [step_of(version) for version in versions if version // LINEAGE == versions[-1] // LINEAGE]
    assert after == list(range(after[0], steps + 1))
    assert versions == sorted(set(versions)), "none stands for two sets of weights"
    assert [step_of(version) for version in versions] == [row["learner_steps"] for row in rows(run)]
    last = RunDirectory(run).checkpoint_store(load_config(run / "config.yaml", [])).checkpoints()[-1]
    assert (last.step, last.version) == (steps, versions[-1])
    assert last.facts["counters"]["lost_groups"] == last.facts["counters"]["violations"] == 0
    again = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert f"has finished its {steps} steps" in again.stderr


@pytest.mark.slow
def test_a_run_in_which_nothing_can_be_trained_ends(tmp_path: Path) -> None:
    """A model that never solves countdown yields groups of equal rewards; discarding them is not progress."""
    process = start("countdown", tmp_path, "warm_start.steps=0", "replay.drop_no_spread=true", "run.stall_timeout=15")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "groups were discarded since for equal rewards" in output.splitlines()[-1]
    waits = json.loads((tmp_path / "run" / "stall.json").read_text())
    assert waits["phase"] == "train"
    assert waits["learner"].startswith("waits for a batch from the buffer")
    assert waits["buffer"]["the learner waits for groups"]
    assert len(waits["rollout actors"]) == 1


def kill(driver: int, name: str) -> None:
    """SIGKILL to the actors called `name` in the run that `driver` started."""
    children = psutil.Process(driver).children(recursive=True)
    actors = [child for child in children if name in " ".join(child.cmdline())]
    assert actors, [" ".join(child.cmdline())[:60] for child in children]
    for actor in actors:
        actor.kill()


@pytest.fixture
def ray_head():
    """A head node with the job server, on ports of its own, with token authentication as Ray ships it."""
    binaries = Path(sys.executable).parent  # first on the path, as in an activated virtual environment
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "PATH": f"{binaries}:{os.environ['PATH']}"}
    head = ["ray", "start", "--head", "--block", "--num-cpus=2", "--port=6411", "--dashboard-port=8311"]
    head.append("--dashboard-agent-listen-port=8312")  # its default may be held by another Ray on this machine
    process = subprocess.Popen(head, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not listening(8311):
        assert time.monotonic() < deadline, "the job server did not start"
        time.sleep(0.5)
    yield environment, "http://127.0.0.1:8311"
    process.terminate()
    process.wait(timeout=30)


def listening(port: int) -> bool:
    """Whether something accepts connections on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_job_submission_trains_to_the_end(ray_head, tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- python -m learner train …` on a local head; submitted again it resumes."""
    environment, address = ray_head
    submit = ["ray", "job", "submit", "--address", address, "--working-dir", "."]
    for steps in (3, 5):
        job = [*submit, "--", "python", *command("sudoku", tmp_path, f"learner.steps={steps}")[1:]]
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
            # the job server listens before the head's agent has registered, and asks to be tried again
            if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["steps"] == steps
    assert [row["learner_steps"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "pareto.png").is_file()
