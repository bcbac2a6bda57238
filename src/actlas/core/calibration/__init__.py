"""The calibration pass: one reading of a corpus feeds every method.

    calibration = calibrate(model, corpus, "blocks.*.mlp.act", ("moments", "absmax", "quantiles"))
    calibration["blocks.5.mlp.act"].absmax
    calibration.save("act/")

Statistics are streaming and mergeable (`accumulators`), massive-activation rows are reported instead
of averaged in (`massive`), and a calibration is saved with the model's fingerprint (`result`).
"""

from actlas.core.calibration.collect import calibrate
from actlas.core.calibration.massive import MassiveRow, MassiveRows, massive_rows
from actlas.core.calibration.result import Calibration
from actlas.core.calibration.statistics import DEFAULT_STATISTICS, STATISTICS, SiteStatistics

__all__ = [
    "DEFAULT_STATISTICS",
    "STATISTICS",
    "Calibration",
    "MassiveRow",
    "MassiveRows",
    "SiteStatistics",
    "calibrate",
    "massive_rows",
]
