"""``bitnet-ext collapse diagnose PATH``: which kind of trouble a run shows, and what to change."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from bitnet_ext.collapse.diagnose.diagnosis import NONE, UNKNOWN, Diagnosis, diagnose
from bitnet_ext.collapse.diagnose.inputs import Case, add_heldout, read_case
from bitnet_ext.collapse.diagnose.words import Evidence
from bitnet_ext.collapse.results.status import STATUS
from bitnet_ext.data.corpora import load_corpus
from bitnet_ext.data.tokenizer_files import tokenizer_from_record
from bitnet_ext.training.checkpoint import read_state
from bitnet_ext.training.device import resolve_device

EXIT_NONE, EXIT_TROUBLE, EXIT_USAGE = 0, 1, 2


def run(args: argparse.Namespace) -> int:
    """Diagnoses the run that `args` name, prints the findings; returns the exit status."""
    try:
        if args.eval_tokens < 1:
            raise ValueError(f"diagnose: --eval-tokens must be at least 1, got {args.eval_tokens}")
        case = read_case(args.path)
        if args.data is not None:
            _evaluate(case, args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    found = diagnose(case)
    status = EXIT_NONE if found.kind == NONE else EXIT_TROUBLE
    print(json.dumps(as_dict(found), indent=1, allow_nan=False) if args.json else as_text(found, case.kind))
    return status


def _evaluate(case: Case, args: argparse.Namespace) -> None:
    device = resolve_device(args.device)
    corpus = load_corpus(args.data, tokenizer=_tokenizer(case), progress=not args.json)
    if case.model is not None:
        corpus.check_vocab(case.model.vocab_size)
    add_heldout(case, corpus.train, corpus.heldout, max_tokens=args.eval_tokens, device=device)


def _tokenizer(case: Case) -> Any:
    """The tokenizer that the checkpoint tells; GPT-2's where it tells none."""
    source = None if case.checkpoint is None else read_state(case.checkpoint)["state"].get("source")
    record = source.get("tokenizer") if isinstance(source, dict) else None
    return tokenizer_from_record(record) if isinstance(record, dict) else "gpt2"


def as_dict(found: Diagnosis) -> dict[str, Any]:
    """A diagnosis as JSON values: its fields by name, and `kinds`, those of the findings (or none, unknown)."""
    kinds = [finding.kind for finding in found.findings] or [found.kind]
    return {"kinds": kinds} | dataclasses.asdict(found)


def as_text(found: Diagnosis, what: str) -> str:
    """A diagnosis for a reader at a terminal."""
    steps = f", {found.steps:,} steps" if found.steps is not None else ""
    lines = [f"{found.source} ({what}{steps})"]
    if found.status is not None:
        lines.append(f"state: {STATUS[found.status][0]}; {STATUS[found.status][1]}")
    if found.kind == NONE:
        lines.append("none: no rule found a trouble in what could be judged")
        lines += [f"    {_number(each)}" for each in found.healthy]
    if found.kind == UNKNOWN:
        lines.append("unknown: there is too little in it to judge")
    for number, finding in enumerate(found.findings, start=1):
        lines += [f"{number}. {finding.kind} ({finding.certainty}): {finding.headline}", "   numbers"]
        lines += [f"    {_number(each)}" for each in finding.evidence]
        lines += ["   change", *(f"    {each}" for each in finding.change)]
        lines.append(f"   rule: {finding.rule}")
    lines += [f"not judged: {each}" for each in found.not_judged]
    lines += [f"note: {each}" for each in found.notes]
    return "\n".join(lines)


def _number(each: Evidence) -> str:
    value = "" if each.value is None else f" {each.value:.4g}"
    step = "" if each.step is None else f" at step {each.step:,}"
    return f"{each.name}{value}{step}" + (f" ({each.text})" if each.text else "")
