"""``bitnet-ext train`` and ``eval``: a run is begun, interrupted, resumed, tuned, evaluated; words speak of flags."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitnet_ext import cli, metrics
from bitnet_ext.data import load_corpus
from bitnet_ext.training import CheckpointError, TrainConfig, load_model, read_checkpoint

ROOT = Path(__file__).parent.parent
SMALL = ["--model", "collapse-64", "--batch-size", "2", "--seq-len", "16", "--device", "cpu"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITNET_EXT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    lines = (f"Line {n} of a small text about rivers, hills and the town of {n % 17}." for n in range(400))
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture
def run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "run"
    assert cli.main(["train", "--data", str(text), "--out", str(out), "--steps", "4", *SMALL]) == 0
    capsys.readouterr()
    return out


def state(run: Path) -> dict[str, object]:
    return read_checkpoint(run).state


def records(run: Path, kind: str) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bitnet_ext.cli", *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_a_run_tells_what_comes_next(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a run"
    words = ["--data", str(text), "--out", str(out), "--steps", "4", "--eval-interval", "2", *SMALL]
    assert cli.main(["train", *words]) == 0
    found = capsys.readouterr()
    assert f"bitnet-ext eval '{out}'" in found.out and f"bitnet-ext generate '{out}' " in found.out
    assert f"output    {out}" in found.err and "held-out loss" in found.err and "bits per byte" in found.err
    evals = records(out, "eval")
    assert [line["step"] for line in evals] == [2, 4]
    corpus = load_corpus(text)
    expected = metrics.evaluate(load_model(out), corpus.heldout, seq_len=16, tokenizer=corpus.tokenizer)
    assert evals[-1]["heldout_cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-6)
    assert evals[-1]["heldout_bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def test_ctrl_c_prints_the_command_that_goes_on(text: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["--data", str(text), "--steps", "40", "--log-interval", "1", "--lr", "2e-3", *SMALL]
    whole_run = subprocess.Popen(command("train", "--out", str(whole), *words), env=environment())
    process = subprocess.Popen(
        command("train", "--out", str(cut), *words), env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/40"):
            process.send_signal(signal.SIGINT)
            break
    error = process.stderr.read()
    assert process.wait() == 130
    last = error.splitlines()[-1]
    assert last.startswith("stopped after step ") and "Traceback" not in error
    continuation = last.split("To go on: ")[1]
    assert continuation == f"bitnet-ext train --resume {cut} --device cpu"
    step = read_checkpoint(cut).step
    assert 1 <= step < 40
    # No other flag is needed; the run becomes what an uninterrupted one is.
    again = subprocess.run(
        command(*continuation.split()[1:]), env=environment(), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert f"resumed   after step {step}" in again.stderr
    assert whole_run.wait() == 0
    assert records(cut, "train") == records(whole, "train")


def test_resume_forms(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = ["--device", "cpu"]
    for words in (
        ["--resume", str(run)],
        ["--resume", "--out", str(run)],
        ["--out", str(run), "--resume", str(run)],
    ):
        assert cli.main(["train", *words, *device]) == 0
        assert "the run is complete: 4 of 4 steps" in capsys.readouterr().out
    # Settings that do not change the run may be given, the run's own may be repeated.
    more = ["--checkpoint-seconds", "none", "--steps", "4", "--model", "collapse-64"]
    assert cli.main(["train", "--resume", str(run), *device, *more]) == 0
    capsys.readouterr()
    for words, message in (
        (["--resume", str(run), "--steps", "9"], f"--steps is 9, but the run in {run} has 4"),
        (
            ["--resume", str(run), "--model", "collapse-128"],
            "--model collapse-128 is not the network of the run",
        ),
        (["--resume", str(run), "--quantization", "none"], "--quantization is none, but the run in"),
        (
            ["--resume", str(run), "--model", "collapse-64", "--quantization", "none"],
            "--quantization is none, but the run in",
        ),
        (["--resume", str(run), "--document-masks"], "--document-masks is given, but the run in"),
        (["--resume", str(run), "--out", str(tmp_path)], "name two folders"),
        (["--resume", str(tmp_path / "nothing")], "holds no checkpoint to go on from"),
        (["--resume"], "--resume needs the folder of the run: --resume DIR"),
        (
            ["--resume", str(run), "--init-from", str(run)],
            "--init-from begins a run, --resume goes on with one",
        ),
        ([], "name the folder of the run with --out DIR"),
    ):
        assert cli.main(["train", *words, *device]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_an_existing_run_is_refused_in_flags(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--data", str(text), "--out", str(run), "--steps", "4", *SMALL]) == 2
    error = capsys.readouterr().err
    assert f"`bitnet-ext train --resume {run}`" in error and "resume=True" not in error


def test_init_from_begins_a_run_with_weights(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    words = ["--data", str(text), "--out", str(out), "--steps", "3", "--batch-size", "2", "--seq-len", "16"]
    tune = ["train", *words, "--device", "cpu", "--init-from", str(run), "--lr", "0"]
    assert cli.main(tune) == 0
    before, after = load_model(run), load_model(out)
    assert after.config == before.config  # no --model is needed
    assert torch.equal(after.embed_tokens.weight, before.embed_tokens.weight)
    assert state(out)["train_config"]["steps"] == 3 and read_checkpoint(out).step == 3  # type: ignore[index]
    capsys.readouterr()
    assert cli.main([*tune, "--out", str(tmp_path / "other"), "--model", "collapse-64"]) == 2
    assert "--model has no meaning with --init-from" in capsys.readouterr().err


def byte_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer.json whose ids are the bytes of a text."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    return folder


def test_an_exported_model_keeps_its_own_tokenizer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, run = byte_tokenizer(tmp_path / "bytes"), tmp_path / "run"
    words = ["--data", str(text), "--steps", "2", "--batch-size", "2", "--seq-len", "16", "--device", "cpu"]
    train = ["train", *words, "--model", "collapse-64", "--tokenizer", str(own), "--out", str(run)]
    assert cli.main(train) == 0
    own.rename(tmp_path / "elsewhere")
    found = []
    for name, more in (("run", None), ("packed", []), ("weights", ["--no-packed"])):
        path = tmp_path / name
        if more is not None:
            assert cli.main(["export", str(run), str(path), *more]) == 0
        capsys.readouterr()
        evaluate = ["eval", str(path), "--data", str(text), "--device", "cpu", "--json"]  # in rows as trained
        assert cli.main(evaluate) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2] and found[0]["seq_len"] == 16
    heldout = load_corpus(text, tokenizer=str(tmp_path / "elsewhere")).heldout
    assert found[0]["tokens"] == len(heldout) - 1
    assert cli.main(["collapse", "diagnose", str(run), "--data", str(text), "--device", "cpu"]) in (0, 1)
    # Fine-tuning takes the tokenizer over too, from a run as from an export.
    for name in ("run", "weights"):
        tuned = tmp_path / f"tuned-{name}"
        tune = ["train", *words, "--out", str(tuned), "--init-from", str(tmp_path / name), "--lr", "0"]
        assert cli.main(tune) == 0
        assert state(tuned)["source"]["tokenizer"] == state(run)["source"]["tokenizer"]  # type: ignore[index]
        before, after = load_model(run), load_model(tuned)
        assert after.config == before.config
        assert torch.equal(after.embed_tokens.weight, before.embed_tokens.weight)
    capsys.readouterr()
    tune = ["train", *words, "--out", str(tmp_path / "x"), "--init-from", str(tmp_path / "packed")]
    assert cli.main(tune) == 2
    error = capsys.readouterr().err
    assert "is a packed model, which has no weights to train" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "x").exists()
    assert cli.main(["train", "--resume", str(tmp_path / "weights")]) == 2
    assert "is an exported model, which is no run to go on with" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"is loaded by bitnet_ext\.formats"):
        read_checkpoint(tmp_path / "weights")


def test_document_masks_take_the_separator_of_the_tokenizer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masked"
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n}.txt").write_text(f"Text {n} tells of the river and of {n % 7} hills.\n")
    words = ["--steps", "2", "--eval-interval", "2", *SMALL, "--document-masks"]
    assert cli.main(["train", "--data", str(folder), "--out", str(out), *words]) == 0
    assert state(out)["train_config"]["document_separator"] == 50256  # type: ignore[index]
    assert cli.main(["train", "--resume", str(out), "--device", "cpu"]) == 0
    capsys.readouterr()
    # The command evaluates with the same masks as the run.
    assert cli.main(["eval", str(out), "--device", "cpu", "--json", "--tokens", "8192"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cross_entropy"] == pytest.approx(
        records(out, "eval")[-1]["heldout_cross_entropy"], rel=1e-5
    )


def test_eval(run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(run), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    corpus = load_corpus(text)
    expected = metrics.evaluate(load_model(run), corpus.heldout, seq_len=16, tokenizer=corpus.tokenizer)
    for name in ("cross_entropy", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["tokens"] == len(corpus.heldout) - 1
    assert 0 < found["unigram_cross_entropy"] < math.log(50257)
    assert cli.main(["eval", str(run), "--device", "cpu", "--seq-len", "8", "--no-pack"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "perplexity ",
        "bits per byte ",
        "word counts ",
        "up to 8 tokens",
        "text.txt, held-out part",
    ):
        assert words in printed
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Another text, number {n}, about {n % 5} mills." for n in range(300)))
    assert cli.main(["eval", str(run), "--data", str(other), "--device", "cpu"]) == 0
    assert "other.txt, held-out part" in capsys.readouterr().out
    text.write_text(text.read_text() + "\n\nOne line more.\n")
    for words, message in (
        ([str(tmp_path)], "holds no model"),
        ([str(run)], "has other tokens than before"),
        ([str(run), "--data", str(text), "--seq-len", "5000"], "seq_len must be 1..1024"),
        ([str(run), "--tokens", "-1"], "--tokens must be 0 or more"),
    ):
        assert cli.main(["eval", *words, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err


def test_export(run: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "handed on"
    assert cli.main(["export", str(run), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and f"bitnet-ext generate '{out}'" in printed
    texts = []
    for path in (run, out):
        assert cli.main(["generate", str(path), "The river", "--device", "cpu", "--max-new-tokens", "6"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    losses = []
    for path in (run, out):
        words = ["eval", str(path), "--data", str(text), "--device", "cpu", "--seq-len", "16", "--json"]
        assert cli.main(words) == 0
        losses.append(json.loads(capsys.readouterr().out)["cross_entropy"])
    assert losses[0] == losses[1]
    assert cli.main(["eval", str(out), "--device", "cpu"]) == 2
    assert "does not tell its text: name it with --data" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "nothing"), str(tmp_path / "x")]) == 2
    assert "holds no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be an integer >= 1, got 0"),
        (["--warmup-steps", "-1"], "--warmup-steps must be an integer >= 0 or none, got -1"),
        (["--seq-len", "5000"], "--seq-len must be at most the model's max_seq_len = 1024"),
        (["--decay-before-clip"], "--decay-before-clip must be False unless optimizer is one of"),
        (["--data", "nothing.txt"], "nothing.txt"),
    ],
)
def test_messages_speak_of_flags(
    words: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", "--data", str(text), "--out", str(out), *SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "fast"], "argument --lr: must be a number, got 'fast'"),
        (["--schedule-steps", "x"], "argument --schedule-steps: must be a whole number or none, got 'x'"),
        (["--precision", "fp8"], "invalid choice: 'fp8' (choose from"),
        (["--model", "gpt-5"], "invalid choice: 'gpt-5' (choose from"),
    ],
)
def test_what_argparse_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--out", "x", *words])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_warm_up_without_end_is_told(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(text), "--out", str(tmp_path / "run"), "--steps", "2", *SMALL]
    with pytest.warns(UserWarning, match="never reaches its peak"):
        assert cli.main(["train", *words, "--warmup-steps", "375"]) == 0


def _unwritable(kind: str) -> dict[str, object]:
    """Standard streams that cannot be written to."""
    read, gone = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    return {
        "stderr full": {"stdout": subprocess.DEVNULL, "stderr": full},
        "stdout full": {"stdout": full, "stderr": subprocess.DEVNULL},
        "pipes gone": {"stdout": gone, "stderr": gone},
    }[kind]  # type: ignore[return-value]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["stderr full", "stdout full", "pipes gone", "closed"])
def test_unwritable_streams_end_no_run(kind: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = command("train", "--data", str(text), "--out", str(out), "--steps", "2", *SMALL)
    if kind == "closed":
        line = " ".join(f"'{word}'" for word in words)
        status = subprocess.run(["sh", "-c", f"exec {line} >&- 2>&-"], env=environment()).returncode
    else:
        status = subprocess.run(words, env=environment(), **_unwritable(kind)).returncode  # type: ignore[call-overload]
    assert status == 0
    assert read_checkpoint(out).step == 2
    assert [line["step"] for line in records(out, "train")] == [1]  # and no other words in it


def test_every_field_of_the_configuration_has_words() -> None:
    import dataclasses

    documentation = " ".join((TrainConfig.__doc__ or "").split())
    for field in dataclasses.fields(TrainConfig):
        words = field.metadata["words"]
        assert len(words) >= 10 and words[0].islower() and not words.endswith(".")
        assert f"{field.name}: {' '.join(words.split())} (default" in documentation


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        if field.name != "document_separator":  # --document-masks
            assert f"--{field.name.replace('_', '-')}" in text
            assert " ".join(field.metadata["words"].split()[:4]) in text, field.name
    for title in ("data:", "model:", "optimiser:", "objective:", "evaluation:", "output:", "examples:"):
        assert title in text
