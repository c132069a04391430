"""Models in folders to hand on: the same model after a round trip in every form, and one sentence for what is wrong."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from bitnet_ext.data import load_tokenizer
from bitnet_ext.formats import FormatError, from_pretrained, pretrained, save_pretrained, tensor_files
from bitnet_ext.models import BitNetConfig, BitNetForCausalLM
from bitnet_ext.nn import BitLinear, Int8Linear, PackedBitLinear, pack_model

V = 97
IDS = torch.arange(22).reshape(2, 11) * 7 % V


def config(**changes: Any) -> BitNetConfig:
    values: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 36,  # K % 4 == 0, K % 16 != 0
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "intermediate_size": 46,  # K % 4 != 0
        "max_seq_len": 16,
    }
    return BitNetConfig(**{**values, **changes})


def build(form: str = "packed", dtype: torch.dtype = torch.float32, **changes: Any) -> BitNetForCausalLM:
    """A model whose gains are not all one."""
    if form == "twin":
        changes["quantization"] = "none"
    model = BitNetForCausalLM(config(**changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model = model.to(dtype)
    if form.startswith("packed"):
        try:
            model = pack_model(model, head="int8" if form == "packed-int8" else "keep")
        except ValueError:
            if not model.config.tie_embeddings:
                raise
            pytest.skip("a tied head has no layer of its own")
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS.to(next(model.buffers()).device))


FORMS = ("training", "packed", "packed-int8", "twin")
FLAVOURS = [
    dict(zip(("sub_norm", "pre_linear_norm", "tie_embeddings"), flags, strict=True))
    for flags in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_round_trip(form: str, dtype: torch.dtype, flavour: dict[str, bool], tmp_path: Path) -> None:
    model = build(form, dtype, **flavour)
    assert save_pretrained(model, tmp_path / "model") == tmp_path / "model"
    loaded = from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    own, again = model.state_dict(), loaded.state_dict()
    assert own.keys() == again.keys()
    for name, value in own.items():
        assert value.dtype == again[name].dtype and torch.equal(value, again[name]), name
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in loaded.modules()] == kinds
    trained = form in ("training", "twin")
    assert all(parameter.requires_grad == trained for parameter in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("form", FORMS)
def test_another_dtype_is_that_of_a_cast(form: str, tmp_path: Path) -> None:
    model = build(form)
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    assert loaded.cos.dtype == torch.float32 and torch.equal(loaded.cos, model.cos)
    assert torch.equal(logits(loaded), logits(cast))
    assert {n: v.dtype for n, v in loaded.state_dict().items()} == {
        n: v.dtype for n, v in cast.state_dict().items()
    }


def test_files_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_pretrained(build("packed"), tmp_path / "model", "gpt2", max_shard_bytes=8000)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "model").iterdir()} == {"0o644"}


def test_a_loaded_model_can_be_trained(tmp_path: Path) -> None:
    model = build("training")
    save_pretrained(model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    loaded = from_pretrained(tmp_path / "model")
    for each in (model, loaded):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(IDS).square().mean().backward()
        optimizer.step()
    assert torch.equal(logits(loaded), logits(model))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before  # whatever maps it
    save_pretrained(loaded, tmp_path / "model")  # over the file that it was read from
    assert torch.equal(logits(from_pretrained(tmp_path / "model")), logits(model))


@pytest.mark.parametrize("form", ["training", "packed-int8"])
def test_shards(form: str, tmp_path: Path) -> None:
    model = build(form)
    save_pretrained(model, tmp_path / "model", max_shard_bytes=8000)
    files = sorted(os.listdir(tmp_path / "model"))
    count = len(files) - 2
    assert count > 2 and files[1] == f"model-00001-of-{count:05d}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert sum(value.nbytes for value in model.state_dict().values()) == index["metadata"]["total_size"]
    stored = {
        name: file for file in files[1:-1] for name in safetensors.torch.load_file(tmp_path / "model" / file)
    }
    assert stored == index["weight_map"] and stored.keys() == model.state_dict().keys()
    assert torch.equal(logits(from_pretrained(tmp_path / "model")), logits(model))
    # Saved again in one file: no shard is left.
    save_pretrained(model, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FormatError, match="weight_map"):
        from_pretrained(tmp_path / "model")


def test_no_float_weights_and_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("packed", num_layers=3)
    save_pretrained(model, tmp_path / "model")
    made: list[tuple[str, tuple[int, ...]]] = []
    for name in ("empty", "zeros", "randn"):
        real = getattr(torch, name)

        def record(*args: Any, _real: Callable[..., torch.Tensor] = real, **kwargs: Any) -> torch.Tensor:
            value = _real(*args, **kwargs)
            if not value.is_meta and value.numel() > 100:
                made.append((str(value.dtype), tuple(value.shape)))
            return value

        monkeypatch.setattr(torch, name, record)
    before = torch.get_rng_state()
    loaded = from_pretrained(tmp_path / "model")
    assert made == [] and torch.equal(torch.get_rng_state(), before)
    assert isinstance(loaded.layers[2].attention.q_proj, PackedBitLinear)


def test_tokenizer(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path / "model", "gpt2")
    assert load_tokenizer(tmp_path / "model").fingerprint == load_tokenizer("gpt2").fingerprint
    save_pretrained(build(), tmp_path / "model")
    assert not (tmp_path / "model" / "bitnet_tokenizer.json").exists()


def test_shared_layers_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    for form in ("training", "packed"):
        model = build("training", num_layers=3)
        model.layers[2] = model.layers[0]
        model.layers[1].attention.q_proj.weight = model.layers[0].attention.q_proj.weight
        if form == "packed":
            model = pack_model(model)
        save_pretrained(model, tmp_path / form)
        stored = safetensors.torch.load_file(tmp_path / form / "model.safetensors")
        assert not [name for name in stored if name.startswith("layers.2.")]
        loaded = from_pretrained(tmp_path / form)
        assert torch.equal(logits(loaded), logits(model))
        first, last = (loaded.layers[i].feed_forward.up_proj for i in (0, 2))
        if form == "packed":
            assert first.packed.data_ptr() == last.packed.data_ptr()
            assert first.weight_scale is last.weight_scale
        else:
            assert first.weight is last.weight
        if form == "training":
            assert "layers.1.attention.q_proj.weight" not in stored
            assert loaded.layers[1].attention.q_proj.weight is loaded.layers[0].attention.q_proj.weight


def test_wrappers(tmp_path: Path) -> None:
    model = build("training")
    expected = logits(model)
    save_pretrained(nn.DataParallel(model), tmp_path / "parallel")
    compiled = torch.compile(copy.deepcopy(model))  # nothing runs, so nothing is compiled
    save_pretrained(compiled, tmp_path / "compiled")
    blocks = copy.deepcopy(model)
    blocks.layers[1] = torch.compile(blocks.layers[1])
    blocks.layers[0].feed_forward.up_proj = torch.compile(blocks.layers[0].feed_forward.up_proj)
    save_pretrained(blocks, tmp_path / "blocks")
    for name in ("parallel", "compiled", "blocks"):
        assert torch.equal(logits(from_pretrained(tmp_path / name)), expected)


def test_segments_and_scales_by_row(tmp_path: Path) -> None:
    model = build("packed")
    for name, scales, segments in (("q_proj", 2, (12, 24)), ("k_proj", 12, ()), ("o_proj", 1, ())):
        layer = getattr(model.layers[0].attention, name)
        scale = torch.linspace(0.5, 1.5, scales)
        new = PackedBitLinear(
            layer.in_features,
            layer.out_features,
            layer.packed,
            scale,
            None,
            layer.norm_weight,
            1e-5,
            segments,
        )
        setattr(model.layers[0].attention, name, new)
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.layers[0].attention.q_proj.segments == (12, 24)
    edit_config(tmp_path / "model", segments={"layers.0.attention.q_proj": [12, 12]})
    with pytest.raises(FormatError, match="has 24 rows, accepted are 36"):
        from_pretrained(tmp_path / "model")


# ---- what is refused -----------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors in a whole file whose size and sha256 agree with config.json."""
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    edit_config(
        folder, files={path.name: {"bytes": path.stat().st_size, "sha256": tensor_files.sha256(path)}}
    )


def truncate(folder: Path, size: int) -> None:
    os.truncate(folder / "model.safetensors", size)
    edit_config(
        folder,
        files={
            "model.safetensors": {"bytes": size, "sha256": tensor_files.sha256(folder / "model.safetensors")}
        },
    )


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte behind the header, of a float
    (folder / "model.safetensors").write_bytes(data)


Q = "layers.0.attention.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "holds no model: there is no such folder"),
        (lambda f: (f / "config.json").unlink(), "holds no model: it has no config.json"),
        (
            lambda f: (f / "config.json").write_text("{"),
            r"config\.json is damaged: it must hold settings as a JSON object",
        ),
        (
            lambda f: (f / "config.json").write_text("[" * 100_000),
            r"config\.json is damaged: it must hold settings as a JSON object",
        ),
        (
            lambda f: (f / "config.json").write_bytes(b"\xff\xfe"),
            r"config\.json is damaged: it must hold settings as a JSON object",
        ),
        (lambda f: (f / "config.json").write_text("[]"), r"as a JSON object \(it holds list\)"),
        (lambda f: (f / "config.json").write_text("{}"), "is not of the format 'bitnet_ext'"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
            r"a model of transformers \(model_type 'llama'\)",
        ),
        (lambda f: edit_config(f, format_version=2), "has format version 2, this version reads 1"),
        (lambda f: edit_config(f, form="folded"), "'form' is 'folded', accepted are"),
        (lambda f: edit_config(f, head="int4"), "'head' is 'int4'"),
        (lambda f: edit_config(f, head=["int8"]), r"'head' is \['int8'\]"),
        (lambda f: edit_config(f, model=None), "'model' must be an object"),
        (lambda f: edit_config(f, model={"hidden": 3}), "configuration is damaged"),
        (
            lambda f: edit_config(f, model={**config().to_dict(), "hidden_size": "x"}),
            "configuration is damaged",
        ),
        (
            lambda f: edit_config(f, model={**config().to_dict(), "num_layers": 10**9}),
            "says num_layers 1000000000, its tensors are of 2",
        ),
        (lambda f: edit_config(f, model={**config().to_dict(), "max_seq_len": 10**12}), "max_seq_len is"),
        (
            lambda f: edit_config(f, model={**config().to_dict(), "vocab_size": 98}),
            r"embed_tokens.weight has shape \[97, 36\], by the configuration it is \[98, 36\]",
        ),
        (lambda f: edit_config(f, model={**config().to_dict(), "hidden_size": 72}), "has shape"),
        (
            lambda f: edit_config(f, model={**config().to_dict(), "sub_norm": False}),
            "is not a tensor of the model",
        ),
        (lambda f: edit_config(f, form="training"), "weight is missing"),
        (lambda f: edit_config(f, head="int8"), r"lm_head\.(codes|weight_scale) is missing"),
        (lambda f: edit_config(f, segments={Q: "x"}), "segments of .* is 'x'"),
        (lambda f: edit_config(f, shared=[1]), "'shared' must be an object"),
        (lambda f: edit_config(f, shared={f"{Q}.packed": "nothing.packed"}), "shares|is not a tensor"),
        (lambda f: edit_config(f, files={"../x": {"bytes": 1}}), "names the file '../x'"),
        (lambda f: (f / "model.safetensors").unlink(), r"holds no model\.safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 900), "is damaged: it has 900 bytes"),
        (flip, "does not match its sha256, it was changed"),
        (lambda f: truncate(f, 900), "no whole safetensors file"),
        (lambda f: truncate(f, 4), "no whole safetensors file"),
        (lambda f: truncate(f, 0), "no whole safetensors file"),
        (
            lambda f: edit_tensors(f, lambda t: t[f"{Q}.packed"][3, 2].fill_(0b11_00_00_00)),
            "holds the code 3",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t[f"{Q}.packed"][0, 0].fill_(0b00_11_00_00)),
            "holds the code 3",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t[f"{Q}.weight_scale"].fill_(float("nan"))),
            "not positive and finite",
        ),
        (lambda f: edit_tensors(f, lambda t: t[f"{Q}.weight_scale"].fill_(-1)), "not positive and finite"),
        (lambda f: edit_tensors(f, lambda t: t.pop(f"{Q}.packed")), r"q_proj\.packed is missing"),
        (
            lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(2))),
            "extra is not a tensor of the model",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.packed": t[f"{Q}.packed"][:, :-1].clone()})),
            r"q_proj\.packed has shape \[36, 8\], by the configuration it is \[36, 9\]",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.packed": t[f"{Q}.packed"].char()})),
            r"q_proj\.packed is torch\.int8, accepted is torch\.uint8",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.weight_scale": torch.ones(5)})),
            r"weight_scale has shape \(5,\)",
        ),
        (
            lambda f: edit_tensors(
                f, lambda t: t.update({f"{Q}.weight_scale": torch.ones((), dtype=torch.half)})
            ),
            r"weight_scale is torch\.float16, accepted is torch\.float32",
        ),
        (
            lambda f: edit_tensors(
                f, lambda t: t.update({"embed_tokens.weight": t["embed_tokens.weight"].long()})
            ),
            r"embed_tokens\.weight is torch\.int64",
        ),
    ],
)
def test_damage_is_told_in_one_sentence(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(build(), folder)
    damage(folder)
    with pytest.raises(FormatError, match=message) as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_verify_false_reads_a_changed_file(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path / "model")
    flip(tmp_path / "model")
    from_pretrained(tmp_path / "model", verify=False)


def test_damaged_shards(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(build(), folder, max_shard_bytes=8000)
    shard = next(folder.glob("model-00002-*"))
    shard.rename(tmp_path / "kept")
    with pytest.raises(FormatError, match="holds no model-00002"):
        from_pretrained(folder)
    (tmp_path / "kept").rename(shard)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["embed_tokens.weight"] = shard.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"does not hold embed_tokens\.weight"):
        from_pretrained(folder)
    index["weight_map"]["embed_tokens.weight"] = "../config.json"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="weight_map must give a file of the folder"):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16"])
def test_other_dtypes(dtype: Any, tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path / "model")
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16 or float16"):
        from_pretrained(tmp_path / "model", dtype=dtype)


def with_adapter(model: BitNetForCausalLM) -> nn.Module:
    model.layers[0].attention.q_proj.lora = nn.Linear(36, 4, bias=False)
    return model


def with_parametrization(model: BitNetForCausalLM) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def half_packed(model: BitNetForCausalLM) -> nn.Module:
    layer = model.layers[0].attention.q_proj
    assert isinstance(layer, BitLinear)
    model.layers[0].attention.q_proj = PackedBitLinear.from_bit_linear(layer)
    return model


def with_bias(model: BitNetForCausalLM) -> nn.Module:
    model.layers[0].attention.q_proj = BitLinear(36, 36, bias=True)
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: nn.Linear(3, 3), TypeError, "model is a Linear, accepted is a BitNetForCausalLM"),
        (lambda model: None, TypeError, "model is a NoneType"),
        (with_adapter, ValueError, "remove adapters, parametrizations"),
        (with_parametrization, ValueError, "remove adapters, parametrizations"),
        (with_bias, ValueError, "remove adapters, parametrizations"),
        (half_packed, ValueError, "1 layers of the model are packed and 13 are not"),
    ],
)
def test_models_that_cannot_be_saved(
    change: Callable[[BitNetForCausalLM], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        save_pretrained(change(build("training")), tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fault", ["full disk", "interrupt"])
def test_a_failed_write_keeps_what_was_there(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model = build()
    save_pretrained(model, folder)

    def fail(*args: Any, **kwargs: Any) -> None:
        if fault == "interrupt":
            raise KeyboardInterrupt
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(KeyboardInterrupt if fault == "interrupt" else OSError, match=r"cannot write|"):
        save_pretrained(build("training"), folder)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(logits(from_pretrained(folder)), logits(model))


def test_a_failed_rename_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    model = build()
    save_pretrained(model, folder)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(target) == folder and Path(source).suffix == ".tmp":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match=r"cannot write the model to .*: Input/output error"):
        save_pretrained(build("training"), folder)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(logits(from_pretrained(folder)), logits(model))


def test_folders_with_other_files_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(build(), folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt, which no model has"):
        save_pretrained(build(), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="is a file: give the name of a folder"):
        save_pretrained(build(), folder / "notes.txt")
    (folder / "notes.txt").unlink()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier save")
    save_pretrained(build(), folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_what_a_killed_writer_left_is_removed_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".model.1-ab.tmp", 1), (".model.2-ab.tmp", None), (".other.1-ab.tmp", 1)):
        (tmp_path / name).mkdir()
        if age is not None:
            os.utime(tmp_path / name, (age, age))
    save_pretrained(build(), tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == [".model.2-ab.tmp", ".other.1-ab.tmp", "model"]


def test_memory_of_saving_is_that_of_a_shard(tmp_path: Path) -> None:
    model = build("training", vocab_size=1000, hidden_size=240, num_layers=8)
    total = sum(value.nbytes for value in model.state_dict().values())
    largest = max(value.nbytes for value in model.state_dict().values())
    tracemalloc.start()
    try:
        save_pretrained(model, tmp_path / "model", max_shard_bytes=largest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * largest < total / 2


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    for form in FORMS:
        model = build(form, torch.bfloat16).cuda()
        save_pretrained(model, tmp_path / form)
        loaded = from_pretrained(tmp_path / form, "cuda")
        assert torch.equal(logits(loaded), logits(model))
        assert all(tensor.is_cuda for tensor in (*loaded.parameters(), *loaded.buffers()))
        on_cpu = from_pretrained(tmp_path / form)
        there, here = model.state_dict(), on_cpu.state_dict()
        assert all(torch.equal(value.cpu(), here[name]) for name, value in there.items())


@pytest.mark.gpu
def test_memory_of_loading_on_a_gpu(tmp_path: Path) -> None:
    model = build(
        "packed", torch.bfloat16, hidden_size=768, num_layers=12, intermediate_size=2048, vocab_size=32000
    )
    save_pretrained(model, tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = from_pretrained(tmp_path / "model", "cuda")
    assert isinstance(loaded, BitNetForCausalLM)
    # One layer more than the model: the packed form beside the prepacked one.
    assert torch.cuda.max_memory_allocated() - before < 1.25 * size


def test_int8_head_of_the_meta_device_is_loaded(tmp_path: Path) -> None:
    save_pretrained(build("packed-int8"), tmp_path / "model")
    head = from_pretrained(tmp_path / "model").lm_head
    assert isinstance(head, Int8Linear) and head.codes.dtype == torch.int8 and not head.codes.is_meta


def test_the_config_says_what_the_folder_is(tmp_path: Path) -> None:
    save_pretrained(build("packed-int8"), tmp_path / "model", about={"step": 7})
    content = pretrained.read_config(tmp_path / "model")
    assert (content["form"], content["head"], content["about"]) == ("packed", "int8", {"step": 7})
    assert content["model"] == config().to_dict()
    assert content["versions"]["torch"] == torch.__version__
