"""What a study wrote, as data, and how its runs ended. Nothing here compares arms.

``records``   a study and its runs with their rows; what it planned
``files``     reads them from a folder, however far the runs got; writes the summary table
``settings``  the settings of the arms as flat text, and in what two arms differ
``status``    how a course of evaluations ended, by fixed rules whose thresholds stand there
"""

from __future__ import annotations

from bitnet_ext.collapse.results.files import (
    read_metrics,
    read_study,
    summary_rows,
    write_atomic,
    write_summary_csv,
)
from bitnet_ext.collapse.results.records import (
    Row,
    Run,
    Spread,
    Study,
    arm_settings,
    milestones,
    number,
    require_evaluations,
    spread,
)

__all__ = [
    "Row",
    "Run",
    "Spread",
    "Study",
    "arm_settings",
    "milestones",
    "number",
    "read_metrics",
    "read_study",
    "require_evaluations",
    "spread",
    "summary_rows",
    "write_atomic",
    "write_summary_csv",
]
