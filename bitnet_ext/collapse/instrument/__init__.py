"""The metrics themselves, checked on predictors whose health is known, before any of them is believed of a run.

``command``     ``bitnet-ext collapse instrument``
``check``       measures every predictor and judges every metric
``predictors``  word counts, human text, networks that are fresh or dead
``measuring``   the metrics of one predictor with their sampling errors
``scales``      how each metric is read, its attainable range and its source
``judging``     which metrics find a dead network better than a healthy predictor
``page``        table, figure and files of the check
"""

from __future__ import annotations

from bitnet_ext.collapse.instrument.check import InstrumentReport, instrument_check
from bitnet_ext.collapse.instrument.page import write_instrument

__all__ = ["InstrumentReport", "instrument_check", "write_instrument"]
