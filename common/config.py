"""Config: the one tree that says what a run is.

- Each key's docstring is its documentation; limits stand beside it, and limits between sections at the end, so that
  nothing expensive starts on a configuration that cannot run.
- `common.config_file` reads it. Neither imports torch or ray: `diffpo --help` and `--dry-run` stay fast.
"""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from common.location import below, is_uri
from common.section import Section
from common.spelling import LABEL, PROJECT, RUN_NAME
from common.tasks import TaskConfig
from common.version import LINEAGE

Label = Annotated[str, Field(pattern=LABEL)]
Where = Annotated[str, AfterValidator(os.path.expanduser)]  # shells leave the tilde of run.root=~/runs
Increasing = Annotated[tuple[Annotated[float, Field(le=1e6)], ...], Field(min_length=1)]
SMALLEST_GAMMA = 1e-9  # nats; what is smaller counts as this wherever a logarithm is taken
SMALLEST_REWARD_MEMORY = 64 * 2**20  # bytes
LARGEST_REWARD_MEMORY = 2**60
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job


class LoraConfig(Section):
    """Low-rank adapters beside a frozen model (arXiv 2106.09685); the reference policy is the model without them."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: an adapter counts alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters in supervised training; reinforcement learning scores without, as it sampled."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("auto",)
    """Names of the linear layers that get adapters, e.g. [q_proj, v_proj]; auto is all but the output head."""

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given


class ModelConfig(Section):
    """The masked diffusion language model: a folder in Hugging Face layout, or a small one built from sizes."""

    path: Where | None = None
    """Folder of a checkpoint: LLaDA, Dream and others as they are published (docs/models.md), what `diffpo convert`
    wrote, or a checkpoint of a run, or a URI (s3://…) of one, of which every node makes a copy; null builds a small
    model and warm-starts it."""
    mask_token: str | None = None
    """The MASK token, where neither the tokenizer nor config.json in `path` names it."""
    chat_template: Literal["auto", "off"] = "auto"
    """auto: prompts go through the tokenizer's chat template, if it has one; off: they are read as they are."""
    hidden_size: int = Field(default=128, ge=8)
    """Width of the built model."""
    layers: int = Field(default=4, ge=1)
    """Transformer layers of the built model."""
    heads: int = Field(default=4, ge=1)
    """Attention heads of the built model; must divide `hidden_size`."""
    intermediate_size: int = Field(default=512, ge=8)
    """Width of the built model's feed-forward layers."""
    max_positions: int = Field(default=512, ge=8)
    """Longest prompt plus completion of the built model, in tokens."""
    device: str = "cpu"
    """torch device of rollout and learner, e.g. `cpu`, `cuda`."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation; on CPU, for sequences of some tens of tokens, try eager: it may train faster."""
    lora: LoraConfig | None = None
    """Adapters; null trains all weights. A model built here is warm-started whole, then adapted."""

    @field_validator("chat_template", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden_size={self.hidden_size}; choose a divisor")
        if (width := self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} over heads={self.heads} is {width} wide, and positions turn pairs; "
                "choose numbers that give an even width"
            )
        return self


class WarmStartConfig(Section):
    """Supervised masked-diffusion training on demonstrations before reinforcement learning."""

    steps: int = Field(default=700, ge=0)
    """Optimizer steps; 0 keeps the model as built."""
    batch_size: int = Field(default=128, ge=1)
    """Demonstrations per step, unless `batch_tokens` is set."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Demonstrations are taken for a step until they have so many tokens; null takes `batch_size` of them."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens, padding included, of one forward and backward pass (at least one row); a step adds up as many as it
    needs."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest demonstration, prompt and completion, and length of a packed row. null: the sampler's limits, what
    exceeds them is refused, and completions are padded with EOS to L."""
    pack: bool = True
    """With max_tokens: several demonstrations in a row, which see nothing of each other; models that cannot take such
    an attention mask (sliding windows) get one in a row."""
    too_long: Literal["skip", "truncate", "refuse"] = "skip"
    """With max_tokens, what becomes of longer demonstrations: left out and counted, or their completion is cut; one
    whose prompt leaves no room is left out all the same."""
    eos_padding: int = Field(default=64, ge=1)
    """With max_tokens: a completion ends with at least one EOS, and is padded with at most so many of them up to
    sampler.max_completion_tokens. They count as part of it (LLaDA pads to the longest of the batch)."""
    held_out: int = Field(default=0, ge=0)
    """Demonstrations that are kept out of the warm start (of a file; of a task: from its validation split), to measure
    the loss on."""
    held_out_every: int = Field(default=100, ge=1)
    """Steps between those measurements; one more at the end."""
    checkpoint_every: int = Field(default=200, ge=0)
    """Steps between the checkpoints of `diffpo sft`, from which `--resume` goes on; 0 is never."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate; linear warm-up over 5 % of the steps, then cosine to a tenth."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    file: str | None = None
    """JSONL or Parquet file in place of the task's demonstrations: rows with `prompt` and `completion`, or
    `messages`."""
    autocast: bool = True
    """bfloat16 autocast (weights stay float32) where the device has it."""
    threads: int = Field(default=2, ge=1)
    """torch threads; nothing else runs during the warm start."""


class ThresholdConfig(Section):
    """The threshold policy p_phi(gamma | c)."""

    head: Literal["categorical", "log_normal"] = "categorical"
    """Categorical over `gamma_grid`, or a normal over ln(gamma)."""
    gamma_grid: Increasing = (0.003, 0.007, 0.016, 0.038, 0.088, 0.205, 0.477, 1.109, 2.58, 6.0)
    """Thresholds (nats) the categorical head chooses from; strictly increasing, 1e-9 or more."""
    gamma_init: float = Field(default=0.3, gt=0, le=1e6)
    """Threshold (nats) around which the head starts, and the fixed one when the threshold is not trained."""
    init_width: float = Field(default=1.0, gt=0, le=10)
    """Standard deviation, in ln(gamma), of the initial distribution."""
    prompt_blind: bool = False
    """Bias only: the same distribution for every prompt (a control). No use with learner.train=model."""
    standardise: bool = False
    """Standardise the head's features over the prompts of the first batch, so that what tells prompts apart counts. No
    use with learner.train=model."""

    @field_validator("gamma_grid")
    @classmethod
    def _increasing(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if grid[0] < SMALLEST_GAMMA or any(b <= a for a, b in pairwise(grid)):
            raise ValueError(
                f"{list(grid)} must be strictly increasing from {SMALLEST_GAMMA:g} or above; sort it and drop repeats"
            )
        return grid


class SamplerConfig(Section):
    """How completions are denoised."""

    rule: Literal["entropy_bound", "sampled_entropy_bound", "confidence", "top_k"] = "entropy_bound"
    """Reveal rule (entropy_bound: arXiv 2505.24857; confidence: 2505.22618; top_k: 2502.09992); sampled_entropy_bound
    draws the revealed set, and the learner scores it."""
    max_prompt_tokens: int = Field(default=32, ge=1)
    """Longest prompt, in tokens; longer ones are refused before the run starts."""
    max_completion_tokens: int = Field(default=16, ge=1)
    """Completion length L, in tokens."""
    block_length: int | None = None
    """Semi-autoregressive block, in tokens; null is the whole completion."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """Keys and values kept inside a block (Fast-dLLM, arXiv 2505.22618): none is exact; prefix computes only from the
    active block on, dual only the block."""
    cache_drift_every: int = Field(default=32, ge=0)
    """Cached forward passes between measurements, on one row, of how far they are from exact ones; 0 is never."""
    temperature: float = Field(default=1.0, ge=1e-3)
    """Temperature of the draw in training; the reveal rule never sees it."""
    confidence_threshold: float = Field(default=0.9, gt=0, le=1)
    """Top probability from which the `confidence` rule reveals."""
    tokens_per_step: int = Field(default=1, ge=1)
    """Positions that the `top_k` rule reveals per step."""
    threshold: ThresholdConfig = ThresholdConfig()
    """The threshold policy."""

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        block = self.block_length
        if block is not None and (block < 1 or self.max_completion_tokens % block):
            raise ValueError(
                f"block_length={block} does not divide max_completion_tokens={self.max_completion_tokens}; "
                "choose a divisor, or null for the whole completion"
            )
        return self


class RolloutConfig(Section):
    """The fleet of rollout actors."""

    actors: int = Field(default=1, ge=1, le=500)
    """Rollout actors; with `max_actors`, those that a run begins with."""
    min_actors: int = Field(default=1, ge=1)
    """Fewest rollout actors, where the run scales itself."""
    max_actors: int | None = Field(default=None, ge=1, le=500)
    """Most rollout actors, and the run scales itself, from who waits for whom; null: `actors`, until `diffpo scale`."""
    scaling_seconds: float = Field(default=30.0, gt=0)
    """Seconds over which is judged, all actors working, whether there are too few or too many."""
    labels: dict[Label, Label] = Field(default_factory=dict)
    """Ray node labels that the node of a rollout actor must have, e.g. {gpu: inference}."""
    slots: int = Field(default=256, ge=1, le=1_000_000)
    """Rows that one engine denoises at once."""
    threads: int = Field(default=1, ge=1)
    """torch threads of one rollout actor."""
    cpus: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for one rollout actor, and for one task of the final evaluation."""
    gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for one rollout actor."""
    precision: Literal["float32", "autocast", "bfloat16"] = "float32"
    """float32; autocast: bfloat16 products under float32 weights, where the device has it; bfloat16: weights too."""
    compile: bool = False
    """torch.compile the forward pass: padding is fixed, and the number of rows rounded up to an eighth of `slots`."""
    reward_workers: int = Field(default=1, ge=1)
    """Reward processes of one rollout actor."""
    reward_cpus: float | None = Field(default=None, gt=0)
    """CPUs that Ray reserves, on another node maybe, for the rewards of each rollout actor; null scores inside it."""
    reward_labels: dict[Label, Label] = Field(default_factory=dict)
    """Ray node labels that the node of these rewards must have, e.g. {gpu: none}; needs `reward_cpus`."""
    reward_timeout: float = Field(default=10.0, gt=0, le=604_800)
    """Seconds that the rewards of one group may take; in evaluation, that of one prompt."""
    reward_memory_bytes: int = Field(default=2**30)
    """Address space that rewards may take beyond what their process holds once the task is built. At least 64 MiB, at
    most 1 EiB; enforced on Linux."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of one rollout actor (its node's preemption is none) before the run gives it up."""
    drain_seconds: float = Field(default=60.0, ge=0)
    """Seconds that an actor which is taken away has to finish its leases; after that they go back to the queue."""

    @field_validator("reward_memory_bytes")
    @classmethod
    def _room_to_score(cls, given: int) -> int:
        if given < SMALLEST_REWARD_MEMORY:
            raise ValueError(
                f"{given} is below {SMALLEST_REWARD_MEMORY} (64 MiB), which a reward process needs to import a module "
                "or start a thread; give that or more"
            )
        if given > LARGEST_REWARD_MEMORY:
            raise ValueError(f"{given} is above {LARGEST_REWARD_MEMORY} (1 EiB), which is no limit; give that or less")
        return given

    @model_validator(mode="after")
    def _within_bounds(self) -> Self:
        if self.reward_labels and self.reward_cpus is None:
            raise ValueError(
                f"reward_labels={self.reward_labels} without reward_cpus: rewards are scored inside the rollout "
                "actors; give reward_cpus=1, or leave reward_labels out"
            )
        if self.max_actors is not None and not self.min_actors <= self.actors <= self.max_actors:
            raise ValueError(
                f"actors={self.actors} must lie between min_actors={self.min_actors} and "
                f"max_actors={self.max_actors}; change one of them"
            )
        return self


class ReplayConfig(Section):
    """The replay buffer: leases, admission, weight versions."""

    max_staleness: int = Field(default=2, ge=0)
    """Largest staleness of a trained group, in versions; 0 is synchronous."""
    admission: Literal["windowed_fifo", "strict_fifo", "aggregate_lead", "drop_when_stale"] = "windowed_fifo"
    """How staleness is limited; aggregate_lead limits its mean only, drop_when_stale discards what grew too old."""
    lease_seconds: float = Field(default=120.0, ge=0.1, le=604_800)
    """Deadline of a lease; renewed while its actor lives."""
    keep_versions: int = Field(default=2, ge=1)
    """Weight versions kept in the object store."""
    drop_no_spread: bool = True
    """Discard groups whose rewards are all equal and draw replacements (dynamic sampling)."""
    max_restarts: int = Field(default=10, ge=0)
    """Deaths of the replay buffer after which it goes on from its files; one more ends the run."""
    memory_bytes: int = Field(default=256 * 2**20, ge=0)
    """Bytes of finished groups kept in memory; what exceeds them is read from its file in RUN/segments."""


class LearnerConfig(Section):
    """Objective and optimizer."""

    train: Literal["model", "threshold", "joint"] = "joint"
    """What learns: the model's weights, the threshold head, or both. With threshold the keys of the surrogate and of
    token losses have no use, with model those of the threshold."""
    steps: int = Field(default=120, ge=1, lt=LINEAGE)
    """Learner steps (batches)."""
    groups_per_step: int = Field(default=32, ge=1)
    """Groups in one batch."""
    group_size: int = Field(default=8, ge=2)
    """Completions per group, G; advantages need at least 2."""
    inner_updates: int = Field(default=1, ge=1)
    """Optimizer updates on one batch (mu)."""
    surrogate: Literal["mean_field", "coupled_masks"] = "mean_field"
    """m-times mean field, or random masks and their complements (DiffuCoder, arXiv 2506.20639): three passes."""
    surrogate_passes: int = Field(default=2, ge=1)
    """m of the m-times mean-field surrogate: 1 = d1, 2 = DiFFPO, >= NFE = exact (with tau_law: distinct);
    coupled_masks has no use for it."""
    tau_law: Literal["paper", "distinct"] = "paper"
    """paper: m = 2, tau uniform on 0..NFE-1; distinct: m-1 distinct values of 1..NFE-1; mean_field only."""
    prompt_masking: float = Field(default=0.0, ge=0, lt=1)
    """Probability that the surrogate hides a prompt token (d1: 0.15); above 0 no pass is shared inside a group."""
    importance_weight: Literal["truncated", "none", "self_normalised"] = "truncated"
    """Weight of surrogate over behaviour likelihood; self_normalised divides by the batch's mean truncated weight."""
    weight_level: Literal["token", "sequence"] = "token"
    """One weight per token, or one per completion: the product over its scored tokens, truncated."""
    weight_cap: float = Field(default=2.0, gt=0)
    """Truncation C of the importance weights."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Lower clip of the ratio."""
    clip_high: float = Field(default=0.2, gt=0)
    """Upper clip of the ratio."""
    loss_mean: Literal["completion", "token"] = "completion"
    """Mean over tokens inside each completion first (paper), or over all tokens (d1)."""
    kl_beta: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || warm start)."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """Baseline inside a group."""
    advantage_std: bool = True
    """Divide advantages by the group's standard deviation."""
    speed_weight: float = Field(default=0.3, ge=0, le=1)
    """Cost of forward passes: R = r * (1 - speed_weight * NFE / L)."""
    cost: Literal["multiplicative", "additive", "off"] = "multiplicative"
    """Form of the cost term; additive is R = r - speed_weight * NFE / L."""
    threshold_weight: float = Field(default=1.0, ge=0)
    """Weight of the threshold objective in joint training."""
    entropy_bonus: float = Field(default=0.01, ge=0)
    """Weight of the threshold policy's entropy, over the completions that are scored."""
    drift_remedy: Literal["auto", "none", "hold_nfe", "hold_entropy"] = "auto"
    """Against threshold drift when only the model learns: hold_nfe scales gamma so that the mean NFE of the trained
    groups stays, hold_entropy gives the reveal rule a temperature so that the mean entropy of the first step stays.
    auto is hold_nfe with train=model and sampler.rule=entropy_bound, else none."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """AdamW learning rate of the model."""
    threshold_learning_rate: float = Field(default=3e-3, gt=0)
    """AdamW learning rate of the threshold head; too high collapses it to one value."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW beta1."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """AdamW beta2."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear learning-rate warm-up."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens in one forward and backward pass, padding and all rows counted; one completion's rows may be more."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the model's layers for the backward pass, and compute the rest again in it: less memory,
    up to a third more time."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Batches in a row that may be set aside because the loss, a gradient or an importance weight is not finite."""
    max_restarts: int = Field(default=3, ge=0)
    """Deaths of the learner after which it goes on from its newest checkpoint; one more ends the run."""
    diagnostics_every: int = Field(default=20, ge=0)
    """Steps between measurements of KL(exact || surrogate) on at most 32 completions, NFE passes each; 0 is never."""
    autocast: bool = True
    """bfloat16 autocast (weights stay float32) where the device has it."""
    threads: int = Field(default=1, ge=1)
    """torch threads of the learner."""
    ranks: int = Field(default=1, ge=1)
    """Processes that the model is trained by: each holds a shard of it (FSDP2) and scores a share of the groups."""
    cpus: float = Field(default=1, ge=0)
    """CPUs that Ray reserves for each rank of the learner."""
    gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for each rank of the learner."""
    labels: dict[Label, Label] = Field(default_factory=dict)
    """Ray node labels that the node of each rank must have, e.g. {gpu: learner}."""

    @field_validator("cost", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false

    @model_validator(mode="after")
    def _every_rank_has_a_group(self) -> Self:
        if self.ranks > self.groups_per_step:
            raise ValueError(
                f"ranks={self.ranks} exceeds groups_per_step={self.groups_per_step}, and groups are what ranks share; "
                "set ranks to that or less"
            )
        return self

    @model_validator(mode="after")
    def _kl_is_the_models(self) -> Self:
        if self.kl_beta > 0 and self.train == "threshold":
            raise ValueError(f"kl_beta={self.kl_beta} with train=threshold: the model does not move; set kl_beta=0")
        return self

    @model_validator(mode="after")
    def _remedies_are_the_models(self) -> Self:
        if self.drift_remedy.startswith("hold") and self.train != "model":
            raise ValueError(
                f"drift_remedy={self.drift_remedy} with train={self.train}: a threshold that learns is a remedy; set "
                "train=model, or drift_remedy=auto, which is none there (a saved config.yaml says what auto became)"
            )
        return self

    @model_validator(mode="after")
    def _paper_law_is_for_two(self) -> Self:
        used = self.surrogate == "mean_field" and self.train != "threshold"
        if used and self.tau_law == "paper" and self.surrogate_passes > 2:
            raise ValueError(
                f"surrogate_passes={self.surrogate_passes} with tau_law=paper: the paper's law is for m <= 2; "
                "set tau_law=distinct"
            )
        return self


class EvaluationConfig(Section):
    """Held-out evaluation and the accuracy-NFE frontier."""

    prompts: int = Field(default=1024, ge=1, le=1_000_000)
    """Held-out prompts, the same for every setting, so that comparisons are paired."""
    split: Literal["validation", "test"] = "test"
    """Split that the prompts come from."""
    shard_prompts: int = Field(default=256, ge=1)
    """Prompts that one evaluation worker answers at a time; what is finished is kept shard by shard."""
    gammas: Increasing = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Fixed thresholds (nats) of the entropy-bound sweep."""
    confidences: tuple[Annotated[float, Field(le=1)], ...] = (0.5, 0.7, 0.9)
    """Thresholds of the confidence sweep."""
    tokens_per_step: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 8)
    """Fixed numbers of tokens per step of the top_k sweep."""
    nfe_range: tuple[float, float] = (2.0, 16.0)
    """NFE range over which the area under the frontier is taken, on a log2 axis."""
    drift_every: int = Field(default=20, ge=0)
    """Learner steps between measurements of accuracy and NFE at gamma_init on validation prompts; 0 is never."""
    drift_prompts: int = Field(default=128, ge=1)
    """Prompts of that measurement."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.nfe_range
        if not 1 <= low < high:
            raise ValueError(f"nfe_range={[low, high]} must satisfy 1 <= low < high")
        for name, values in (("gammas", self.gammas), ("confidences", self.confidences)):
            if any(b <= a for a, b in pairwise(values)) or any(v < 0 for v in values):
                raise ValueError(f"{name}={list(values)} must be >= 0 and strictly increasing; sort, drop repeats")
        return self


class MetricsConfig(Section):
    """Where metrics go besides `RUN/metrics.jsonl`: the Prometheus endpoint in the controller, and trackers."""

    host: str = "127.0.0.1"
    """Address the endpoint binds; loopback unless you say otherwise."""
    port: int = Field(default=0, ge=-1, le=65535)
    """Port; 0 takes a free one (printed, and written to RUN/metrics_target.json), -1 switches the endpoint off."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that get the rows of metrics.jsonl too, e.g. [tensorboard, wandb]; docs/operations.md."""
    wandb_project: str = Field(default="diffpo", min_length=1, max_length=128, pattern=PROJECT)
    """Project of Weights & Biases that the run is shown in."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(given))


class RunConfig(Section):
    """Where the run lives and how it ends."""

    name: str = Field(default="run", coerce_numbers_to_str=True, pattern=RUN_NAME)
    """Run id: also the Ray namespace and the directory below `root`."""
    root: Where = "runs"
    """Folder or URI (s3://…, gs://…) that holds run directories; inside a submitted Ray job a relative folder is taken
    from the home directory, since Ray deletes the job's own working directory."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of everything drawn in the run (the task's split has its own)."""
    deterministic: bool | None = None
    """Bit-equal repeats (CPU only; fixed padding, batches by group number); null means max_staleness == 0 on a CPU."""
    checkpoint_every: int = Field(default=50, ge=0)
    """Learner steps between checkpoints; 0 writes only the last."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that stay; groups trained since the oldest of them stay too, in RUN/segments."""
    checkpoints: Where | None = None
    """Folder (relative as `root`) or URI (s3://…, gs://…) below which the checkpoints are written; null is
    RUN/checkpoints."""
    record_groups: int = Field(default=1, ge=0)
    """Groups of each learner step whose completions are kept position by position, for `diffpo report` and `view`."""
    capacity_timeout: float = Field(default=1800.0, gt=0)
    """Seconds that a run may wait for nodes, while its learner or all of its rollout actors have none."""
    stall_timeout: float = Field(default=300.0, gt=0)
    """Seconds without any progress after which the run ends with an error; more than one group, one step, or one
    reward of the final evaluation may take."""
    ray_address: str | None = None
    """Ray cluster to join; null joins the one of the surrounding job, else starts a local one."""

    @field_validator("root", "checkpoints")
    @classmethod
    def _a_place(cls, given: str | None) -> str | None:
        """Half of a URI would be a folder of that name."""
        if given is not None and not re.fullmatch(r"[\w+-]+:///?[^/?].*|(?![\w+-]+:/).+", given, re.DOTALL):
            raise ValueError(f"{given!r} is neither a folder nor a URI such as s3://bucket/runs; give one of them")
        return given

    @field_validator("checkpoints")
    @classmethod
    def _at_one_place(cls, given: str | None) -> str | None:
        """A folder as an absolute path: whoever resumes the run, or works for it, may stand elsewhere."""
        return given if given is None or is_uri(given) else str(_folder(given).absolute())


def _folder(given: str) -> Path:
    """Relative to the home directory in a Ray job, whose own working directory Ray deletes."""
    return Path.home() / given if IN_RAY_JOB in os.environ else Path(given)


class Config(Section):
    """The whole configuration of a run."""

    task: TaskConfig
    """What is asked and how answers are scored."""
    model: ModelConfig = ModelConfig()
    """The model."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """Supervised warm start."""
    sampler: SamplerConfig = SamplerConfig()
    """Denoising."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollout actors."""
    replay: ReplayConfig = ReplayConfig()
    """Replay buffer."""
    learner: LearnerConfig = LearnerConfig()
    """Learner."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation."""
    metrics: MetricsConfig = MetricsConfig()
    """Metrics endpoint."""
    run: RunConfig = RunConfig()
    """Run directory, seed, endings."""

    @field_validator("learner")
    @classmethod
    def _choose_drift_remedy(cls, learner: LearnerConfig, info: ValidationInfo) -> LearnerConfig:
        sampler = info.data.get("sampler")  # absent when it is itself refused
        held = sampler is not None and sampler.rule == "entropy_bound" and learner.train == "model"
        if held and learner.drift_remedy == "auto":
            return learner.model_copy(update={"drift_remedy": "hold_nfe"})
        return learner

    @property
    def deterministic(self) -> bool:
        """Whether repeats are bit-equal (`run.deterministic`, by default at `max_staleness` 0 on a CPU)."""
        chosen = self.run.deterministic
        return self.replay.max_staleness == 0 and self.model.device == "cpu" if chosen is None else chosen

    @property
    def run_directory(self) -> str:
        """Path or URI of this run's directory."""
        root = self.run.root
        return below(root if is_uri(root) else str(_folder(root)), self.run.name)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        rule, train = self.sampler.rule, self.learner.train
        if self.run.deterministic and self.model.device != "cpu":
            raise ValueError(
                f"run.deterministic with model.device={self.model.device}: only a CPU repeats bit for bit; leave "
                "run.deterministic out"
            )
        if "entropy_bound" not in rule and train != "model":
            raise ValueError(
                f"learner.train={train} needs sampler.rule=entropy_bound, got {rule}; confidence and top_k have no "
                "learned threshold: set learner.train=model"
            )
        if self.learner.drift_remedy.startswith("hold") and rule != "entropy_bound":
            raise ValueError(
                f"learner.drift_remedy={self.learner.drift_remedy} needs sampler.rule=entropy_bound, got {rule}; set "
                "learner.drift_remedy=auto, which is none there (a saved config.yaml says what auto became)"
            )
        two_mf = self.learner.surrogate == "mean_field" and self.learner.surrogate_passes == 2
        if rule == "sampled_entropy_bound" and not (
            two_mf and self.learner.tau_law == "paper" and train != "threshold"
        ):
            raise ValueError(
                "sampler.rule=sampled_entropy_bound scores the set that was revealed after a uniform tau: it needs "
                "learner.surrogate=mean_field, surrogate_passes=2, tau_law=paper and a model that learns"
            )
        if rule == "sampled_entropy_bound" and self.learner.prompt_masking > 0:
            raise ValueError(
                f"learner.prompt_masking={self.learner.prompt_masking} with sampler.rule=sampled_entropy_bound: sets "
                "are scored on the latent that they were drawn on, prompt included; set learner.prompt_masking=0"
            )
        if self.sampler.threshold.standardise and self.learner.groups_per_step < 2:
            raise ValueError(
                f"sampler.threshold.standardise with learner.groups_per_step={self.learner.groups_per_step}: a spread "
                "over prompts needs 2 of them in the first batch; raise learner.groups_per_step"
            )
        if self.rollout.compile and self.sampler.cache != "none":
            raise ValueError(
                f"rollout.compile with sampler.cache={self.sampler.cache}: cached passes have no fixed shapes; set "
                "rollout.compile=false or sampler.cache=none"
            )
        base = self.model.path if self.model.path is not None else self.run.root
        if self.model.lora is not None and is_uri(base):
            key = "model.path" if self.model.path is not None else "run.root"
            raise ValueError(
                f"model.lora with {key}={base}: adapters name the folder of their base, which all nodes must have; "
                "give it in model.path"
            )
        if self.rollout.slots < self.learner.group_size:
            raise ValueError(
                f"rollout.slots={self.rollout.slots} is below learner.group_size={self.learner.group_size}; "
                "a group shares its first step, so give at least group_size slots"
            )
        longest = self.sampler.max_prompt_tokens + self.sampler.max_completion_tokens
        if self.model.path is None and longest > self.model.max_positions:
            raise ValueError(
                f"sampler.max_prompt_tokens + sampler.max_completion_tokens = {longest} exceeds "
                f"model.max_positions={self.model.max_positions}; raise model.max_positions or shorten them"
            )
        return self
