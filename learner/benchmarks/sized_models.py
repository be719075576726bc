"""Our learner step and the loop that others write, on models of the size that papers start from.

Bodies of 25 and 100 million parameters (embeddings not counted), random weights, groups of 8 completions of 64 tokens
after prompts of 64, two latents each (2-MF). Their loop is `plain_loop`, as d1 and TRL write it: `model(...).logits` of
all positions, `log_softmax`, `gather`. Both sides have the same batch, budget, loss and gradient.

- tokens: completion tokens trained on per second, a vocabulary of 32,000 *(ours)*.
- memory: the largest number of bytes that tensors held at once in a step, beyond weights and optimizer state, at
  LLaDA's vocabulary of 126,464: gradients, what autograd keeps, and what is computed again, on both sides alike.
  Stricter than what autograd keeps alone, of which gradients, the same on both sides, are no part.
"""

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

from common.config import LearnerConfig, ThresholdConfig
from common.errors import RunError
from common.keyed_random import derive
from common.policy import Policy
from common.threshold import build_threshold_head
from common.tokenizer import character_tokenizer
from learner.batch import Batch
from learner.benchmarks.engine import ratio, timed
from learner.benchmarks.plain_loop import PlainLoop
from learner.learner import Learner

BODIES = {
    "25m": {"hidden_size": 512, "intermediate_size": 1365, "num_hidden_layers": 8, "num_attention_heads": 8},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 20, "num_attention_heads": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""LLaDA-8B's is the last."""
TIMED_VOCABULARY, LLADA_VOCABULARY = 32_000, 126_464
PROMPT = LENGTH = 64
GROUPS, GROUP = 1, 8
TOKENS = 2048  # of a micro-batch: theirs are one, 16 rows of 128
LOSS_TOLERANCE = 0.02
STEPS = 16  # NFE of every completion
CPU = torch.device("cpu")


def sized_policy(
    name: str,
    vocabulary: int,
    *,
    positions: int = PROMPT + LENGTH,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """A random bidirectional Llama, made on the device; ids 0 to 9 are those of a character tokenizer."""
    tokenizer = character_tokenizer("0123")
    special: dict[str, Any] = {
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "is_causal": False,
    }
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(LlamaConfig(**BODIES[name], **special), dtype=dtype)
        head = build_threshold_head(model.config.hidden_size, ThresholdConfig())
    return Policy(model, head, tokenizer).to(device).eval()


def drawn_batch(
    vocabulary: int, *, groups: int = GROUPS, prompt: int = PROMPT, length: int = LENGTH, device: torch.device = CPU
) -> Batch:
    """Random prompts and completions; in each of `STEPS` steps as many tokens are revealed."""
    generator = torch.Generator().manual_seed(0)
    count = groups * GROUP
    shape = count, length
    order = torch.rand(shape, generator=generator).argsort(-1)
    batch = Batch(
        prompts=torch.randint(10, vocabulary, (groups, prompt), generator=generator),
        attended=torch.ones(groups, prompt, dtype=torch.bool),
        row=torch.arange(count),
        group=torch.arange(groups).repeat_interleave(GROUP),
        completion_ids=torch.randint(10, vocabulary, shape, generator=generator),
        reveal_step=order * STEPS // length + 1,
        scored=torch.ones(shape, dtype=torch.bool),
        behaviour_logprob=torch.full(shape, -10.0),
        token_version=torch.zeros(shape, dtype=torch.int64),
        reveal_logprob=torch.zeros(shape),
        entropy=torch.ones(shape),
        first_entropy=torch.ones(count),
        gamma=torch.full((count,), 0.3),
        gamma_logprob=torch.full((count,), -2.0),
        nfe=torch.full((count,), STEPS),
        block_length=torch.full((count,), length),
        seed=torch.tensor([derive(0, number) for number in range(count)]),
        temperature=torch.ones(count),
        reward=torch.rand(count, generator=generator),
        draws_sets=False,
    )
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def tokens_vs_plain(name: str, config: LearnerConfig, *, repeats: int, device: torch.device = CPU) -> dict[str, float]:
    """Our tokens per second over theirs; the steps take turns.

    Raises:
        RunError: when the two losses differ by more than autocast explains.
    """
    policy = sized_policy(name, TIMED_VOCABULARY, device=device)
    batch = drawn_batch(TIMED_VOCABULARY, device=device)
    learner, plain = Learner(copy.deepcopy(policy), config), PlainLoop(copy.deepcopy(policy), config, passes=2)
    ours, theirs = learner.step(batch, version=0)["learner_loss"], plain.step(batch)
    if abs(ours - theirs) > LOSS_TOLERANCE:
        raise RunError(f"loss {ours} of our step and {theirs} of the plain loop, which should be one")

    def once() -> float:
        ours = timed(lambda: learner.step(batch, version=0))
        return timed(lambda: plain.step(batch)) / ours

    return ratio(f"tokens_vs_plain_{name}", repeats, once)


def memory_vs_plain(name: str, config: LearnerConfig, *, device: torch.device = CPU) -> dict[str, float]:
    """Our peak of bytes over theirs at LLaDA's vocabulary."""
    policy = sized_policy(name, LLADA_VOCABULARY, device=device)
    batch = drawn_batch(LLADA_VOCABULARY, device=device)
    learner = Learner(policy, config)
    ours = peak_before_the_optimizer(learner.optimizer, lambda: learner.step(batch, version=0))
    learner.optimizer.state.clear()
    plain = PlainLoop(policy, config, passes=2)
    return {
        f"memory_vs_plain_126k_{name}": ours / peak_before_the_optimizer(plain.optimizer, lambda: plain.step(batch))
    }


def peak_before_the_optimizer(optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> int:
    """Peak bytes of a step from its beginning, without gradients, to where the optimizer begins."""
    optimizer.zero_grad(set_to_none=True)
    live, peaks = LiveTensors(), []
    hook = optimizer.register_step_pre_hook(lambda *_: peaks.append(live.peak))
    with live:
        step()
    hook.remove()
    optimizer.zero_grad(set_to_none=True)
    return peaks[0]


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as anything holds them, on the way back too.

    `peak` is the most that was held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: set[int] = set()
        self._live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return output

    def _count(self, storage: Any, given: set[int]) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._held or address in given:
            return
        self._held.add(address)
        self._live += size
        self.peak = max(self.peak, self._live)
        finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._held.discard(address)
        self._live -= size
