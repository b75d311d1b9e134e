"""Reading and writing at the speed of memory: packed weights, and the step that uses them."""

from mhesa.decoding.decoder import Decoder

__all__ = ["Decoder"]
