"""The settings of sampling, without torch: the command line shows them in `--help`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from mhesa.errors import InputError
from mhesa.settings import AT_LEAST_0, FINITE, POSITIVE, Doc, Range, check_ranges, documented


@documented
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    In this order: the repetition penalty, biases and the other penalties, the temperature, then what `top_k`,
    `top_p` and `min_p` leave, as transformers does. Sources: `top_p` is nucleus sampling
    (https://arxiv.org/abs/1904.09751), `min_p` https://arxiv.org/abs/2407.01082, the repetition penalty
    https://arxiv.org/abs/1909.05858.

    Raises:
        InputError: a setting out of range.
    """

    temperature: Annotated[
        float, Doc("Divides the logits; 0 always takes the likeliest token.", AT_LEAST_0)
    ] = 1.0
    top_k: Annotated[int, Doc("Draw from the K likeliest tokens; 0 is all.", AT_LEAST_0)] = 0
    top_p: Annotated[
        float,
        Doc(
            "Draw from the fewest likeliest tokens whose probabilities add up to P; 1 is all.",
            Range("above 0 and at most 1", lambda value: 0 < value <= 1),
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        Doc(
            "Draw from tokens at least P times as likely as the likeliest; 0 is all.",
            Range("0 to 1", lambda value: 0 <= value <= 1),
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Doc(
            "Above 1, tokens that the text already has become less likely: divides their positive logits and "
            "multiplies negative ones.",
            POSITIVE,
        ),
    ] = 1.0
    frequency_penalty: Annotated[
        float, Doc("Subtracted from a token's logit for every time that it was drawn.", FINITE)
    ] = 0.0
    presence_penalty: Annotated[
        float, Doc("Subtracted from the logits of tokens that were drawn before.", FINITE)
    ] = 0.0
    logit_bias: Annotated[Mapping[int, float], Doc("Added to the logits of these token ids.")] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for token, bias in self.logit_bias.items():
            if token < 0 or not math.isfinite(bias):
                raise InputError(f"logit_bias must be numbers for token ids, not {bias} for {token}")
