"""Checkpoints: a kill at any point, damaged files, shared tensors, paths, what they record."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.training import (
    CheckpointError,
    TrainConfig,
    Trainer,
    load_model,
    read_checkpoint,
    resolve_checkpoint,
)
from bitnet_ext.training.checkpoint import (
    latest_checkpoint,
    load_weights,
    write_checkpoint,
)

SHAPE = BitNetConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    intermediate_size=64,
    max_seq_len=64,
)
CONFIG = TrainConfig(steps=4, warmup_steps=2, batch_size=2, seq_len=16, checkpoint_seconds=None)


def stream(n: int = 500, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, n).astype(np.uint16)


def write(directory: Path, step: int, value: float = 0.0, **options: bool) -> Path:
    tensors = {"w": torch.full((3,), value)}
    return write_checkpoint(directory, step, tensors, {"m": torch.zeros(2)}, {"value": value}, **options)


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


# --- kills --------------------------------------------------------------------------------------------------------

CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")


def killed_before_change(number: int, act: Callable[[], object]) -> bool:
    """Runs `act` in a child that is killed before its number-th change of the disk; False when it has fewer."""
    child = os.fork()
    if child == 0:
        left = [number]

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def change(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return change

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    "before", ["nothing", "an older step", "the same step", "an unnamed folder", "a killed writer"]
)
def test_a_kill_at_any_point_loses_nothing(before: str, tmp_path: Path) -> None:
    def prepare(directory: Path) -> None:
        if before != "nothing":
            write(directory, 10 if before == "the same step" else 5, 1.0)
        if before == "an unnamed folder":
            shutil.copytree(directory / "step-00000005", directory / "step-00000010")
            (directory / "step-00000010" / "model.safetensors").write_bytes(b"cut")
        if before == "a killed writer":
            (directory / ".step-00000010.999999999.tmp").mkdir()
            (directory / ".step-00000010.999999999.tmp" / "model.safetensors").write_bytes(bytes(99))

    points = 0
    while True:
        directory = tmp_path / str(points)
        prepare(directory)
        if not killed_before_change(points + 1, lambda: write(directory, 10, 2.0)):  # noqa: B023
            break
        points += 1
        if before == "nothing":
            assert latest_checkpoint(directory) is None or read_checkpoint(directory).state == {"value": 2.0}
        else:
            found = read_checkpoint(directory)
            assert found.state["value"] in (1.0, 2.0)
            assert found.model["w"].tolist() == [found.state["value"]] * 3
        write(directory, 15, 3.0)
        assert read_checkpoint(directory).state == {"value": 3.0}
        assert sorted(path.name for path in directory.iterdir()) == ["latest.json", "step-00000015"]
    assert points >= 9  # the folder, three files, its rename, the pointer and its rename, and folders to disk
    assert read_checkpoint(tmp_path / str(points)).state == {"value": 2.0}


def test_the_same_step_is_written_twice(tmp_path: Path) -> None:
    names = [write(tmp_path, 6, float(value)).name for value in range(3)]
    assert names == ["step-00000006", "step-00000006.2", "step-00000006"]
    assert read_checkpoint(tmp_path).state == {"value": 2.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-00000006"]


def test_a_snapshot_keeps_its_name(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        for step in (3, 6):
            assert write(tmp_path, step, value, keep_older=True).name == f"step-{step:08d}"
    assert [read_checkpoint(tmp_path / f"step-{step:08d}").state["value"] for step in (3, 6)] == [2.0, 2.0]
    assert hidden(tmp_path) == []


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """As relia-07: the temporary folder of a killed writer; that of a running process stays."""
    dead, alive = tmp_path / ".step-00000005.999999999.tmp", tmp_path / f".step-00000005.{os.getppid()}.tmp"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / ".latest.json.999999999.tmp").write_text("{")
    (tmp_path / ".hidden").write_text("somebody's")
    write(tmp_path, 10)
    assert hidden(tmp_path) == [".hidden", alive.name]
    write(tmp_path, 15, sole_writer=True)
    assert hidden(tmp_path) == [".hidden"]


def test_an_interrupted_write_leaves_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 5, 1.0)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 10)
    assert hidden(tmp_path) == [] and read_checkpoint(tmp_path).step == 5


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    Trainer(BitNetForCausalLM(SHAPE, seed=0), CONFIG, stream(), run_dir=folder, device="cpu").fit()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_one_resolver_for_all_paths(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoint" / "step-00000004"
    link = tmp_path / "link"
    link.symlink_to(run)
    for path in (run, run / "checkpoint", folder, str(run), link):
        assert os.path.samefile(resolve_checkpoint(path), folder)
        assert load_model(path).config == SHAPE
        assert read_checkpoint(path).step == 4
    for path, message in (
        (tmp_path / "nothing", "there is no such folder"),
        (tmp_path, "must be the folder of a run, of checkpoints .* or of one checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve_checkpoint(path)
    shutil.rmtree(folder)
    with pytest.raises(
        CheckpointError, match=r"latest\.json names .*step-00000004, which has no state\.json"
    ):
        load_model(run)


def test_load_model_leaves_the_generator_alone(run: Path) -> None:
    before = torch.get_rng_state()
    model = load_model(run)
    assert torch.equal(torch.get_rng_state(), before)
    ids = torch.arange(8)[None]
    expected = BitNetForCausalLM(SHAPE)
    expected.load_state_dict(read_checkpoint(run).model)
    assert torch.equal(model(ids), expected(ids))
    assert all(p.requires_grad for p in model.parameters())


# --- damaged files -----------------------------------------------------------------------------------------------


def edit_state(change: Callable[[dict[str, Any], Path], object]) -> Callable[[Path], object]:
    def edit(run: Path) -> None:
        (path,) = run.glob("checkpoint/step-*/state.json")
        content = json.loads(path.read_text())
        change(content, path.parent)
        path.write_text(json.dumps(content))

    return edit


def edit_latest(data: bytes) -> Callable[[Path], object]:
    return lambda run: (run / "checkpoint" / "latest.json").write_bytes(data)


def edit_state_text(text: str) -> Callable[[Path], object]:
    return lambda run: next(run.glob("checkpoint/step-*/state.json")).write_text(text)


def set_config(**values: object) -> Callable[[Path], object]:
    return edit_state(lambda content, _: content["state"]["model_config"].update(values))


def rewrite_tensors(content: dict[str, Any], folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    content["files"]["model.safetensors"] = {"bytes": len(data), "sha256": digest}


def long_header(content: dict[str, Any], folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    rewrite_tensors(content, folder, (2**63).to_bytes(8, "little") + data[8:])


def odd_header(content: dict[str, Any], folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4]}}).encode()
    rewrite_tensors(content, folder, len(header).to_bytes(8, "little") + header + bytes(4))


def outside(content: dict[str, Any], folder: Path) -> None:
    file = folder.parent.parent / "metrics.jsonl"
    data = file.read_bytes()
    content["files"]["../../metrics.jsonl"] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


DAMAGES = {
    "latest empty": edit_latest(b""),
    "latest a list": edit_latest(b"[]"),
    "latest a number": edit_latest(b'{"checkpoint": 5}'),
    "latest not UTF-8": edit_latest(b"\xff\xfe"),
    "latest deep": edit_latest(b"[" * 100_000),
    "latest a deep object": edit_latest(b'{"checkpoint":' * 100_000),
    "latest a long number": edit_latest(b'{"checkpoint": ' + b"9" * 10_000 + b"}"),
    "latest leaves the folder": edit_latest(b'{"checkpoint": "../checkpoint/step-00000004"}'),
    "latest absolute": edit_latest(b'{"checkpoint": "/etc"}'),
    "latest dots": edit_latest(b'{"checkpoint": ".."}'),
    "latest with a null byte": edit_latest(b'{"checkpoint": "a\\u0000b"}'),
    "latest names nothing": edit_latest(b'{"checkpoint": "step-9"}'),
    "state deep": edit_state_text('{"a":' * 100_000),
    "state empty": edit_state_text(""),
    "state a list": edit_state_text("[1]"),
    "files a text": edit_state(lambda c, _: c.update(files="x")),
    "file without bytes": edit_state(lambda c, _: c["files"]["model.safetensors"].pop("bytes")),
    "file a number": edit_state(lambda c, _: c["files"].update({"model.safetensors": 3})),
    "file outside": edit_state(outside),
    "state a number": edit_state(lambda c, _: c.update(state=3)),
    "step a text": edit_state(lambda c, _: c.update(step="4")),
    "step negative": edit_state(lambda c, _: c.update(step=-4)),
    "format unknown": edit_state(lambda c, _: c.update(format=99)),
    "shared a list": edit_state(lambda c, _: c.update(shared=[1])),
    "shared with nothing": edit_state(lambda c, _: c.update(shared={"model.safetensors": {"a": "b"}})),
    "no model_config": edit_state(lambda c, _: c["state"].pop("model_config")),
    "model_config a list": edit_state(lambda c, _: c["state"].update(model_config=[["a", 1]])),
    "init_std negative": set_config(init_std=-1),
    "rope_theta a text": set_config(rope_theta="x"),
    "vocab_size 1e12": set_config(vocab_size=10**12),
    "num_layers 1e9": set_config(num_layers=10**9),
    "intermediate_size 1e12": set_config(intermediate_size=10**12),
    "intermediate_size 1e30": set_config(intermediate_size=10**30),
    "max_seq_len 1e12": set_config(max_seq_len=10**12),
    "header of 2^63": edit_state(long_header),
    "header of a petabyte": edit_state(odd_header),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_told_in_one_sentence(name: str, run: Path) -> None:
    """As relia-06 and 19."""
    DAMAGES[name](run)
    with pytest.raises(CheckpointError, match=str(run / "checkpoint")) as error:
        load_model(run)
    assert "\n" not in str(error.value)


RESUME_DAMAGES = {
    "no sums": edit_state(lambda c, _: c["state"].pop("sums")),
    "metrics_bytes a text": edit_state(lambda c, _: c["state"].update(metrics_bytes="9")),
    "train_config a list": edit_state(lambda c, _: c["state"].update(train_config=[])),
}


@pytest.mark.parametrize("name", RESUME_DAMAGES)
def test_a_damaged_state_is_told_on_resume(name: str, run: Path) -> None:
    RESUME_DAMAGES[name](run)
    trainer = Trainer(BitNetForCausalLM(SHAPE, seed=0), CONFIG, stream(), run_dir=run, device="cpu")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        trainer.fit(resume=True)


def test_tensors_of_another_model_are_refused(run: Path) -> None:
    checkpoint = read_checkpoint(run)
    model = BitNetForCausalLM(SHAPE, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = "layers.1.attention.q_proj.weight"
    for change, message in (
        (lambda t: t.pop(name), "has shape .* the checkpoint has nothing"),
        (lambda t: t.update({name: t[name][:3]}), r"the checkpoint has \(3, 32\)"),
        (lambda t: t.update({name: t[name].int()}), r"is torch\.float32, the checkpoint has torch\.int32"),
        (lambda t: t.update(extra=torch.zeros(1)), "has extra, which the model has not"),
    ):
        checkpoint.model = dict(read_checkpoint(run).model)
        change(checkpoint.model)
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, checkpoint)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- shared and compiled -----------------------------------------------------------------------------------------


def test_a_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {
        "a": base.view(3, 4),
        "same": base.view(3, 4),
        "transposed": base.view(3, 4).T,
        "part": base[2:5],
        "own": torch.ones(2),
        "empty": torch.empty(0),
    }
    folder = write_checkpoint(tmp_path, 1, tensors, {}, {})
    content = json.loads((folder / "state.json").read_text())
    assert content["shared"] == {"model.safetensors": {"same": "a"}}
    found = read_checkpoint(tmp_path).model
    assert found.keys() == tensors.keys() and found["same"] is found["a"]
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def shared_model(seed: int = 0) -> BitNetForCausalLM:
    model = BitNetForCausalLM(SHAPE, seed=seed)
    model.layers[1] = model.layers[0]
    assert model.lm_head is not None
    model.lm_head.weight = model.embed_tokens.weight
    return model


def test_a_shared_block_is_trained_saved_loaded_and_resumed(tmp_path: Path) -> None:
    """As 10: cross-layer sharing."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Trainer(shared_model(), CONFIG, stream(), run_dir=whole, device="cpu").fit()
    model = load_model(whole)
    assert model.layers[1].attention.q_proj.weight is model.layers[0].attention.q_proj.weight
    assert model.lm_head is not None and model.lm_head.weight is model.embed_tokens.weight
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in shared_model().parameters())
    size = (resolve_checkpoint(whole) / "model.safetensors").stat().st_size
    stored = sum(p.numel() for p in shared_model().parameters())
    assert size < 4 * stored + 4096

    trainer = Trainer(shared_model(), CONFIG, stream(), run_dir=cut, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(on_progress=lambda step, record: trainer.request_stop() if step == 2 else None)
    Trainer(shared_model(seed=3), CONFIG, stream(), run_dir=cut, device="cpu").fit(resume=True)
    expected = read_checkpoint(whole).model
    assert all(torch.equal(value, expected[name]) for name, value in read_checkpoint(cut).model.items())


def test_sharing_must_agree(run: Path) -> None:
    with pytest.raises(CheckpointError, match="are one tensor, the checkpoint has two with different values"):
        load_weights(shared_model(), read_checkpoint(run))


@pytest.mark.parametrize("part", ["model", "layer"])
def test_a_compiled_model_is_saved_under_its_own_names(part: str, tmp_path: Path) -> None:
    """As 11."""
    model: Any = BitNetForCausalLM(SHAPE, seed=0)
    if part == "model":
        model = torch.compile(model, backend="eager")
    else:
        model.layers[0] = torch.compile(model.layers[0], backend="eager")
    Trainer(model, CONFIG, stream(), run_dir=tmp_path / "compiled", device="cpu").fit()
    Trainer(
        BitNetForCausalLM(SHAPE, seed=0), CONFIG, stream(), run_dir=tmp_path / "eager", device="cpu"
    ).fit()
    compiled, eager = (read_checkpoint(tmp_path / name) for name in ("compiled", "eager"))
    assert compiled.model.keys() == eager.model.keys()
    assert compiled.optimizer.keys() == eager.optimizer.keys()
    assert all(torch.equal(value, eager.model[name]) for name, value in compiled.model.items())
    assert load_model(tmp_path / "compiled").config == SHAPE
    load_weights(model, eager)


def test_names_of_a_compiled_model_in_an_old_checkpoint(run: Path) -> None:
    checkpoint = read_checkpoint(run)
    old = {f"_orig_mod.{name}": value for name, value in checkpoint.model.items()}
    folder = write_checkpoint(run / "checkpoint", 9, {"x": torch.zeros(1)}, {}, checkpoint.state)
    import safetensors.torch

    content = json.loads((folder / "state.json").read_text())
    rewrite_tensors(content, folder, safetensors.torch.save(old))
    (folder / "state.json").write_text(json.dumps(content))
    assert torch.equal(load_model(run).embed_tokens.weight, checkpoint.model["embed_tokens.weight"])


def test_a_plain_module_is_loaded_too(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    write_checkpoint(tmp_path, 1, source.state_dict(), {}, {})
    load_weights(target, read_checkpoint(tmp_path))
    assert torch.equal(target.weight, source.weight)
    with pytest.raises(CheckpointError, match="holds no BitNetConfig"):
        load_model(tmp_path)
