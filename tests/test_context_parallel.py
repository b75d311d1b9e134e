"""Sequences over several processes, against one process."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from groups import process_group

from mhesa.errors import InputError
from mhesa.inference.parallel_decoder import ParallelDecoder
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops import context_parallel, exponential_smoothing
from mhesa.ops.context_parallel import ContextParallel, stretch
from mhesa.ops.convolution import causal_convolution

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
HEADS, HEAD_DIM, TAPS = 3, 4, 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with process_group(tmp_path_factory.mktemp("group")) as run:
        yield run


@dataclass(frozen=True)
class Case:
    """Smoothing and a convolution of some rows, each of them one sequence unless documents begin in it."""

    length: int = 37
    rows: int = 2
    documents: tuple[tuple[int, int], ...] | None = None  # the row and the first step of further ones
    steps: bool = False
    decays: tuple[float, float] = (0.9, 1.0)
    states: bool = True
    reverse: bool = False
    backend: str = "chunked"
    dtype: torch.dtype = torch.float64
    block: int = 4096

    def starts(self):
        """Whether a sequence begins at each step, `(rows, length)`."""
        starts = torch.zeros(self.rows, self.length, dtype=torch.bool)
        for row, step in [*((row, 0) for row in range(self.rows)), *(self.documents or ())]:
            starts[row, step] = True
        return starts

    def tensors(self):
        """Inputs of every step, of every sequence and shared ones, and weights of the results in a loss."""
        torch.manual_seed(0)
        steps, sequences = (self.rows, self.length), int(self.starts().sum())
        low, high = self.decays
        rates = {"alpha": torch.rand(*steps, HEADS), "decay": low + (high - low) * torch.rand(*steps, HEADS)}
        if self.decays == (0.9, 1.0):
            # Both ends of the range, exactly.
            rates["decay"].flatten()[::37] = 0.0
            rates["decay"].flatten()[1::7] = 1.0
        by_step = {"x": torch.randn(*steps, HEADS, HEAD_DIM), "dy": torch.randn(*steps, HEADS, HEAD_DIM)}
        by_sequence = {
            "initial": torch.randn(sequences, HEADS, HEAD_DIM),
            "dfinal": torch.randn(sequences, HEADS, HEAD_DIM),
            "tail": torch.randn(sequences, TAPS - 1, HEADS * HEAD_DIM),
            "dlast": torch.randn(sequences, TAPS - 1, HEADS * HEAD_DIM),
        }
        shared = {"skip": torch.randn(HEADS, HEAD_DIM), "taps": torch.randn(TAPS, HEADS * HEAD_DIM)}
        if self.steps:
            by_step |= rates
        else:
            shared |= {name: rate[0, 0] for name, rate in rates.items()}
        parts = by_step, by_sequence, shared
        return [{name: value.to(self.dtype) for name, value in part.items()} for part in parts]

    def compute(self, begin, end, group=None):
        """Results and gradients of the steps from `begin` to `end`, in three kinds as the tensors are."""
        by_step, by_sequence, shared = self.tensors()
        starts = self.starts()
        index = (starts.flatten().cumsum(0) - 1).view_as(starts)
        here = starts[:, begin:end].clone()
        here[:, :1] = True
        held = index[:, begin:end][here]
        # A sequence's results count where it ends.
        beyond = index[:, :begin] if self.reverse else index[:, end:]
        goes_on = torch.isin(held, beyond.flatten())
        by_step = {name: value[:, begin:end] for name, value in by_step.items()}
        by_sequence = {name: value[held] for name, value in by_sequence.items()}
        for name in ("dfinal", "dlast"):
            by_sequence[name][goes_on] = 0.0
        cu_seqlens, parallel = None, group and ContextParallel(group)
        if self.documents is not None:
            by_step = {name: value.flatten(0, 1)[None] for name, value in by_step.items()}
            cu_seqlens = torch.cat([here.flatten().nonzero()[:, 0], torch.tensor([here.numel()])])
            last = here.sum(1).cumsum(0) - 1
            first = last - here.sum(1) + 1
            parallel = group and ContextParallel(group, first, last, ~starts[:, begin])
        inputs = {**by_step, **by_sequence, **shared}
        inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        y, final = exponential_smoothing(
            *(inputs[name] for name in ("x", "alpha", "decay")),
            skip=inputs["skip"],
            initial_state=inputs["initial"] if self.states else None,
            cu_seqlens=cu_seqlens,
            reverse=self.reverse,
            return_final_state=True,
            backend=self.backend,
            context_parallel=parallel,
        )
        mixed, last = causal_convolution(
            inputs["x"].flatten(2),
            inputs["taps"],
            initial_state=inputs["tail"] if self.states else None,
            cu_seqlens=cu_seqlens,
            context_parallel=parallel,
        )
        if self.reverse:
            last = last * 0
        results = {"dy": y, "dfinal": final, "dlast": last}
        loss = sum((inputs[name] * result).sum() for name, result in results.items())
        (loss + (inputs["dy"].flatten(2) * mixed).sum()).backward()
        # The gradients of the weights `dy`, `dfinal` and `dlast` are the results themselves.
        found = [
            {name: inputs[name].grad for name in part if inputs[name].grad is not None}
            for part in (by_step, by_sequence, shared)
        ]
        found[0] = {
            name: value.view(self.rows, end - begin, *value.shape[2:]) for name, value in found[0].items()
        }
        return *found, held, goes_on


def in_process(group, case, cuts):
    context_parallel.BLOCK = case.block
    rank = dist.get_rank(group)
    return case.compute(cuts[rank], cuts[rank + 1], group)


def nothing_in_process(group, shape):
    rates = torch.full((2, shape[2]), 0.5)
    parallel = ContextParallel(group)
    y, final = exponential_smoothing(
        torch.ones(shape), *rates, return_final_state=True, backend="chunked", context_parallel=parallel
    )
    return y.shape, final.shape


@pytest.mark.parametrize("shape", [(0, 8, 2, 3), (2, 8, 0, 3)])
def test_no_sequences_and_no_heads(run, shape):
    batch, _, *rest = shape
    assert run(nothing_in_process, 2, shape) == [(shape, (batch, *rest))] * 2


def check(run, case, cuts):
    """Compare all that the processes between `cuts` compute with one process."""
    by_step, by_sequence, shared, _, _ = case.compute(0, case.length)
    found = run(in_process, len(cuts) - 1, case, cuts)
    tolerance = TOLERANCE[case.dtype]

    def assert_close(name, value, expected):
        scale = max(float(expected.abs().max()), 1.0)
        error = float((value - expected).abs().max()) if value.numel() else 0.0
        assert value.shape == expected.shape, name
        assert error <= tolerance * scale, (name, error, scale)

    for name, expected in by_step.items():
        assert_close(name, torch.cat([answer[0][name] for answer in found], dim=1), expected)
    for name, expected in by_sequence.items():
        total = torch.zeros_like(expected)
        for _, mine, _, held, goes_on in found:
            value = mine[name]
            if name in ("dfinal", "dlast"):
                value[goes_on] = 0.0
            total.index_add_(0, held, value)
        assert_close(name, total, expected)
    for name, expected in shared.items():
        assert_close(name, sum(answer[2][name] for answer in found), expected)


def even(length, processes):
    return [stretch(length, processes, rank).start for rank in range(processes)] + [length]


CASES = {
    "fixed": Case(),
    "steps": Case(steps=True),
    "no states": Case(steps=True, states=False),
    "reverse": Case(steps=True, reverse=True),
    "small blocks": Case(steps=True, block=3),
    "decays that die out": Case(steps=True, block=2, decays=(0.0, 1e-160), length=80),
    "decay 1": Case(decays=(1.0, 1.0), block=3),
    "decay 0": Case(decays=(0.0, 0.0)),
    "documents": Case(steps=True, documents=((0, 5), (0, 9), (0, 30), (1, 13)), block=3),
    "documents, fixed": Case(documents=((0, 9), (0, 10), (0, 18), (0, 27), (1, 36)), states=False),
    "few steps": Case(length=11, steps=True, documents=((1, 4),)),
    "fewer steps": Case(length=9, steps=True),
    "fp32": Case(dtype=torch.float32, steps=True, length=301, documents=((0, 100), (1, 7))),
    "fp32, fixed": Case(dtype=torch.float32, length=301),
}


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_processes_give_the_results_of_one(run, processes, name):
    case = CASES[name]
    check(run, case, even(case.length, processes))


@pytest.mark.parametrize("case", [Case(), Case(steps=True, documents=((0, 5), (1, 30)))])
def test_stretches_of_any_length(run, case):
    check(run, case, [0, 1, 30, 32, 37])


@pytest.mark.parametrize("steps", [False, True])
def test_on_numba(run, steps):
    case = Case(backend="numba", steps=steps, documents=((0, 5), (1, 30)) if steps else None)
    check(run, case, even(37, 2))


def tiny_model(dtype=torch.float64):
    torch.manual_seed(0)
    return GatedExponentialSmoothingLM(
        num_tokens=11, dim=8, depth=2, heads=2, dim_mhesa=12, adaptive=True, conv_size=4
    ).to(dtype)


def model_in_process(group, ids, labels, state, recompute=False):
    """The sum of the losses, the gradients and the final state of a stretch of `ids`."""
    model = tiny_model()
    model.recompute = recompute
    parallel, mine = None, slice(None)
    if group is not None:
        parallel = ContextParallel(group)
        mine = stretch(ids.shape[1], parallel.size, parallel.rank)
    loss, final = model(
        ids[:, mine], labels[:, mine], state=state, return_state=True, context_parallel=parallel
    )
    loss = loss * labels[:, mine].numel()
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters()}, final.detach()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_in_three_processes_gives_the_results_of_one(run, recompute):
    ids = torch.randint(11, (2, 26))
    state = torch.randn(2, 2, tiny_model().state_size, dtype=torch.float64)
    loss, gradients, final = model_in_process(None, ids[:, :-1], ids[:, 1:], state)
    found = run(model_in_process, 3, ids[:, :-1], ids[:, 1:], state, recompute)
    torch.testing.assert_close(sum(part[0] for part in found), loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(found[-1][2], final, rtol=1e-11, atol=1e-11)
    for name, expected in gradients.items():
        total = sum(part[1][name] for part in found)
        torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)


def bytes_sent(group, length):
    """The bytes that this process gives to collectives in a step of a model."""
    sent, original = [], dist.all_gather

    def count(gathered, tensor, group):
        sent.append(tensor.nbytes)
        return original(gathered, tensor, group)

    dist.all_gather = count
    try:
        model_in_process(group, *torch.randint(11, (2, 1, length)), None)
    finally:
        dist.all_gather = original
    return sum(sent)


def test_bytes_sent_do_not_grow_with_the_length(run):
    short, long = (run(bytes_sent, 2, length)[0] for length in (16, 4096))
    model = tiny_model()
    state, tail = 8 * model.dim_mhesa, 8 * (model.state_size - model.dim_mhesa)
    assert short == long <= 4 * len(model.layers) * (state + tail)


def bits_in_process(group, inputs, targets):
    decoder = ParallelDecoder(tiny_model().eval(), group)
    state = decoder.initial_state(1)
    # A window that divides among the processes, one that does not, and one that is too short.
    parts = [slice(0, 16), slice(16, 29), slice(29, 30)]
    return np.concatenate([decoder.surprisal(inputs[part], targets[part], state) for part in parts]), state


@pytest.mark.parametrize("processes", [2, 4])
def test_a_text_is_scored_by_all(run, processes):
    ids = torch.randint(11, (31,))
    with torch.no_grad():
        logits, state = tiny_model()(ids[None, :-1], return_state=True)
    expected = torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="none")
    for bits, final in run(bits_in_process, processes, ids[:-1], ids[1:]):
        np.testing.assert_allclose(bits, expected / math.log(2), rtol=1.3e-6, atol=1e-5)
        torch.testing.assert_close(final, state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        ((), {"cu_seqlens": torch.tensor([0, 4])}, "with cu_seqlens, context_parallel needs first, last"),
        (("first",), {}, "without cu_seqlens, context_parallel takes no first"),
        (
            ("first", "last", "continues"),
            {"cu_seqlens": torch.tensor([0, 4]), "reverse": True},
            "packed sequences over several processes cannot run in reverse",
        ),
    ],
)
def test_invalid_arguments_are_refused(names, arguments, message):
    parallel = ContextParallel(None, **dict.fromkeys(names, torch.tensor([0])))
    rates = torch.rand(2), torch.rand(2)
    with pytest.raises(InputError, match=message):
        exponential_smoothing(torch.rand(1, 4, 2, 3), *rates, context_parallel=parallel, **arguments)
