"""Running a model: text generation from the training or the packed form."""

from bitnet_ext.inference.generate import generate

__all__ = ["generate"]
