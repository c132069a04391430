"""The ``bitnet-ext`` command.

``program``   reads the command's name, runs its module, turns errors into one line and an exit status
``options``   options that several commands share, and those of TrainConfig
``output``    standard output and error that may not be writable
``checkpoint``  the settings and the text of the run that a path means

One module for each command: ``info``, ``train``, ``eval``, ``generate``, ``export``, ``collapse``. Each has
``add_arguments`` and ``run``; none imports torch before ``run``.
"""

from __future__ import annotations

from bitnet_ext.cli.program import main

__all__ = ["main"]
