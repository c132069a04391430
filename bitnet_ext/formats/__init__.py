"""Models on disk: folders to hand on (safetensors), and one door to these and to training checkpoints.

``bitnet_ext.formats.transformers`` (imported by itself, an extra) has models of transformers.
"""

from bitnet_ext.formats.errors import FormatError
from bitnet_ext.formats.load import LoadedModel, export, load_model
from bitnet_ext.formats.pretrained import from_pretrained, save_pretrained

__all__ = ["FormatError", "LoadedModel", "export", "from_pretrained", "load_model", "save_pretrained"]
