"""Which kind of trouble one run shows, by which numbers and which rule, and what to change.

``command``    ``bitnet-ext collapse diagnose PATH``
``diagnosis``  applies every rule, the gravest finding first
``course``     rules about the training's course: diverged, frozen, over-confident, the unigram stage
``weights``    rules about decay that drives weights to zero, and about an output that became uniform
``ternary``    the rule about dead ternary layers
``words``      what findings are made of, and how rules read a course of numbers
``inputs``     reads what there is of a run: metrics file, settings, checkpoint
``sizes``      sizes of groups of parameters, at the initialisation and in a checkpoint
"""

from __future__ import annotations

from bitnet_ext.collapse.diagnose.diagnosis import NONE, UNKNOWN, Diagnosis, diagnose
from bitnet_ext.collapse.diagnose.inputs import read_case

__all__ = ["NONE", "UNKNOWN", "Diagnosis", "diagnose", "read_case"]
