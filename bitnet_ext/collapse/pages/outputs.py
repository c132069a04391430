"""The pages of a study, whichever kind it is."""

from __future__ import annotations

from pathlib import Path

from bitnet_ext.collapse.pages.comparison import write_outputs
from bitnet_ext.collapse.pages.factorial import write_study_page
from bitnet_ext.collapse.results import read_study


def write_pages(study_dir: Path | str) -> dict[str, Path]:
    """Writes report, figures and tables into a study's folder, from what its runs have written so far.

    Returns:
        Their paths by name, `report` among them; a study with blocks has other files than a small comparison.

    Raises:
        ValueError: when the folder holds no study, no evaluation, or a damaged file.
    """
    if read_study(study_dir).is_factorial:
        return write_study_page(study_dir)
    return write_outputs(study_dir)
