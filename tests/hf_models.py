"""Small models of the class for transformers, and ids that they read."""

import torch

from mhesa.hf import MhesaConfig, MhesaForCausalLM

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "heads": 4,
    "dim_mhesa": 24,
    "dim_expansion_factor": 2,
}
PLAIN_SIZES = {
    "num_tokens": 50,
    "dim": 16,
    "depth": 3,
    "heads": 4,
    "dim_mhesa": 24,
    "dim_expansion_factor": 2,
}


def make(seed=0, **fields):
    torch.manual_seed(seed)
    return MhesaForCausalLM(MhesaConfig(**{**SIZES, **fields})).eval()


def some_ids():
    """A batch of three rows of ids."""
    return torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(1))


LENGTHS = (7, 4, 0, 11)


def padded(side, seed=2):
    """Rows of `LENGTHS` real tokens among 11, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (len(LENGTHS), 11), generator=generator)
    mask = torch.zeros(len(LENGTHS), 11, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        if side == "scattered":
            mask[row, torch.randperm(11, generator=generator)[:length]] = 1
        else:
            mask[row, slice(11 - length, None) if side == "left" else slice(length)] = 1
    return ids, mask
