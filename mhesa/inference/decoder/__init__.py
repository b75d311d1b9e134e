"""Reading and writing at the speed of memory: packed weights, and the step that uses them."""

from mhesa.inference.decoder.decoder import Decoder

__all__ = ["Decoder"]
