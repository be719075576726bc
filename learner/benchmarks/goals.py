"""Goals: what the figures of the benchmarks mean, and the bounds that they are held to."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """One figure of a benchmark."""

    key: str
    what: str
    least: float | None = None
    most: float | None = None
    stable: bool = False
    """Whether a quick measurement on a shared machine tells a regression from noise: `--check` asks for these."""

    @property
    def bound(self) -> str:
        """As a page shows it; empty where there is none."""
        if self.least is not None and self.least == self.most:
            return f"{self.least:g}"
        parts = [f">= {self.least:g}"] if self.least is not None else []
        return ", ".join([*parts, f"<= {self.most:g}"] if self.most is not None else parts)

    def holds(self, value: float) -> bool:
        """Whether a value is within the bounds; NaN is not."""
        low = -float("inf") if self.least is None else self.least
        high = float("inf") if self.most is None else self.most
        return low <= value <= high


GOALS: dict[str, tuple[Goal, ...]] = {
    "main": (
        Goal("minutes_to_plot", "minutes to the plot, installation not included"),
        Goal("frontier_gain", "area under the accuracy-NFE frontier, after less before", least=0.0),
        Goal("reward_before", "reward after deducting the cost, before"),
        Goal("reward_after", "the same, after"),
        Goal("accuracy_before", "exact solve, before"),
        Goal("accuracy_after", "the same, after"),
        Goal("nfe_before", "NFE, before"),
        Goal("nfe_after", "the same, after"),
        Goal("greedy_accuracy_before", "greedy exact solve, before"),
        Goal("greedy_accuracy_after", "the same, after"),
        Goal("greedy_nfe_before", "greedy NFE, before"),
        Goal("greedy_nfe_after", "the same, after"),
        Goal("greedy_cells_before", "greedy cells right, before"),
        Goal("greedy_cells_after", "the same, after"),
    ),
    "engine": (
        Goal("speedup_v32k", "completions/s over LLaDA's batched loop, vocabulary 32,000", least=6, stable=True),
        Goal("speedup_v32", "the same, vocabulary 32", least=2.5),
        Goal("nfe_cv_v32", "coefficient of variation of NFE over those requests"),
        Goal("overhead_small", "wall time over bare forwards, default model", most=1.15),
        Goal("overhead_25m", "the same, 25 M parameters", most=1.15),
        Goal("row_forward_ratio", "rows forwarded over rows needed", most=1.02, stable=True),
        Goal("identical", "share of completions that equal the textbook sampler's, temperature 0", 1, 1, stable=True),
        Goal("sampling_p_value", "smallest p of chi-square tests of the draws", least=0.001, stable=True),
        Goal("prefix_speedup", "completions/s with the prefix cache over without, 25 M parameters"),
        Goal("dual_speedup", "the same, dual cache"),
        Goal("prefix_drift", "mean KL(exact || cached), nats, untrained model, prefix"),
        Goal("dual_drift", "the same, dual"),
        Goal("compile_speedup", "completions/s with torch.compile over without"),
    ),
    "learner": (
        Goal("two_mf_cost", "a 2-MF step of ours over a plain loop's 1-MF step", most=1.3),
        Goal("vs_plain_loop", "completions/s over a plain padded loop with the same loss", least=1.5),
        Goal("rows_ratio", "rows forwarded over the plain loop's", most=0.6, stable=True),
        Goal("tokens_vs_plain_25m", "tokens/s over the plain loop's, vocabulary 32,000, 25 M parameters", least=1.5),
        Goal("tokens_vs_plain_100m", "the same, 100 M parameters", least=1.5),
        Goal(
            "memory_vs_plain_126k",
            "peak bytes over the plain loop's, vocabulary 126,464, the worse size",
            most=0.6,
            stable=True,
        ),
        Goal("memory_linear", "R² of the line through peak bytes by token budget", least=0.98, stable=True),
        Goal("memory_per_token_spread", "bytes per token, largest over smallest of the budgets"),
        Goal(
            "cut_gradient_difference",
            "largest relative difference of gradients between cuts, float64",
            most=1e-9,
            stable=True,
        ),
        Goal("diagnostics_cost", "time that the diagnostics add, as a share of a step"),
    ),
    "async": (
        Goal("efficiency_cv0", "async / sync speed-up as a share of the model's, CV 0", least=0.95),
        Goal("efficiency_cv05", "the same, CV 0.5", least=0.95),
        Goal("efficiency_cv1", "the same, CV 1", least=0.95),
        Goal("speedup_cv05", "speed-up at CV 0.5, `max_staleness` 3", least=2.8),
        Goal("model_speedup_cv05", "the model's"),
        Goal("bound_violations", "groups trained beyond the bound", 0, 0, stable=True),
        Goal("bound_groups", "of so many"),
        Goal("wasted", "share generated in vain, windowed FIFO", most=0.01),
        Goal("learner_idle", "learner idle at 1.2 times the capacity", most=0.05),
        Goal("learner_idle_excess", "learner idle above the model's, worst run", most=0.05),
        Goal("wakeup_p50_ms", "wake-up of a blocked `sample()`, ms", most=10),
        Goal("buffer_vs_queue", "groups/s, 256 a call, over `ray.util.queue`, one a call", least=10),
        Goal("adopt_stall", "a rollout's standstill per version, as a share of a 1 s step", most=0.01),
        Goal("adopt_8_vs_1", "publication to adoption, 8 actors over 1", most=1.5),
        Goal("scaling_64", "64 engines in 8 processes over 64 times one", least=0.95),
        Goal("control_cores", "CPU of buffer and controller meanwhile, cores", most=0.2),
        Goal("live_scaling", "throughput after one actor was added to 2, over 3/2", least=0.95),
    ),
    "chaos": (
        Goal("kills", "SIGKILLs of rollout actors, buffer, learner and driver", least=50),
        Goal("groups_lost", "acknowledged groups that the final weights do not contain", 0, 0, stable=True),
        Goal("groups_twice", "groups that they contain twice", 0, 0, stable=True),
        Goal("regenerated", "acknowledged groups that were generated again", 0, 0, stable=True),
        Goal("throughput_under_kills", "throughput with 1 of 4 actors killed every 10 s, over without", least=0.9),
        Goal("recovery_s", "kill to the first group of the replacement, less the imports, s", most=3),
        Goal("all_dead_exit_s", "all actors dead to the driver's end, s", most=60, stable=True),
        Goal("all_dead_exit_code", "its exit code", 1, 1, stable=True),
        Goal("resume_max_diff", "parameters, killed and resumed against uninterrupted", 0, 0, stable=True),
        Goal("checkpoint_cost", "learner's standstill for a checkpoint over 10 steps", most=0.02),
        Goal("corruption_found", "share of damages to a checkpoint found, the previous one used", 1, 1, stable=True),
    ),
    "scaling": (
        Goal("groups_lost", "groups lost while a run goes 1 -> 4 -> 1", 0, 0, stable=True),
        Goal("groups_twice", "groups trained twice", 0, 0, stable=True),
        Goal("regenerated", "groups generated again", 0, 0, stable=True),
        Goal("learner_pauses", "steps whose interval after a command is 1.5 times the longest without", 0, 0),
        Goal("longest_s", "longest interval with a command, s"),
        Goal("longest_without_s", "longest without, s"),
        Goal("actors", "actors that a run gives itself, of at most 8"),
        Goal("speed_vs_most", "its speed over that of 8"),
    ),
    "exporter": (
        Goal("scrape_ms", "a scrape of everything, 64 actors, ms", most=50, stable=True),
        Goal("series", "series in it", most=2000, stable=True),
        Goal("update_ms", "the controller adds 64 actors up and hands all over, every 2 s, ms"),
    ),
    "report": (
        Goal("seconds", "`diffpo report` of 200 steps and 5,000 completions, start of Python included, s", most=10),
        Goal("bytes", "size", most=5e6, stable=True),
        Goal("first_paint_ms", "first paint in Chromium, ms", most=1000),
    ),
    "gpu": (
        Goal("engine_speedup", "completions/s over LLaDA's batched loop, 8 B in bfloat16"),
        Goal("engine_overhead", "wall time over bare forwards and heads", most=1.15),
        Goal("engine_tokens_per_second", "completion tokens per second"),
        Goal("prefix_speedup", "completions/s with the prefix cache over without"),
        Goal("dual_speedup", "the same, dual cache"),
        Goal("rollout_memory_vs_plan", "peak memory of a rollout actor over the plan's", most=1, stable=True),
        Goal("lora_tokens_per_second", "completion tokens trained on per second, 8 B with adapters"),
        Goal("learner_memory_vs_plan", "peak memory of that learner over the plan's", most=1, stable=True),
        Goal("tokens_vs_plain_1b", "tokens/s over the plain loop's, 1 B"),
        Goal("memory_vs_plain_126k_1b", "peak bytes over the plain loop's, 1 B"),
    ),
}
"""By benchmark, in the order of its page."""


def flat(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a benchmark's result, those one level deeper too."""
    found: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            found |= {name: inner for name, inner in value.items() if isinstance(inner, int | float)}
        elif isinstance(value, int | float):
            found[key] = value
    return found


def broken(name: str, result: dict[str, Any], *, stable_only: bool) -> list[str]:
    """Which bounds a result breaks, a line each; a figure that was not measured breaks none."""
    numbers = flat(result)
    return [
        f"{goal.key} is {numbers[goal.key]:.4g}, and should be {goal.bound} ({goal.what})"
        for goal in GOALS[name]
        if goal.key in numbers and (goal.stable or not stable_only) and not goal.holds(numbers[goal.key])
    ]
