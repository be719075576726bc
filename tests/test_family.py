"""Families: each is recognised, loaded without its code, denoised and trained as the textbook says."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_fixtures import make_requests
from family_fixtures import (
    LLADA,
    SHIFTED,
    WRITERS,
    all_logits,
    llada_logits,
    llada_weights,
    save_shards,
    write_a2d,
    write_dream,
    write_llada,
)
from learner_fixtures import generate_batch, learner_config, loop_log_probs, parameters
from test_engine_cache import assert_textbook
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from actors.engine import DenoisingEngine
from common.adapter import frozen_parameters, learned_parameters, learned_state
from common.config import LoraConfig, ModelConfig, ThresholdConfig
from common.config_file import load_config
from common.conversion import convert
from common.errors import UserError
from common.family import FAMILIES, recognise
from common.policy import Policy
from common.policy_loading import load_policy
from common.shards import Shards
from learner.chat import chat_ids
from learner.demonstrations import Demonstration
from learner.learner import Learner
from learner.packing import micro_batches
from learner.policy_trainer import PolicyTrainer
from learner.preflight import preflight
from learner.surrogate import draw_taus, mean_field, surrogate_log_probs
from learner.warm_start import masked_diffusion_loss

IDS = torch.tensor([[9, 7, 11, 13, 8, 20]])


def opened(folder: Path, **keys: object) -> Policy:
    return load_policy(folder, ModelConfig(**keys), ThresholdConfig(gamma_init=1.5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def policies(folders: dict[str, Path]) -> dict[str, Policy]:
    """In float64, shared: never write to them."""
    return {name: opened(folder).double() for name, folder in folders.items()}


@pytest.fixture(params=WRITERS)
def policy(request: pytest.FixtureRequest, policies: dict[str, Policy]) -> Policy:
    return policies[request.param]


@pytest.fixture(params=sorted(SHIFTED))
def shifted(request: pytest.FixtureRequest, policies: dict[str, Policy]) -> Policy:
    return policies[request.param]


def plain_logits(policy: Policy, ids: Tensor) -> Tensor:
    """What transformers computes, each at the column that computes it."""
    with torch.no_grad():
        return policy.model(input_ids=ids).logits


# -- the models --------------------------------------------------------------------------------------------------------


def test_llada_computes_what_its_paper_writes(folders: dict[str, Path]) -> None:
    """Renaming is right: the parameters under their own names, in a forward of our own, give the same logits."""
    expected = llada_logits(llada_weights(), IDS[0].tolist())
    assert expected.std() > 0.3
    torch.testing.assert_close(all_logits(opened(folders["llada"]), IDS)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_later_token_changes_every_earlier_position(policy: Policy) -> None:
    changed = IDS.clone()
    changed[0, -1] = 30
    assert ((all_logits(policy, IDS) - all_logits(policy, changed)).abs().amax(-1) > 1e-9).all()


def test_left_padding_changes_nothing_whatever_it_holds(policy: Policy) -> None:
    alone = all_logits(policy, IDS)
    for width, filler in ((1, policy.vocabulary.pad_id), (5, 9)):
        padded = torch.cat([torch.full((1, width), filler), IDS], 1)
        attended = torch.arange(padded.shape[1])[None] >= width
        torch.testing.assert_close(all_logits(policy, padded, attended)[:, width:], alone, rtol=0, atol=1e-11)


def test_a_position_is_predicted_by_its_column_or_the_one_before(policies: dict[str, Policy]) -> None:
    for name, policy in policies.items():
        mine, plain = all_logits(policy, IDS), plain_logits(policy, IDS)
        assert policy.shift == (name in SHIFTED)
        expected = torch.cat([plain[:, :1], plain[:, :-1]], 1) if policy.shift else plain
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


def test_prompt_features_of_a_shifted_model_do_not_see_padding(shifted: Policy) -> None:
    found = []
    for width in (0, 3):
        ids = torch.cat([torch.full((1, width), 21), IDS], 1)
        attended = torch.arange(ids.shape[1])[None] >= width
        found.append(shifted.prompt_features(shifted.hidden(ids, attended), attended))
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


# -- denoising ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "block"), [("entropy_bound", 8), ("confidence", 16), ("top_k", 4)])
def test_the_engine_is_the_textbook_sampler(policy: Policy, rule: str, block: int) -> None:
    requests = make_requests(5, rule)
    engine = DenoisingEngine(policy, slots=3, rule=rule, max_prompt_tokens=12, completion_tokens=16, block_length=block)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert_textbook(completion, policy, request, rule=rule, block=block)


@pytest.mark.parametrize("fixed_padding", [True, False])
@pytest.mark.parametrize("block", [16, 8, 4])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cached_pass_has_the_column_that_predicts_a_block(
    shifted: Policy, cache: str, block: int, fixed_padding: bool
) -> None:
    requests = make_requests(6)
    engine = DenoisingEngine(
        shifted,
        slots=3,
        rule="entropy_bound",
        max_prompt_tokens=12,
        completion_tokens=16,
        block_length=block,
        cache=cache,
        drift_every=2,
        fixed_padding=fixed_padding,
    )
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert_textbook(completion, shifted, request, rule="entropy_bound", block=block, cache=cache)
    assert engine.cost.probed_positions > 0


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_surrogate_is_the_loop_over_tokens(policy: Policy) -> None:
    batch = generate_batch(policy, prompts=((9, 8, 7), (10,), (12, 11, 10, 9)), sizes=(2, 2, 2))
    taus = draw_taus(batch.seed, batch.nfe, passes=3, law="distinct", update=0)
    with torch.no_grad():
        mine = surrogate_log_probs(policy, batch, mean_field(batch, taus)).logprob
        expected = loop_log_probs(policy, batch, taus.tolist())
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


def test_the_exact_surrogate_is_what_behaviour_recorded(policy: Policy) -> None:
    batch = generate_batch(policy, prompts=((9, 8, 7), (10,), (12, 11, 10, 9)), sizes=(2, 2, 2))
    taus = draw_taus(batch.seed, batch.nfe, passes=99, law="distinct", update=0)
    with torch.no_grad():
        exact = surrogate_log_probs(policy, batch, mean_field(batch, taus)).logprob
    np.testing.assert_allclose(exact[batch.scored], batch.behaviour_logprob[batch.scored], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packs", [False, True])
def test_the_warm_start_predicts_positions_and_not_columns(policy: Policy, packs: bool) -> None:
    """All masked: the loss is the mean cross-entropy of each completion, MASK left out, packed or not."""
    pairs = [Demonstration([9, 8, 7], [12, 13, 14, 15]), Demonstration([11, 10], [8, 12])]
    mask, expected = policy.vocabulary.mask_id, 0.0
    for prompt, completion in pairs:
        first, count = len(prompt) - policy.shift, len(completion)
        logits = plain_logits(policy, torch.tensor([prompt + [mask] * count]))[0][first : first + count]
        logits[:, mask] = -torch.inf
        expected += float(cross_entropy(logits, torch.tensor(completion))) / len(pairs)
    width = 11 if packs and policy.takes_segments else None
    (rows,) = micro_batches(
        pairs, torch.ones(2), torch.zeros(6), pad_id=policy.vocabulary.pad_id, width=width, budget=99
    )
    assert rows.several == (width is not None)
    with torch.no_grad():
        assert float(masked_diffusion_loss(policy, rows)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_three_steps_of_an_adapter_move_nothing_else_and_survive_saving(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    policy = opened(folders[name], lora=LoraConfig(rank=2))
    base = opened(folders[name])
    assert torch.equal(all_logits(policy, IDS), all_logits(base, IDS))
    frozen = [parameter.clone() for _, parameter in frozen_parameters(policy.model)]
    learner = Learner(policy, learner_config(learning_rate=1e-2))
    for step in range(3):
        batch = generate_batch(policy, prompts=((9, 8, 7), (10,), (12, 11, 10, 9)), sizes=(4, 4, 4))
        assert np.isfinite(learner.step(batch, version=step)["learner_loss"])
    assert all(map(torch.equal, frozen, (parameter for _, parameter in frozen_parameters(policy.model))))
    trained = all_logits(policy, IDS)
    assert not torch.allclose(trained, all_logits(base, IDS), atol=1e-3)
    policy.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    assert torch.equal(all_logits(opened(tmp_path / "saved", lora=LoraConfig(rank=2)), IDS), trained)
    torch.testing.assert_close(all_logits(opened(tmp_path / "saved"), IDS), trained, rtol=0, atol=1e-4)  # merged


@pytest.mark.parametrize("name", WRITERS)
def test_three_steps_of_training_survive_saving(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    policy = opened(folders[name])
    learner = Learner(policy, learner_config())
    before = parameters(policy)
    for step in range(3):
        batch = generate_batch(policy, prompts=((9, 8, 7), (10,), (12, 11, 10, 9)), sizes=(4, 4, 4))
        metrics = learner.step(batch, version=step)
        assert np.isfinite(metrics["learner_loss"])
    assert (parameters(policy.model) != parameters(opened(folders[name]).model)).mean() > 0.5
    assert not np.array_equal(before, parameters(policy))
    policy.save(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert torch.equal(all_logits(again, IDS), all_logits(policy, IDS))
    assert (again.shift, again.vocabulary) == (policy.shift, policy.vocabulary)
    assert policy.tokenizer.mask_token is not None
    kind = AutoModelForMaskedLM if name == "modernbert" else AutoModelForCausalLM
    plain = kind.from_pretrained(tmp_path / "saved", local_files_only=True)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, plain_logits(policy, IDS))


@pytest.mark.parametrize("name", WRITERS)
def test_a_cache_that_a_model_cannot_serve_is_refused_before_the_run(name: str, folders: dict[str, Path]) -> None:
    keys = ["task.name=sudoku", f"model.path={folders[name]}", "sampler.max_prompt_tokens=64"]
    preflight(load_config(None, keys))
    cached = load_config(None, [*keys, "sampler.cache=prefix"])
    if name == "modernbert":
        with pytest.raises(UserError, match=r"^ModernBertForMaskedLM hands out no keys and values; set sampler\.cache"):
            preflight(cached)
    else:
        preflight(cached)


@pytest.mark.parametrize("adapter", [[], ["model.lora.rank=2"]], ids=["all weights", "adapter"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_run_goes_on_from_its_checkpoint(
    name: str, adapter: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Also where input and output share their weights, which are learned or frozen under two names."""
    config = load_config(None, ["task.name=sudoku", f"model.path={folders[name]}", "learner.threads=1", *adapter])
    first, other = (PolicyTrainer(config, tmp_path / "warm_start") for _ in range(2))
    first.warm_start(lambda kind, values: None)
    with torch.no_grad():
        for _, parameter in learned_parameters(first._policy):
            parameter.add_(0.1)
    first.saved()(tmp_path / "checkpoint")
    other.warm_start(lambda kind, values: None)
    assert not np.array_equal(other.weights(), first.weights())
    other.restore(tmp_path / "checkpoint")
    assert np.array_equal(other.weights(), first.weights())
    if adapter:
        assert all(".lora_" in name for name in learned_state(first._policy.model))


# -- special tokens and prompts ----------------------------------------------------------------------------------------


def test_special_tokens_come_from_tokenizer_configuration_and_family(policies: dict[str, Policy]) -> None:
    found = {name: policy.vocabulary for name, policy in policies.items()}
    assert (found["llada"].mask_id, found["llada"].eos_id, found["llada"].stop_ids) == (5, 1, (1, 4))
    assert (found["dream"].mask_id, found["dream"].pad_id, found["dream"].stop_ids) == (260, 256, (256, 258))
    assert (found["modernbert"].mask_id, found["modernbert"].pad_id, found["modernbert"].stop_ids) == (4, 3, (2,))
    assert (found["a2d"].mask_id, found["a2d"].eos_id, found["a2d"].stop_ids) == (3, 2, (2,))
    for policy in policies.values():
        assert policy.tokenizer.mask_token_id == policy.vocabulary.mask_id
        assert policy.model.config.mask_token_id == policy.vocabulary.mask_id


def test_llada_knows_its_mask_by_name(tmp_path: Path) -> None:
    folder = write_llada(tmp_path / "model", mask_token_id=None)
    assert opened(folder).vocabulary.mask_id == 5


def test_the_user_chooses_another_mask(folders: dict[str, Path]) -> None:
    assert opened(folders["llada"], mask_token="~").vocabulary.mask_id == 6 + ord("~") - 32
    with pytest.raises(UserError, match=r"model\.mask_token='<none>' is no single token"):
        opened(folders["llada"], mask_token="<none>")


@pytest.mark.parametrize("name", ["llada", "dream", "a2d"])
def test_prompts_go_through_the_chat_template(name: str, folders: dict[str, Path]) -> None:
    policy, plain = opened(folders[name]), opened(folders[name], chat_template="off")
    ids = policy.encode_prompt("2+3?")
    text = policy.tokenizer.decode(ids)
    assert "assistant" in text
    assert "2+3?" in text
    assert policy.vocabulary.mask_id not in ids
    start = policy.encode({"llada": "<|startoftext|>"}.get(name, "<|im_start|>"))
    assert len(start) == 1
    assert ids[:1] == start
    assert plain.encode_prompt("2+3?") == policy.encode("2+3?")
    assert policy.tokenizer.decode(policy.encode("2+3?")) == "2+3?"


@pytest.mark.parametrize(
    ("name", "begin", "learned"),
    [
        ("llada", "<|start_header_id|>assistant<|end_header_id|>\n\n", "yo<|eot_id|>"),
        ("dream", "<|im_start|>assistant\n", "yo<|im_end|>\n"),
        ("a2d", "<|im_start|>assistant\n", "yo<|im_end|>\n"),
    ],
)
def test_an_answer_ends_with_its_turn(name: str, begin: str, learned: str, policies: dict[str, Policy]) -> None:
    """LLaDA's template begins another answer after the last message, whatever it is asked."""
    tokenizer = policies[name].tokenizer
    said = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"))]
    for messages in (said, [*said, *said]):
        prompt, answer = chat_ids(tokenizer, messages, "row")
        text = str(tokenizer.decode(prompt))
        assert text.endswith(begin)
        assert text.count(begin) == len(messages) / 2
        assert tokenizer.decode(answer) == learned


def test_without_a_template_a_prompt_is_its_text(policies: dict[str, Policy]) -> None:
    policy = policies["modernbert"]
    assert policy.encode_prompt("2+3?") == policy.encode("2+3?")
    assert len(policy.encode("2+3?")) == 4


def test_a_template_that_fails_is_refused_by_its_prompt(folders: dict[str, Path]) -> None:
    policy = opened(folders["llada"])
    policy.tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(UserError, match=r"prompt '2\+3'.*no users here.*model\.chat_template=off"):
        policy.encode_prompt("2+3")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            ["'gpt2'", "llada", "Dream", "qwen3", "MaskedLM"],
        ),
        ({"model_type": "llada2_moe"}, ["block-causal", "docs/models.md"]),
        ({"model_type": "llada_moe"}, ["mixture of experts", "docs/models.md"]),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, ["quantised"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["no model_type"]),
        ([], ["no model_type"]),
    ],
    ids=["unknown", "llada2", "moe", "quantised", "no type", "no mapping"],
)
def test_what_is_not_known_is_refused_with_what_is(given: object, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        recognise(given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi": True}, ["alibi=True", "Llama does not compute"]),
        ({"block_type": "sequential"}, ["block_type='sequential'"]),
        ({"n_heads": None}, ["a LLaDA without n_heads"]),
        ({"prediction_shift": 2}, ["prediction_shift=2"]),
        ({"mask_token_id": 126336}, ["mask_token_id=126336 of config.json is no token of the tokenizer"]),
        ({"embedding_size": 64, "vocab_size": 64}, ["ids up to 101", "vocabulary of 64"]),
        ({"d_model": "wide"}, ["cannot be loaded"]),
        ({"d_model": 32}, ["cannot be loaded"]),
        ({"n_layers": 3}, ["parameters are not in its weights", "model.layers.2"]),
        ({"n_layers": 1}, ["parameters are too many in its weights", "model.layers.1"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_llada_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    folder = write_llada(tmp_path / "model", **changes)
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_a_head_that_is_not_the_matrix_it_is_tied_to_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """It would be one model for those who read it and another for those who get its weights by broadcast."""
    folder = write_a2d(tmp_path / "model")
    with Shards(folder) as shards:
        weights = {name: shards.tensor(name).clone() for name in shards.parameters}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_shards(folder, weights, 1)
    assert sum(one.numel() for one in opened(folder).parameters()) == sum(
        one.numel() for one in opened(folders["a2d"]).parameters()
    )
    weights["lm_head.weight"][0, 0] += 1
    save_shards(folder, weights, 1)
    told = r"lm_head.weight is not model.embed_tokens.weight, .*\"tie_word_embeddings\""
    with pytest.raises(UserError, match=told):
        opened(folder)
    with pytest.raises(UserError, match=told):
        convert(folder, tmp_path / "converted")


def test_a_block_causal_dream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Dream with block_size=32: its blocks attend to earlier blocks alone"):
        opened(write_dream(tmp_path / "model", block_size=32))


def test_tokenizer_and_model_must_agree_on_mask(tmp_path: Path) -> None:
    folder = write_dream(tmp_path / "model", mask_token_id=259)
    with pytest.raises(UserError, match=r"MASK is id 260 \(<\|mask\|>\) in the tokenizer and 259 in config\.json"):
        opened(folder)
    assert opened(folder, mask_token="<|mask|>").vocabulary.mask_id == 260


def test_an_encoder_that_numbers_positions_its_own_way_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
    RobertaForMaskedLM(RobertaConfig(vocab_size=104, initializer_range=0.5, **sizes, **special)).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(folders["modernbert"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="RobertaForMaskedLM numbers positions or computes logits in a way"):
        opened(tmp_path)


def test_renaming_leaves_no_name_of_llada_behind() -> None:
    llada = next(family for family in FAMILIES if family.name == "LLaDA")
    names = [llada.renamed(name) for name in llada_weights()]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "transformer" in name]
    assert llada.renamed("lm_head.weight") == "lm_head.weight"
    given = copy.deepcopy(LLADA)
    assert json.dumps(llada.described(given)) is not None
    assert given == LLADA
