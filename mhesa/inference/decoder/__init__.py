"""Fast inference: packed weights, and a decoding step that reads them once."""

from mhesa.inference.decoder.decoder import Decoder

__all__ = ["Decoder"]
