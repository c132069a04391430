"""One door to models on disk: runs, checkpoints, folders to hand on; with the tokenizer of the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_ext.data import TokenizerError, load_corpus, load_tokenizer
from bitnet_ext.formats import FormatError, export, from_pretrained, load_model, save_pretrained
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.nn import PackedBitLinear, pack_model
from bitnet_ext.training.checkpoint import CheckpointError, write_checkpoint

IDS = torch.arange(22).reshape(2, 11)


class Characters:
    """One id a character."""

    vocab_size = 128

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 128 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def build(vocab_size: int = 50257, **changes: Any) -> BitNetForCausalLM:
    config = BitNetConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=32,
        max_seq_len=16,
        **changes,
    )
    return BitNetForCausalLM(config, seed=3)


def write_run(run: Path, model: BitNetForCausalLM, source: Any = None) -> Path:
    """A run folder as the trainer leaves it."""
    state: dict[str, Any] = {"model_config": model.config.to_dict()}
    if source is not None:
        state["source"] = source
    return write_checkpoint(run / "checkpoint", 12, model.state_dict(), {}, state)


def source_of(tmp_path: Path, tokenizer: Any) -> dict[str, Any]:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {n} of a text.\n" for n in range(300)))
    return json.loads(
        json.dumps(load_corpus(path, tokenizer=tokenizer, cache_dir=tmp_path / "cache").source())
    )


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS)


def test_every_path_of_a_run(tmp_path: Path) -> None:
    model = build()
    checkpoint = write_run(tmp_path / "run", model, source_of(tmp_path, "gpt2"))
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoint", checkpoint, str(tmp_path / "run")):
        found, tokenizer = load_model(path)
        assert torch.equal(logits(found), logits(model))
        assert tokenizer is not None and tokenizer.fingerprint == load_tokenizer("gpt2").fingerprint
    assert (
        load_model(tmp_path / "run", dtype=torch.bfloat16).model.embed_tokens.weight.dtype == torch.bfloat16
    )


def test_a_folder_to_hand_on(tmp_path: Path) -> None:
    model = pack_model(build())
    save_pretrained(model, tmp_path / "model", "gpt2")
    found, tokenizer = load_model(tmp_path / "model")
    assert torch.equal(logits(found), logits(model)) and tokenizer is not None
    save_pretrained(model, tmp_path / "model")
    assert load_model(tmp_path / "model").tokenizer is None
    given = load_model(tmp_path / "model", tokenizer="gpt2").tokenizer
    assert given is not None and given.name == "gpt2"


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(50257, "gpt2"), (50304, "gpt2"), (100, None), (128_256, None)]
)
def test_a_checkpoint_that_does_not_name_its_tokenizer(
    vocab_size: int, name: str | None, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", build(vocab_size))
    tokenizer = load_model(tmp_path / "run").tokenizer
    assert (None if tokenizer is None else tokenizer.name) == name
    # One that says that it has none.
    write_run(tmp_path / "other", build(vocab_size), {"name": "ids", "tokenizer": None})
    assert load_model(tmp_path / "other").tokenizer is None


def test_an_object_of_the_user_s_own_has_to_be_given(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build(128), source_of(tmp_path, Characters()))
    assert load_model(tmp_path / "run").tokenizer is None
    tokenizer = load_model(tmp_path / "run", tokenizer=Characters()).tokenizer
    assert tokenizer is not None and tokenizer.decode(tokenizer.encode("ab")) == "ab"
    export(tmp_path / "run", tmp_path / "out", tokenizer=Characters())
    assert load_model(tmp_path / "out").tokenizer is None
    assert json.loads((tmp_path / "out" / "bitnet_tokenizer.json").read_text())["name"] == "Characters"


def test_a_tokenizer_json_travels_with_the_checkpoint(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "Line": 1, "text": 2}, "<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    write_run(tmp_path / "run", build(8), source_of(tmp_path, tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").unlink()
    found = load_model(tmp_path / "run").tokenizer
    assert found is not None and found.encode("text Line") == [2, 1]
    export(tmp_path / "run", tmp_path / "out")
    again = load_model(tmp_path / "out").tokenizer
    assert again is not None and again.fingerprint == found.fingerprint


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path: Path) -> None:
    write_run(tmp_path / "run", build(100))
    with pytest.raises(TokenizerError, match=r"'gpt2' has 50257 ids, the model in .* has vocab_size 100"):
        load_model(tmp_path / "run", tokenizer="gpt2")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "holds no model: there is no such folder"),
        ({}, "holds no model: accepted are the folder of a run"),
        ({"notes.txt": "x"}, "holds no model: accepted are"),
        ({"config.json": '{"model_type": "llama"}'}, r"a model of transformers \(model_type 'llama'\)"),
        ({"config.json": '{"model": {}, "train": {}}'}, "holds no model: accepted are"),
        ({"config.json": '{"format": "bitnet_ext"}'}, "has format version None"),
        ({"latest.json": "{"}, "damaged"),
        ({"state.json": "{"}, "damaged"),
    ],
)
def test_what_holds_no_model(files: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    with pytest.raises((FormatError, CheckpointError), match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


# ---- export --------------------------------------------------------------------------------------------------------


def test_export(tmp_path: Path) -> None:
    model = build()
    write_run(tmp_path / "run", model, source_of(tmp_path, "gpt2"))
    assert export(tmp_path / "run", tmp_path / "packed") == tmp_path / "packed"
    loaded, tokenizer = load_model(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(pack_model(model))) and tokenizer is not None
    assert any(isinstance(module, PackedBitLinear) for module in loaded.modules())
    about = json.loads((tmp_path / "packed" / "config.json").read_text())["about"]
    assert about["step"] == 12 and about["source"]["name"] == "text.txt"
    assert str(tmp_path) not in json.dumps(about)  # the folder is handed on
    export(tmp_path / "run", tmp_path / "int8", head="int8", dtype=torch.bfloat16)
    int8 = from_pretrained(tmp_path / "int8")
    expected = pack_model(build(), head="int8").bfloat16()
    assert torch.equal(logits(int8), logits(expected))
    export(tmp_path / "run", tmp_path / "training", packed=False)
    training = from_pretrained(tmp_path / "training")
    assert torch.equal(logits(training), logits(model)) and training.lm_head.weight.requires_grad
    # From one such folder to another.
    export(tmp_path / "training", tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(loaded))
    export(tmp_path / "packed", tmp_path / "copy")
    assert torch.equal(logits(from_pretrained(tmp_path / "copy")), logits(loaded))
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["about"] == about


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("training", {"packed": False, "head": "int8"}, "head is 'int8', which needs packed=True"),
        ("training", {"head": "int4"}, "head must be one of"),
        ("packed", {"packed": False}, "is packed already"),
        ("packed", {"head": "int8"}, "is packed already"),
        ("twin", {}, "must hold a quantised BitLinear"),
    ],
)
def test_what_cannot_be_exported(kind: str, kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = build(quantization="none" if kind == "twin" else "b1.58")
    if kind == "packed":
        save_pretrained(pack_model(model), tmp_path / "run")
    else:
        write_run(tmp_path / "run", model)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", tmp_path / "out", **kwargs)
    assert os.listdir(tmp_path) == ["run"]
