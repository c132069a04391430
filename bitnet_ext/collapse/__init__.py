"""The collapse laboratory: arms, studies, figures and the report.

``arms`` name what is compared, ``study`` runs it resumably, ``results`` reads it back, ``table``,
``figures`` and ``report`` show it; ``findings`` and ``contrasts`` put the curves into words by stated rules.
"""

from __future__ import annotations
