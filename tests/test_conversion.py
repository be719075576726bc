"""`diffpo convert`: bit-equal, streamed, all or nothing; and checkpoints that are refused."""

import json
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family_fixtures import (
    LLADA,
    SHIFTED,
    WRITERS,
    all_logits,
    llada_weights,
    save_shards,
    write_a2d,
    write_dream,
    write_llada,
)
from new_folder_fixtures import no_more_than
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from common.config import ModelConfig, ThresholdConfig
from common.conversion import convert
from common.errors import RunError, UserError
from common.policy import Policy
from common.policy_loading import load_policy
from common.shards import Shards
from learner.cli import app
from learner.conversion_display import lines
from learner.export import export
from learner.generation import Choice, generate

IDS = torch.tensor([[9, 7, 11, 13, 8, 20]])
INDEX = "model.safetensors.index.json"


def opened(folder: Path) -> Policy:
    return load_policy(folder, ModelConfig(), ThresholdConfig())


@pytest.fixture(params=WRITERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_converted_folder_is_the_same_model(name: str, tmp_path: Path) -> None:
    source = WRITERS[name](tmp_path / "source")
    found = convert(source, tmp_path / "target")
    one, other = opened(source), opened(tmp_path / "target")
    assert torch.equal(all_logits(one, IDS), all_logits(other, IDS))
    assert (one.shift, one.vocabulary) == (other.shift, other.vocabulary)
    assert found.shift == other.shift == (name in SHIFTED)
    assert found.vocabulary == other.vocabulary
    assert one.encode_prompt("2+3?") == other.encode_prompt("2+3?")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    described = json.loads((tmp_path / "target/config.json").read_text())
    assert described["is_causal"] is False
    assert described["prediction_shift"] == found.shift
    assert "auto_map" not in described
    assert AutoTokenizer.from_pretrained(tmp_path / "target").mask_token_id == found.vocabulary.mask_id
    assert found.parameters == sum(value.numel() for value in one.model.parameters())


def test_a_plain_reader_gets_a_bidirectional_llama(tmp_path: Path) -> None:
    convert(write_llada(tmp_path / "source"), tmp_path / "target")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "target", local_files_only=True)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, all_logits(opened(tmp_path / "source"), IDS))
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert plain.generation_config.eos_token_id == [1, 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_are_written_in_the_type_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    found = convert(write_llada(tmp_path / "source"), tmp_path / "target", dtype=dtype)
    stored = load_file(tmp_path / "target/model.safetensors")
    assert {value.dtype for value in stored.values()} == {getattr(torch, dtype)}
    assert torch.equal(
        stored["lm_head.weight"], llada_weights()["model.transformer.ff_out.weight"].to(stored["lm_head.weight"].dtype)
    )
    assert found.dtypes == (dtype,)
    assert json.loads((tmp_path / "target/config.json").read_text())["dtype"] == dtype
    opened(tmp_path / "target")


def test_no_more_than_one_file_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of all tensors that are alive, counted at every read: no more than a file's, and one tensor."""
    source, alive, peak = write_llada(tmp_path / "source"), [], [0]
    read = Shards.tensor

    def counted(self: Shards, name: str) -> Tensor:
        tensor = read(self, name).clone()
        alive.append(weakref.ref(tensor))
        held = [ref() for ref in alive]
        peak[0] = max(peak[0], sum(one.nbytes for one in held if one is not None))
        return tensor

    monkeypatch.setattr(Shards, "tensor", counted)
    weights = llada_weights()
    total, largest = sum(w.nbytes for w in weights.values()), max(w.nbytes for w in weights.values())
    limit = largest + 1000
    found = convert(source, tmp_path / "target", shard_bytes=limit)
    assert found.shards == len(list((tmp_path / "target").glob("*.safetensors"))) >= 3
    assert len(alive) == len(weights)
    assert largest <= peak[0] <= limit + largest < 0.8 * total
    index = json.loads((tmp_path / "target" / INDEX).read_text())
    assert index["metadata"]["total_size"] == total
    assert torch.equal(all_logits(opened(source), IDS), all_logits(opened(tmp_path / "target"), IDS))
    convert(source, tmp_path / "whole", shard_bytes=total)
    assert peak[0] == total  # the count sees everything where one file holds everything


def test_a_user_says_that_a_model_is_shifted(tmp_path: Path) -> None:
    convert(write_a2d(tmp_path / "source"), tmp_path / "plain", shift=0)
    convert(tmp_path / "plain", tmp_path / "shifted", shift=1)
    assert opened(tmp_path / "plain").shift == 0
    assert opened(tmp_path / "shifted").shift == 1
    assert torch.equal(all_logits(opened(tmp_path / "source"), IDS), all_logits(opened(tmp_path / "shifted"), IDS))


def test_a_saved_threshold_head_goes_along(tmp_path: Path) -> None:
    policy = opened(write_llada(tmp_path / "source"))
    with torch.no_grad():
        policy.head.linear.weight.fill_(0.25)
    policy.save(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "target")
    assert (opened(tmp_path / "target").head.linear.weight == 0.25).all()


def test_permissions_are_those_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    convert(write_llada(tmp_path / "source"), tmp_path / "target")
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "other").stat().st_mode


# -- the command line --------------------------------------------------------------------------------------------------


def test_convert_says_what_it_recognised(tmp_path: Path) -> None:
    write_dream(tmp_path / "source")
    ended = CliRunner().invoke(
        app, ["convert", str(tmp_path / "source"), str(tmp_path / "target"), "--dtype", "bfloat16"]
    )
    assert ended.exit_code == 0, ended.output
    for word in (
        "Dream",
        "bfloat16",
        "Qwen2ForCausalLM",
        "prediction_shift 1",
        "260 <|mask|>",
        "258 <|im_end|>",
        "264",
    ):
        assert word in ended.output


@pytest.mark.parametrize(
    ("parameters", "shown"), [(5_984, "5,984"), (99_999, "99,999"), (100_000, "0.1 M"), (8_015_581_184, "8,015.6 M")]
)
def test_parameters_are_counted_in_millions_where_there_are_any(parameters: int, shown: str, tmp_path: Path) -> None:
    found = replace(convert(write_llada(tmp_path / "source"), tmp_path / "target"), parameters=parameters)
    assert f"LLaDA, {shown} parameters" in next(lines(found))


def test_generate_takes_original_and_converted(name: str, tmp_path: Path) -> None:
    source = WRITERS[name](tmp_path / "source")
    convert(source, tmp_path / "target")
    choice = Choice(
        prompt="2+3?",
        tokens=8,
        block=4,
        rule="entropy_bound",
        threshold=None,
        temperature=1.0,
        seed=3,
        cache="none" if name == "modernbert" else "dual",
        device="cpu",
        raw=False,
    )
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere)
        one, other = (generate(path, choice, console, show_steps=True) for path in (source, tmp_path / "target"))
    assert one.completion_ids.tolist() == other.completion_ids.tolist()
    assert one.prompt_ids.tolist() == other.prompt_ids.tolist() == opened(source).encode_prompt("2+3?")


# -- what is refused ---------------------------------------------------------------------------------------------------


def without(folder: Path, *names: str) -> None:
    weights = {name: value for name, value in llada_weights().items() if name not in names}
    save_shards(folder, weights, 3)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def as_integers(folder: Path) -> None:
    weights = llada_weights()
    weights["model.transformer.ln_f.weight"] = weights["model.transformer.ln_f.weight"].to(torch.int8)
    save_shards(folder, weights, 3)


def as_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def wrong_file(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    index["weight_map"] = {name: second if file == first else file for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


SPOILED = {
    "missing shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), ["1 of 3 shards", "model-00002"]),
    "cut shard": (lambda f: truncate(f / "model-00003-of-00003.safetensors"), ["model-00003", "damaged"]),
    "index": (lambda f: (f / INDEX).write_text("{"), [INDEX, "damaged"]),
    "index outside": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../b"}}'),
        [INDEX, "does not name a file"],
    ),
    "index wrong": (wrong_file, ["are not in the shards that"]),
    "pickles": (as_pickles, ["pytorch_model.bin is a pickle"]),
    "integers": (as_integers, ["model.transformer.ln_f.weight as I8", "F32"]),
    "no index": (lambda f: (f / INDEX).unlink(), ["model-00001-of-00003.safetensors is a shard without its index"]),
    "configuration": (lambda f: (f / "config.json").write_text("{"), ["config.json is damaged", "line 1 column 2"]),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer.json is damaged"]),
    "tokenizer of another kind": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
        ["tokenizer.json is damaged"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["there is no tokenizer.json"]),
}


@pytest.mark.parametrize("way", ["convert", "load"])
@pytest.mark.parametrize("spoil", SPOILED)
def test_a_spoiled_checkpoint_is_refused_in_one_line(spoil: str, way: str, tmp_path: Path) -> None:
    source = write_llada(tmp_path / "source")
    change, words = SPOILED[spoil]
    change(source)
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "target") if way == "convert" else opened(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(source), *words):
        assert word in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("changes", "lacking", "words"),
    [
        ({}, ["model.transformer.blocks.1.up_proj.weight"], ["1 parameters are missing", "model.layers.1.mlp.up_proj"]),
        ({"n_layers": 1}, [], ["9 parameters are unknown", "model.layers.1.input_layernorm.weight"]),
        ({"embedding_size": 130}, [], ["model.transformer.wte.weight has shape [128, 16]", "[130, 16]"]),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    changes: dict[str, object], lacking: list[str], words: list[str], tmp_path: Path
) -> None:
    source = write_llada(tmp_path / "source", **changes)
    without(source, *lacking)
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "target")
    for word in words:
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_export_takes_the_mask_token_of_a_folder_that_does_not_name_it(tmp_path: Path) -> None:
    source = write_a2d(tmp_path / "source")
    for file in ("config.json", "tokenizer_config.json"):
        told = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps({key: told[key] for key in told if "mask_token" not in key}))
    with pytest.raises(UserError, match="has no MASK token"):
        export(source, tmp_path / "target", merge=False)
    given = ["export", str(source), str(tmp_path / "target"), "--mask-token", "<|mask|>"]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "target").mask_token == "<|mask|>"


@pytest.mark.parametrize("write", [convert, partial(export, merge=False)], ids=["convert", "export"])
@pytest.mark.parametrize("room", [100, 10_000], ids=["for nothing", "for half of the weights"])
def test_a_full_disk_leaves_nothing_and_is_named(room: int, write: Callable[[Path, Path], Any], tmp_path: Path) -> None:
    source = write_llada(tmp_path / "source")
    with no_more_than(room), pytest.raises(RunError, match=rf"{tmp_path}/target cannot be written .*; make room there"):
        write(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    write(source, tmp_path / "target")
    assert (tmp_path / "target/model.safetensors").stat().st_size > 2 * 10_000


@pytest.mark.parametrize(
    ("target", "dtype", "words"),
    [
        ("source", None, "is there already"),
        ("source/config.json/target", None, "cannot be made"),
        ("target", "int8", "--dtype int8 is unknown; give one of float32, bfloat16, float16"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(target: str, dtype: str | None, words: str, tmp_path: Path) -> None:
    source = write_llada(tmp_path / "source")
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / target, dtype=dtype)
    assert json.loads((source / "config.json").read_text()) == LLADA
