"""Tools to check and time the operators, for the project's own tests and benchmarks and for a user's."""

from bitnet_ext.testing.bench import (
    Timing,
    environment,
    format_table,
    measure_ceiling,
    paired_ratio,
    rotation_count,
    time_interleaved,
    write_json,
)

__all__ = [
    "Timing",
    "environment",
    "format_table",
    "measure_ceiling",
    "paired_ratio",
    "rotation_count",
    "time_interleaved",
    "write_json",
]
