"""Models of random weights, as small as they can be."""

import torch

import mhesa
from mhesa import GatedExponentialSmoothingLM
from mhesa.tokenizers import Bytes


def tiny_model(num_tokens):
    torch.manual_seed(0)
    return GatedExponentialSmoothingLM(num_tokens=num_tokens, dim=16, depth=2, heads=2, dim_mhesa=8).eval()


def save_tiny_model(path):
    """A folder of a model of bytes."""
    tokenizer = Bytes()
    mhesa.save(tiny_model(len(tokenizer)), tokenizer, path)
    return path
