"""The original report's comparison table, with three columns that it lacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitnet_ext.collapse.pages.table import MISSING, Table, spread_cell
from bitnet_ext.collapse.results import Run, Study, milestones, require_evaluations, spread
from bitnet_ext.collapse.results.status import CONTEXT_NATS, EARLY, arm_status, find_fall, is_alive
from bitnet_ext.collapse.verdicts.wording import count, nats, unfinished_text


def recovery(run: Run) -> str | None:
    """The report's rule for one run: `yes`, `no`, or `no fall`; None without counts.

    A fall is an evaluation at which unique-of-20 is at most half of its initial value; a recovery is a
    later one at which it is at least half again.
    """
    if not any(row.get("unique_of_20") is not None for row in run.evals):
        return None
    fall = find_fall(run.evals)
    return "no fall" if fall is None else "no" if fall.rise_step is None else "yes"


def alive(study: Study, run: Run) -> str | None:
    """`yes` when held-out cross-entropy ends below the unigram's with mutual information above 0.1, else `no`.

    A run that is too short for a conclusion has `too early`.
    """
    if run.evals and arm_status(study, run.arm, run.evals) in EARLY:
        return "too early"
    verdict = is_alive(run.evals[-1]) if run.evals else None
    return None if verdict is None else "yes" if verdict else "no"


def _votes(answers: Sequence[str | None]) -> str:
    present = [answer for answer in answers if answer is not None]
    if not present:
        return MISSING
    kinds = sorted(set(present), key=lambda kind: (-present.count(kind), kind))
    if len(kinds) == 1:
        return kinds[0]
    return ", ".join(f"{kind} {present.count(kind)}/{len(present)}" for kind in kinds)


def _short(step: int) -> str:
    return f"{step // 1000}k" if step >= 1000 and step % 1000 == 0 else f"{step:,}"


def comparison_table(study: Study) -> Table:
    """The table of the original report with three columns that it lacked: held-out loss, alive, context use.

    Columns: Training; held-out cross-entropy, alive? and mutual information at the last evaluation, which decide
    and come first, so that a narrow screen shows them; Tokens and Loss at two steps (1k and 4k, or the nearest
    evaluated ones; the header names them); Recovery?. Over several seeds a cell is the mean with the smallest and
    largest value in brackets.

    Raises:
        ValueError: for a study without any evaluation.
    """
    require_evaluations(study)
    first, second = milestones(study)
    columns = [
        "Training",
        "Held-out CE",
        "Alive?",
        "Context use",
        f"Tokens @ {_short(first)}",
        f"Tokens @ {_short(second)}",
        f"Loss @ {_short(first)}",
        f"Loss @ {_short(second)}",
        "Recovery?",
    ]
    rows = []
    for arm in study.measured_arms:
        runs = study.leading(arm)

        def at(key: str, step: int, form: Callable[[float], str], runs: Sequence[Run] = tuple(runs)) -> str:
            cell = spread_cell(spread(run.value_at(key, step) for run in runs), form)
            nearest = runs[0].nearest(step)
            if nearest is not None and nearest["step"] != step and cell != MISSING:
                cell += f" @ {_short(int(nearest['step']))}"
            return cell

        rows.append(
            [
                arm,
                spread_cell(spread(run.final("heldout_cross_entropy") for run in runs), nats),
                _votes([alive(study, run) for run in runs]),
                spread_cell(spread(run.final("mutual_information") for run in runs), nats),
                at("unique_of_20", first, count),
                at("unique_of_20", second, count),
                at(_loss_key(runs), first, nats),
                at(_loss_key(runs), second, nats),
                _votes([recovery(run) for run in runs]),
            ]
        )
    return Table(columns, rows, _notes(study))


def _loss_key(runs: Sequence[Run]) -> str:
    plain = any(run.final("train_cross_entropy") is not None for run in runs)
    return "train_cross_entropy" if plain else "train_loss"


def _notes(study: Study) -> list[str]:
    notes = [
        "Tokens: distinct greedy predictions for 20 prompts of random token ids; 20 is the maximum.",
        "Loss: plain cross-entropy on the training batches since the evaluation before, in nats.",
        "Recovery?: tokens fell to half of the initial count or less, and later rose to at least half again.",
        "Held-out CE (nats) and context use (mutual information, nats) are those of the last evaluation.",
        "Alive?: held-out cross-entropy is below the unigram's"
        + (f" ({nats(study.unigram_cross_entropy)})" if study.unigram_cross_entropy is not None else "")
        + f" and mutual information is above {CONTEXT_NATS}.",
    ]
    if max(len(study.leading(arm)) for arm in study.measured_arms) > 1:
        notes.append("Cells: mean over seeds (smallest–largest).")  # noqa: RUF001
    else:
        notes.append("Each arm has one seed, so there is no spread.")
    unfinished = study.unfinished
    if unfinished:
        each = ", ".join(unfinished_text(*entry) for entry in unfinished)
        notes.append(f"Not finished: {each}.")
    return notes
