"""Remote job: a command of ours as a short Ray job on a cluster that is reached through its job server alone.

Ray's token is taken from where Ray keeps it, if `RAY_AUTH_MODE=token` was set before Ray was imported.
"""

import shlex
import time
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from common.errors import RunError, UserError, one_line

POLL_SECONDS = 0.5
BEGINNING = "Running entrypoint for job"
PATIENCE = 300.0  # to start, which may install a runtime environment, and to answer, beside what the command takes


def run_remotely(address: str, arguments: list[str], working_dir: Path | None, *, seconds: float = 0.0) -> str:
    """What `python -m learner ARGUMENTS` prints there.

    Args:
        address: of the job server, http://HOST:8265.
        arguments: of the command.
        working_dir: a checkout to send along; None where the cluster's Python has DiFFPO.
        seconds: that the command itself may take.

    Raises:
        UserError: when the job server cannot be reached, refuses the token, or the command says so.
        RunError: when the job fails, or takes too long.
    """
    runtime_env = {"working_dir": str(working_dir)} if working_dir is not None else None
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(["python", "-m", "learner", *arguments]), runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError) as error:
        raise UserError(
            f"job server {address} cannot be used ({one_line(error)}); give --address http://HOST:8265 of a running "
            "head, and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    patience = PATIENCE + seconds
    until = time.monotonic() + patience
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() >= until:
            client.stop_job(job)
            raise RunError(f"job {job} at {address} is {status.value} after {patience:g} s; look at its log there")
        time.sleep(POLL_SECONDS)
    lines = client.get_job_logs(job).strip().splitlines()
    begins = next((at for at, line in enumerate(lines, 1) if line.startswith(BEGINNING)), 0)
    lines = lines[begins:]  # before it, Ray tells how it starts the job
    if status is JobStatus.SUCCEEDED:
        return "\n".join(lines)
    said = [line for line in lines if line.startswith(("error: ", "run failed: "))]
    if said:
        kind, text = said[-1].split(": ", 1)
        raise (UserError if kind == "error" else RunError)(text)
    last = lines[-1] if lines else client.get_job_info(job).message or "no output"
    raise RunError(
        f"job {job} at {address} failed: {last}; where its Python has no DiFFPO, give --working-dir a checkout"
    )
