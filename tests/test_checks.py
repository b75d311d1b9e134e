"""What native code is given: wrong types, devices, layouts and bounds, copies, threads and forks.

Every test runs in a child process, so that a signal is a test that fails. A call has to end in an error of
one line that the house raises, or in the result that the same values have in ordinary tensors.
"""

import copy
import itertools
import os
import pickle
import random
import threading
import traceback
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from commands import FORKED
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mhesa import GatedExponentialSmoothingLM
from mhesa.errors import InputError
from mhesa.inference.decoder import Decoder
from mhesa.inference.sampling import BatchSampler, Sampling, TokenSampler
from mhesa.ops import exponential_smoothing, exponential_smoothing_step
from mhesa.ops.convolution import causal_convolution, causal_convolution_step
from mhesa.ops.dropout import dropout
from mhesa.ops.gelu import gelu

SECONDS = 300
TOKENS = 20


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(
        num_tokens=TOKENS, dim=8, depth=2, heads=2, dim_mhesa=8, adaptive=True, conv_size=3
    )
    return model.to(dtype).eval()


# Tensors that hold the same values in another way


class Subclass(torch.Tensor):
    pass


def with_gaps(tensor):
    wide = tensor.repeat_interleave(2, dim=-1) if tensor.ndim else tensor
    return wide[..., ::2]


def outside_in(tensor):
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def negated(tensor):
    return torch._neg_view(-tensor) if tensor.is_floating_point() else torch._neg_view(tensor.neg())


def imaginary(tensor):
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


SAME_VALUES = {
    "with gaps": with_gaps,
    "outside in": outside_in,
    "negated": negated,
    "imaginary part": imaginary,
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "with gradients": lambda tensor: tensor.clone().requires_grad_(),
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "sparse": lambda tensor: tensor.to_sparse(),
    "mkldnn": lambda tensor: tensor.to_mkldnn(),
    "nested": lambda tensor: torch.nested.nested_tensor(list(tensor)),
    "a list": lambda tensor: tensor.tolist(),
    "an array": lambda tensor: tensor.numpy(),
}
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn),
    *(torch.int8, torch.uint8, torch.int32, torch.uint16, torch.bool),
]


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def fake(tensor):
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


OTHER_VALUES = {
    "none": lambda tensor: None,
    "a number": lambda tensor: 1,
    "zero": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "freed": freed,
    "one more dimension": lambda tensor: tensor[None],
    "one dimension less": lambda tensor: tensor[0],
    "empty": lambda tensor: tensor[:0],
    "transposed": lambda tensor: tensor.mT if tensor.ndim > 1 else tensor[None],
    "negative": lambda tensor: -1 - tensor,
    "huge": lambda tensor: tensor * 10**9 + 10**9,
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "expanded": lambda tensor: tensor[..., :1].expand(tensor.shape),
    "one for all": lambda tensor: tensor[:1].expand(tensor.shape),
    "one for all in the middle": lambda tensor: tensor.mT[..., :1].expand(tensor.mT.shape).mT,
}
WITHOUT_VALUES = {"meta": lambda tensor: tensor.to("meta"), "fake": fake}


def variants(tensor):
    """Each way to hold a tensor's values differently or to hold others: its name, and what comes of it."""
    kinds = {f"to {dtype}": lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in DTYPES}
    for name, make in (SAME_VALUES | OTHER_VALUES | WITHOUT_VALUES | kinds).items():
        try:
            made = make(tensor)
        except (RuntimeError, TypeError, NotImplementedError, IndexError):
            continue  # there is no such tensor
        yield name, made
    for dimension, size in enumerate(tensor.shape):
        yield f"longer in {dimension}", torch.cat([tensor, tensor.narrow(dimension, 0, 1)], dim=dimension)
        yield f"shorter in {dimension}", tensor.narrow(dimension, 0, size - 1).clone()


def ordinary(value):
    """A contiguous tensor of the same values, `None` where there are none."""
    if type(value) in (torch.Tensor, torch.nn.Parameter, Subclass):
        if value.is_meta or value.is_quantized or value.is_nested or not all(value.shape):
            return None
        if value.layout is not torch.strided:
            return value.to_dense()
        if value.untyped_storage().nbytes() == 0 and not value._is_zerotensor():
            return None
        values = torch.empty(value.shape, dtype=value.dtype)
        return values.copy_(value.detach().as_subclass(torch.Tensor))
    return None


# The entries: a function of tensors by name, and arguments that suit it


def scan_arguments():
    x = torch.randn(2, 5, 2, 4)
    rates = {"alpha": torch.rand(2), "decay": torch.rand(2)}
    return {"x": x, **rates, "skip": torch.randn(2, 4), "initial_state": torch.randn(2, 2, 4)}


def packed_arguments():
    packed = {"x": torch.randn(1, 5, 2, 4), "alpha": torch.rand(1, 5, 2), "decay": torch.rand(2)}
    return packed | {"cu_seqlens": torch.tensor([0, 2, 5])}


def cotangents():
    return {"dy": torch.randn(2, 5, 2, 4), "dfinal": torch.randn(2, 2, 4)}


def scan(**arguments):
    return exponential_smoothing(**arguments, return_final_state=True)


def scan_of_numba(**arguments):
    return exponential_smoothing(**arguments, return_final_state=True, backend="numba")


def scan_gradients(dy, dfinal, **arguments):
    arguments = {name: value.requires_grad_() for name, value in arguments.items()}
    results = exponential_smoothing(**arguments, return_final_state=True)
    return torch.autograd.grad(results, list(arguments.values()), (dy, dfinal))


def gelu_gradients(dy):
    x, gate = torch.linspace(-2, 2, 15).view(3, 5).requires_grad_(), torch.ones(3, 5, requires_grad=True)
    return torch.autograd.grad(gelu(x, gate), (x, gate), dy)


def undropped(x):
    """What dropout scales, with the values that it dropped: `x`, whatever it drew."""
    y = dropout(x, 0.5)
    return torch.where(y == 0, x, y / 2)


def undropped_gradient(dy):
    x = torch.ones(3, 5, requires_grad=True)
    [dx] = torch.autograd.grad(dropout(x, 0.5), [x], dy)
    return torch.where(dx == 0, dy, dx / 2)


def operator(x, alpha, decay, skip=None, initial_state=None, cu_seqlens=None):
    return torch.ops.mhesa.numba_forward(x, alpha, decay, skip, initial_state, cu_seqlens, False)


def operator_gradients(dy, dfinal, x, alpha, decay, skip, initial_state):
    run = torch.ops.mhesa.numba_backward
    return run(dy, dfinal, x, alpha, decay, skip, initial_state, None, False)


def changing(method):
    """A decoder's method as a function of ids and state, which also returns the state."""

    def call(ids, state, **others):
        return torch.as_tensor(method(ids, state=state, **others)), state

    return call


def draw(logits):
    return torch.tensor(BatchSampler(TOKENS, [TokenSampler(seed=seed) for seed in range(3)]).draw(logits))


def observe(ids):
    sampler = TokenSampler(Sampling(temperature=0, repetition_penalty=2.0))
    batch = BatchSampler(TOKENS, [sampler])
    sampler.observe(ids)
    return torch.tensor(batch.draw(torch.ones(1, TOKENS)))


def scans():
    rates = scan_arguments() | {"alpha": torch.rand(2, 5, 2)}
    yield "scan", scan, scan_arguments()
    yield "scan of numba", scan_of_numba, scan_arguments()
    yield "scan at rates", scan, rates
    yield "packed scan", scan, packed_arguments()
    yield "gradients of a scan", scan_gradients, scan_arguments() | cotangents()


def operators():
    rates = scan_arguments() | {"alpha": torch.rand(2, 5, 2)}
    yield "operator", operator, rates
    yield "packed operator", operator, packed_arguments()
    yield "gradients by the operator", operator_gradients, scan_arguments() | cotangents()


def scan_steps():
    step = {"x": torch.randn(2, 2, 4), "alpha": torch.rand(2), "decay": torch.rand(2, 2)}
    yield "step", exponential_smoothing_step, step | {"state": torch.randn(2, 2, 4)}


def convolutions():
    convolution = {"x": torch.randn(2, 5, 4), "weight": torch.randn(3, 4)}
    yield "convolution", causal_convolution, convolution | {"initial_state": torch.randn(2, 2, 4)}
    packed = {"x": torch.randn(1, 5, 4), "weight": torch.randn(3, 4), "cu_seqlens": torch.tensor([0, 2, 5])}
    yield "packed convolution", causal_convolution, packed
    one = {"x": torch.randn(2, 4), "weight": torch.randn(3, 4), "state": torch.randn(2, 2, 4)}
    yield "convolution's step", causal_convolution_step, one


def gelus():
    yield "gelu", gelu, {"x": torch.randn(3, 5)}
    yield "gate", gelu, {"x": torch.randn(3, 5), "gate": torch.randn(3, 5)}
    yield "gradient of gelu", gelu_gradients, {"dy": torch.randn(3, 5)}


def dropouts():
    yield "dropout", undropped, {"x": torch.randn(3, 5)}
    yield "gradient of dropout", undropped_gradient, {"dy": torch.randn(3, 5)}


def decoders():
    for dtype in (torch.float32, torch.float64):
        decoder = Decoder(model_of(dtype), max_batch=3)
        state = torch.randn(*decoder.initial_state(3).shape, dtype=dtype)
        yield f"step in {dtype}", changing(decoder.step), {"ids": torch.tensor([3, 1, 4]), "state": state}
        ids = torch.randint(TOKENS, (3, 7))
        yield f"prefill in {dtype}", changing(decoder.prefill), {"ids": ids, "state": state}
        one = {"ids": ids[0], "state": state[:, :1].clone()}
        yield f"prediction in {dtype}", changing(decoder.predict), one
        surprisal = {**one, "ids": ids[0].clone(), "targets": torch.randint(TOKENS, (7,))}
        yield f"surprisal in {dtype}", changing(decoder.surprisal), surprisal


def samplers():
    yield "draw", draw, {"logits": torch.randn(3, TOKENS)}
    yield "observe", observe, {"ids": torch.tensor([3, 1, 4])}


ENTRIES = (scans, operators, scan_steps, convolutions, gelus, dropouts, decoders, samplers)


# Errors of the house; an id outside the vocabulary is an `IndexError`, a NaN a `FloatingPointError`.
HOUSE = (InputError, IndexError, FloatingPointError)
# PyTorch checks arguments of these, with errors of its own, as it has for fake tensors among others.
THROUGH_TORCH = (
    *(operator, operator_gradients, scan_gradients),
    *(gelu, gelu_gradients, undropped, undropped_gradient),
)


def outcome(function, arguments):
    """What a call returns; `None` for an error of the house."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(**arguments)
        except HOUSE as error:
            said = str(error)
        except Exception as error:
            if "storage" in str(error) and "\n" not in str(error):
                return None  # PyTorch has found that the memory was freed
            if function in THROUGH_TORCH or any(
                isinstance(value, FakeTensor) for value in arguments.values()
            ):
                return None
            raise
    assert said
    assert "\n" not in said, f"an error of several lines: {said}"
    return None


def check(function, arguments, name, value):
    """Replace an argument: an error of the house, or the result that an ordinary tensor has."""
    first, second = ({key: tensor.clone() for key, tensor in arguments.items()} for _ in range(2))
    expected = first[name] if isinstance(value, (list, np.ndarray)) else ordinary(value)
    got = outcome(function, first | {name: value})
    if got is None:
        return
    got = [got] if isinstance(got, torch.Tensor) else list(got)
    got = [tensor for tensor in got if isinstance(tensor, torch.Tensor)]
    if expected is None:
        real = [tensor for tensor in got if tensor.numel() and not (tensor.is_meta or tensor.is_quantized)]
        assert (
            not real
            or not isinstance(value, torch.Tensor)
            or isinstance(value, FakeTensor)
            or not value.numel()
        )
        return
    wanted = function(**second | {name: expected})
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    for one, other in zip(got, wanted, strict=True):
        one = one if one.layout is torch.strided else one.to_dense()
        torch.testing.assert_close(
            one.detach().resolve_neg().as_subclass(torch.Tensor), other.detach(), equal_nan=True
        )


def wrong_tensors(entries):
    for entry, function, arguments in entries():
        function(**arguments)
        ways = {name: list(variants(tensor)) for name, tensor in arguments.items()}
        if function is exponential_smoothing_step:
            # PyTorch's own operators, which crash where memory was freed.
            ways = {name: [way for way in ways[name] if way[0] != "freed"] for name in ways}
        for name in ways:
            for kind, value in ways[name]:
                yield f"{entry}: {name}, {kind}", partial(check, function, arguments, name, value)
        choice = random.Random(entry)
        for _ in range(20):
            first, second = (choice.choice(list(ways)) for _ in range(2))
            (kind, value), (other, another) = choice.choice(ways[first]), choice.choice(ways[second])
            both = arguments | {first: value, second: another}
            yield f"{entry}: {first}, {kind}; {second}, {other}", partial(outcome, function, both)


# Bounds, copies, other defaults


def refuses(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def bounds():
    samplers = BatchSampler(TOKENS, [TokenSampler(), TokenSampler()])
    logits = torch.zeros(3, TOKENS)
    refuses(lambda: samplers.draw(logits), "there are 2 rows to draw for, not 3 from 0 on")
    refuses(lambda: samplers.draw(logits[:2], 1), "there are 2 rows to draw for, not 2 from 1 on")
    refuses(lambda: samplers.draw(logits[:1], -1), "there are 2 rows to draw for, not 1 from -1 on")
    refuses(lambda: samplers.draw(logits.long()), r"logits must be numbers .*, not torch.int64 of \(3, 20\)")
    refuses(lambda: samplers.append(TokenSampler()), "there is room for 2 rows")
    refuses(lambda: BatchSampler(TOKENS, [TokenSampler()] * 2, max_rows=1), "there is room for 1 rows")
    refuses(lambda: BatchSampler(0, [TokenSampler()]), "num_tokens must be at least 1")
    for row in (-1, 2):
        refuses(lambda row=row: samplers.take_out(row), f"there is no row {row} among 2")
    for token in (-1, TOKENS, 10**30):
        refuses(lambda token=token: samplers.rows[0].count(token), f"token ids must be 0 to 19, not {token}")
    refuses(lambda: TokenSampler().count(-5), "token ids must be 0 to")
    assert samplers.draw(logits[:0]) == []
    decoder = Decoder(model_of(), max_batch=2)
    refuses(lambda: decoder.initial_state(-1), "batch must be 0 or more, not -1")
    for batch in (0, 3):
        ids, state = torch.zeros(batch, dtype=torch.int64), torch.zeros(2, batch, 24)
        refuses(lambda ids=ids, state=state: decoder.step(ids, state), "the decoder takes 1 to 2 sequences")


def models_without_weights():
    for part in ("whole", "layers"):
        model = model_of()
        (model if part == "whole" else model.layers).to("meta")
        refuses(lambda model=model: Decoder(model), "the model has no weights, it is on the meta device")


def odd_weights():
    ids = torch.tensor([3])
    expected = Decoder(model_of()).step(ids, torch.zeros(2, 1, 24))
    odd = model_of()
    for module in odd.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch._neg_view(-parameter.data), requires_grad=False))
    assert torch.equal(Decoder(odd).step(ids, torch.zeros(2, 1, 24)), expected)


def copies():
    sampler = TokenSampler(seed=1)
    for owner, message in (
        (Decoder(model_of()), "a decoder cannot be copied or pickled; make another"),
        (sampler, "a sampler cannot be copied or pickled; make another"),
        (BatchSampler(TOKENS, [sampler]), "samplers cannot be copied or pickled; make another"),
    ):
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            refuses(lambda make=make, owner=owner: make(owner), message)


def other_defaults():
    """PyTorch's default type and device are for the user's tensors, not for ours."""
    ids, x, weight = torch.tensor([3]), torch.randn(1, 300, 2, 4), torch.randn(3, 8)
    logits = torch.randn(1, TOKENS)

    def results():
        x_ = x.clone().requires_grad_()
        y = exponential_smoothing(x_, torch.full((2,), 0.5, device="cpu").float(), weight[0, :2].sigmoid())
        decoder = Decoder(model)
        state = decoder.initial_state(1)
        return [
            *(y.detach(), torch.autograd.grad(y.sum(), x_)[0], gelu(x), undropped(x)),
            decoder.prefill(ids[None], state),
            *(decoder.step(ids, state), decoder.predict(ids, state), state),
            causal_convolution(x.flatten(2), weight)[0],
            torch.tensor(BatchSampler(TOKENS, [TokenSampler(seed=1)]).draw(logits), device="cpu"),
        ]

    model = model_of()
    expected = results()
    for dtype, device in itertools.product((torch.float64, torch.bfloat16), ("meta", "cpu")):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            got = results()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
        assert all(map(torch.equal, got, expected))


# Threads and forks


def work(decoder, batch, logits):
    """Some decoding and drawing."""
    state, text = decoder.initial_state(1), []
    for _ in range(30):
        text.append(decoder.step(torch.tensor([len(text) % TOKENS]), state).argmax().item())
        text += batch.draw(logits)
    return text


def threads():
    decoder, logits = Decoder(model_of()), torch.randn(2, TOKENS)
    sampling = Sampling(temperature=0, frequency_penalty=0.1)
    shared = BatchSampler(TOKENS, [TokenSampler(sampling), TokenSampler(sampling)])
    one, *mine = [BatchSampler(TOKENS, [TokenSampler(sampling), TokenSampler(sampling)]) for _ in range(5)]
    expected = work(decoder, one, logits)
    found = {}

    def run(index):
        found[index] = work(decoder, mine[index], logits)
        for _ in range(50):
            shared.draw(logits)

    workers = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(found[index] == expected for index in range(4))
    # Every draw of the shared sampler was counted.
    counts = [sum(note.count for note in sampler._notes) for sampler in shared.rows]
    assert counts == [200, 200]


def forks():
    """A child has none of its parent's threads, one of which was in a step or a draw."""
    decoder, logits = Decoder(model_of()), torch.randn(1, TOKENS)
    batch = BatchSampler(TOKENS, [TokenSampler(Sampling(temperature=0))])
    torch.set_num_threads(2)
    expected = work(decoder, batch, logits)
    x, rates = torch.randn(1, 9000, 2, 8), torch.rand(2)
    y = exponential_smoothing(x, rates, rates)
    with decoder._lock, batch._lock:
        child = os.fork()
        if child == 0:
            same = work(decoder, batch, logits) == expected
            same = same and torch.equal(exponential_smoothing(x, rates, rates), y)
            os._exit(not same)
    _, status = os.waitpid(child, 0)
    assert status == 0
    torch.set_num_threads(1)
    assert work(decoder, batch, logits) == expected


OTHERS = (bounds, models_without_weights, odd_weights, copies, other_defaults, threads, forks)


def run_cases(cases, pipe):
    """Run cases in a process of its own: the names of all, sent one by one, each with what is wrong."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, case in cases():
        pipe.send((name, None))
        try:
            case()
        except BaseException:
            pipe.send((name, traceback.format_exc()))
    pipe.close()


def check_in_a_process(cases):
    """All cases must hold, and none may end the process."""
    receive, send = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=run_cases, args=(cases, send))
    process.start()
    send.close()
    wrong, last = [], None
    try:
        while receive.poll(SECONDS):
            last, what = receive.recv()
            if what:
                wrong.append(f"{last}\n{what}")
    except EOFError:
        process.join(SECONDS)
    process.kill()
    process.join()
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)
    assert process.exitcode == 0, f"ended with {process.exitcode} in: {last or 'the start'}"
    assert last is not None


@pytest.mark.parametrize("entries", ENTRIES, ids=lambda entries: entries.__name__)
def test_any_tensor_is_refused_or_read_by_its_values(entries):
    check_in_a_process(partial(wrong_tensors, entries))


def only(case):
    yield case.__name__, case


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.__name__)
def test_bounds_copies_defaults_threads_and_forks(case):
    check_in_a_process(partial(only, case))
