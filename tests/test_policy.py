"""Policy: bidirectional, indifferent to padding, a standard Hugging Face folder; and what it refuses. Weights, too."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALPHABET
from family_fixtures import all_logits
from transformers import AutoModelForCausalLM

from common.config import ModelConfig, ThresholdConfig
from common.config_file import load_config
from common.errors import RunError, UserError
from common.policy import Policy, read_vocabulary
from common.policy_loading import check_threshold_of_folder, load_policy
from common.threshold import build_threshold_head
from common.tokenizer import VOCABULARY_SIZE, character_tokenizer
from common.weight_store import digest
from common.weights import load_flat, to_flat

IDS = torch.tensor([[5, 9, 4, 11, 2, 2, 2, 2]])
LLAMA = ModelConfig()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_later_token_changes_an_earlier_position(policy: Policy, attention: str) -> None:
    mine = copy.deepcopy(policy)
    mine.model.set_attn_implementation(attention)
    changed = IDS.clone()
    changed[0, -1] = 7
    difference = (all_logits(mine, IDS) - all_logits(mine, changed)).abs().amax(-1)[0]
    assert (difference > 1e-6).all()


def test_left_padding_changes_nothing_whatever_it_holds(policy: Policy) -> None:
    alone = all_logits(policy, IDS)
    for width in (1, 5):
        for filler in (policy.vocabulary.pad_id, 9):
            padded = torch.cat([torch.full((1, width), filler), IDS], 1)
            attended = torch.arange(padded.shape[1])[None] >= width
            torch.testing.assert_close(all_logits(policy, padded, attended)[:, width:], alone, rtol=0, atol=1e-12)


def test_prompt_features_are_the_mean_over_the_prompt_and_detached(policy: Policy) -> None:
    hidden = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    prompt = torch.tensor([[False, True, True, False, False], [False, False, True, False, False]])
    pooled = policy.prompt_features(hidden, prompt)
    torch.testing.assert_close(pooled, torch.stack([hidden[0, 1:3].mean(0), hidden[1, 2]]).detach())
    assert not pooled.requires_grad
    assert policy.prompt_features(hidden.bfloat16(), prompt).dtype == torch.float32


@pytest.mark.parametrize("head", ["categorical", "log_normal"])
def test_a_saved_policy_comes_back_whole(make_policy: Callable[..., Policy], head: str, tmp_path: Path) -> None:
    saved = make_policy(head=head, double=False)
    saved.save(tmp_path)
    # the head beside the model wins over the run's own threshold section
    loaded = load_policy(tmp_path, LLAMA, ThresholdConfig(gamma_grid=(0.1, 1.0), prompt_blind=True))
    assert torch.equal(all_logits(saved, IDS), all_logits(loaded, IDS))
    assert loaded.head.config == saved.head.config
    features = torch.randn(3, 16)
    assert torch.equal(saved.head.mean(features), loaded.head.mean(features))
    assert np.array_equal(to_flat(saved), to_flat(loaded))
    assert loaded.vocabulary == saved.vocabulary
    assert loaded.max_positions == 64
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, all_logits(saved, IDS))


def test_a_folder_without_a_head_gets_a_fresh_one(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    make_policy(double=False).save(tmp_path)
    for name in ("threshold.json", "threshold.safetensors"):
        (tmp_path / name).unlink()
    wanted = ThresholdConfig(head="log_normal", gamma_init=0.7)
    loaded = load_policy(tmp_path, LLAMA, wanted)
    assert loaded.head.config == wanted
    assert loaded.head.mean(torch.randn(2, 16)).tolist() == pytest.approx([0.7, 0.7])


def test_a_run_starts_with_its_own_threshold_unless_the_saved_one_learned(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    saved = make_policy(double=False)
    saved.head = build_threshold_head(16, saved.head.config)  # as it was before it learned anything
    saved.save(tmp_path)
    wanted = saved.head.config.model_copy(update={"head": "log_normal", "gamma_init": 0.7})
    started = load_policy(tmp_path, LLAMA, wanted, trains=True)
    assert started.head.config == wanted
    assert started.head.mean(torch.randn(2, 16)).tolist() == pytest.approx([0.7, 0.7])
    with torch.no_grad():
        saved.head.linear.bias.add_(torch.arange(10.0))
    saved.save(tmp_path)
    onwards = load_policy(tmp_path, LLAMA, saved.head.config, trains=True)
    assert torch.equal(onwards.head.linear.bias, saved.head.linear.bias)
    given = saved.head.config.gamma_init
    told = (
        rf"learned with head=categorical, gamma_init={given}, not sampler.threshold.head=log_normal, .*_init=0\.7; set"
    )
    with pytest.raises(UserError, match=told):
        load_policy(tmp_path, LLAMA, wanted, trains=True)
    config = load_config(None, ["task.name=sudoku", f"model.path={tmp_path}", "sampler.threshold.gamma_init=0.7"])
    with pytest.raises(UserError, match="learned with"):
        check_threshold_of_folder(config)


def refuse(tmp_path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_policy(tmp_path, LLAMA, ThresholdConfig())
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_token": None}, ["no MASK token", "set tokenizer.mask_token"]),
        ({"eos_token": None}, ["no EOS token", "set tokenizer.eos_token"]),
        ({"mask_token": "<pad>"}, ["MASK and PAD are both id 0", "different tokens"]),
        ({"mask_token": "<eos>"}, ["MASK and EOS are both id 1", "different tokens"]),
        ({"mask_token": "<new>"}, ["MASK id 32", "vocabulary of 32", "matching tokenizer"]),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    make_policy: Callable[..., Policy], tmp_path: Path, changes: dict[str, str | None], words: list[str]
) -> None:
    make_policy(double=False).save(tmp_path)
    tokenizer = character_tokenizer(ALPHABET)
    for name, token in changes.items():
        if token is not None and token not in tokenizer.get_vocab():
            tokenizer.add_tokens([token], special_tokens=True)
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"eos_token_id": None}))  # it would stand in
    refuse(tmp_path, *words)


def test_stop_ids_are_eos_and_what_the_model_declares(policy: Policy) -> None:
    config = copy.deepcopy(policy.model.config)
    for declared, stops in ((None, (1,)), (1, (1,)), ([1, 6], (1, 6)), ([6], (1, 6))):
        config.eos_token_id = declared
        assert read_vocabulary(policy.tokenizer, config).stop_ids == stops


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", str(tmp_path / "nowhere"), "config.json", "Hugging Face layout")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("tokenizer.json", b"{"),
        ("threshold.json", b"{}x"),
        ("threshold.json", b"\xff\xfe"),
        ("model.safetensors", b"garbage"),
        ("threshold.safetensors", b"garbage"),
    ],
    ids=["config", "tokenizer", "threshold", "threshold bytes", "weights", "threshold weights"],
)
def test_a_damaged_file_is_refused_in_one_line(
    make_policy: Callable[..., Policy], tmp_path: Path, file: str, content: bytes
) -> None:
    make_policy(double=False).save(tmp_path)
    (tmp_path / file).write_bytes(content)
    refuse(tmp_path, str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new"),
    [('"num_hidden_layers": 2', '"num_hidden_layers": 3'), ('"intermediate_size": 32', '"intermediate_size": 48')],
    ids=["a layer is missing", "another shape"],
)
def test_weights_that_do_not_cover_the_model_are_refused(
    make_policy: Callable[..., Policy], tmp_path: Path, old: str, new: str
) -> None:
    """What a checkpoint lacks must not be filled with random numbers."""
    make_policy(double=False).save(tmp_path)
    described = (tmp_path / "config.json").read_text()
    assert old in described
    (tmp_path / "config.json").write_text(described.replace(old, new))
    refuse(tmp_path, str(tmp_path))


def test_characters_survive_encoding(policy: Policy) -> None:
    assert len(policy.tokenizer) == VOCABULARY_SIZE
    for text in ("3*(4+1) = 15", " 0  0 ", "", ALPHABET):
        ids = policy.encode(text)
        assert len(ids) == len(text)
        assert policy.decode(ids) == text
    assert policy.encode("1x\n") == [*policy.encode("1"), 3, 3]  # what is outside the alphabet is <unk>


def test_decoding_ends_at_the_first_stop_token(policy: Policy) -> None:
    ids = policy.encode("12")
    assert policy.decode([*ids, 1, *ids, 1]) == "12"
    assert policy.decode([1, *ids]) == ""


def test_flat_weights_round_trip(make_policy: Callable[..., Policy]) -> None:
    source, target = make_policy(seed=1, double=False), make_policy(seed=2, double=False)
    flat = to_flat(source)
    flat.setflags(write=False)  # as Ray hands it out
    assert flat.dtype == np.float32
    assert not np.array_equal(flat, to_flat(target))
    load_flat(target, flat)
    assert np.array_equal(to_flat(target), flat)
    for mine, theirs in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(all_logits(source, IDS), all_logits(target, IDS))


@pytest.mark.parametrize("change", [-1, 1])
def test_flat_weights_of_another_size_are_refused(make_policy: Callable[..., Policy], change: int) -> None:
    target = make_policy(double=False)
    own = to_flat(target)
    with pytest.raises(RunError, match=re.escape(f"{own.size + change} numbers do not fit a policy of {own.size}")):
        load_flat(target, np.zeros(own.size + change, dtype=np.float32))
    assert np.array_equal(to_flat(target), own)


def test_one_bit_changes_the_digest(policy: Policy) -> None:
    flat = to_flat(policy)
    before = digest(flat)
    assert len(before) == 32
    assert digest(flat.copy()) == before
    for bit in (0, flat.size * 16, flat.size * 32 - 1):
        changed = flat.copy().view(np.uint8)
        changed[bit // 8] ^= 1 << bit % 8
        assert digest(changed.view(np.float32)) != before
