"""What PyTorch can do with the fused operators: compile, export, map, differentiate."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from combinations import covering
from scans import STEPWISE
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mhesa.ops import exponential_smoothing, reference
from mhesa.ops.cpu import backend as cpu

RATES = pytest.mark.parametrize("rates", ["fixed", "both"])
VARYING = ("both", "alpha", "decay")


def arguments(
    rates: str = "fixed", *, batch: int = 2, length: int = 5, offsets: list[int] | None = None
) -> list[Any]:
    """`x, alpha, decay, skip, initial_state`, all requiring gradients."""
    batch, sequences = (batch, batch) if offsets is None else (1, len(offsets) - 1)
    shapes = dict.fromkeys(STEPWISE[rates], (batch, length, 2))
    tensors = [
        torch.randn(batch, length, 2, 3),
        torch.rand(shapes.get("alpha", (2,))) * 0.8 + 0.1,
        torch.rand(shapes.get("decay", (2,))) * 0.8 + 0.1,
        torch.randn(2, 3),
        torch.randn(sequences, 2, 3),
    ]
    return [tensor.double().requires_grad_() for tensor in tensors]


def run(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor, state: Tensor) -> Tensor:
    y, final = exponential_smoothing(
        x, alpha, decay, skip=skip, initial_state=state, return_final_state=True, backend="numba"
    )
    return torch.cat([y.flatten(), final.flatten()])


def energy(*tensors: Tensor) -> Tensor:
    return run(*tensors).pow(3).sum()


def true_energy(*tensors: Tensor) -> Tensor:
    return sum((output.pow(3).sum() for output in reference.scan(*tensors, None, False)), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("rates", "packed", "reverse", "optional"),
    [
        *covering(itertools.product(["fixed"], *[[False, True]] * 3)),
        ("both", False, False, True),
        ("both", True, True, False),
        ("alpha", True, False, True),
        ("decay", False, True, False),
    ],
)
def test_opcheck(rates: str, packed: bool, reverse: bool, optional: bool) -> None:
    offsets = [0, 2, 2, 5] if packed else None
    x, alpha, decay, skip, state = arguments(rates, offsets=offsets)
    rest = (skip, state) if optional else (None, None)
    inputs = (x, alpha, decay, *rest, None if offsets is None else torch.tensor(offsets), reverse)
    opcheck(torch.ops.mhesa.numba_forward.default, inputs)
    opcheck(torch.ops.mhesa.numba_backward.default, (torch.randn_like(x), torch.randn_like(state), *inputs))


@RATES
def test_derivatives_of_third_order(rates: str) -> None:
    tensors = [tensor.detach() for tensor in arguments(rates, length=3)]

    def third(function: Any) -> Tensor:
        def first(decay: Tensor) -> Tensor:
            value = lambda d: function(tensors[0], tensors[1], d, *tensors[3:])  # noqa: E731
            return torch.func.grad(value)(decay).pow(2).sum()

        return torch.func.grad(lambda d: torch.func.grad(first)(d).pow(2).sum())(tensors[2])

    torch.testing.assert_close(third(energy), third(true_energy))


@pytest.mark.parametrize(
    ("rates", "x", "alpha", "decay", "skip", "state"),
    [
        *covering(("fixed", *dims) for dims in list(itertools.product([None, 0, -1], repeat=5))[1:]),
        *((rates, 0, 0, 0, 0, 0) for rates in VARYING),
        *((rates, None, 0, None, -1, None) for rates in VARYING),
        *((rates, -1, None, 0, None, 0) for rates in VARYING),
        *((rates, 0, -1, -1, None, None) for rates in VARYING),
    ],
)
def test_vmap_over_any_arguments(
    rates: str, x: int | None, alpha: int | None, decay: int | None, skip: int | None, state: int | None
) -> None:
    in_dims = (x, alpha, decay, skip, state)
    tensors = [
        tensor.detach()
        if dim is None
        else torch.stack([tensor.detach() * (1 - 0.1 * i) for i in range(3)], dim)
        for tensor, dim in zip(arguments(rates), in_dims, strict=True)
    ]
    everything = (0, 1, 2, 3, 4)
    for ours, true in (
        (energy, true_energy),
        (torch.func.grad(energy, everything), torch.func.grad(true_energy, everything)),
    ):
        torch.testing.assert_close(torch.vmap(ours, in_dims)(*tensors), torch.vmap(true, in_dims)(*tensors))


def test_vmap_over_varying_rates_without_a_skip() -> None:
    x, alpha, decay, _, _ = (torch.stack([tensor.detach()] * 2) for tensor in arguments("both"))

    def loss(x: Tensor, alpha: Tensor, decay: Tensor) -> Tensor:
        return exponential_smoothing(x, alpha, decay, backend="numba").pow(2).sum()

    gradients = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(x, alpha, decay)
    alone = torch.func.grad(loss, (0, 1, 2))(x[0], alpha[0], decay[0])
    torch.testing.assert_close(tuple(gradient[1] for gradient in gradients), alone)


def test_vjp_and_per_sample_gradients() -> None:
    x, *rest = (tensor.detach() for tensor in arguments(batch=4))
    rest[-1] = rest[-1][:1]
    y, pull = torch.func.vjp(lambda x: run(x[:1], *rest), x)
    true = torch.func.vjp(
        lambda x: torch.cat([o.flatten() for o in reference.scan(x[:1], *rest, None, False)]), x
    )
    torch.testing.assert_close(y, true[0])
    torch.testing.assert_close(pull(y), true[1](y))


def test_mapping_over_offsets_is_refused() -> None:
    x, alpha, decay, *_ = (tensor.detach() for tensor in arguments(batch=1))
    offsets = torch.tensor([[0, 2, 5], [0, 1, 5]])
    with pytest.raises(ValueError, match="cu_seqlens cannot be mapped over"):
        torch.vmap(lambda c: cpu.scan(x, alpha, decay, None, None, c, False)[0])(offsets)


def test_forward_mode_is_refused() -> None:
    x, *rest = (tensor.detach() for tensor in arguments())
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: run(x, *rest), (x,), (x,))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="jvp"):
        run(forward_ad.make_dual(x, x), *rest)


@pytest.mark.parametrize("of", [1, 2], ids=["derivative", "second derivative"])
def test_forward_mode_has_a_backend_by_default(of: int) -> None:
    x, alpha, decay, *_ = (tensor.detach() for tensor in arguments())

    def loss(x: Tensor, backend: str | None) -> Tensor:
        return exponential_smoothing(x, alpha, decay, backend=backend).pow(3).sum()

    def product(backend: str | None) -> Tensor:
        function = partial(loss, backend=backend)
        return torch.func.jvp(function if of == 1 else torch.func.grad(function), (x,), (x,))[1]

    torch.testing.assert_close(product(None), product("reference"))


def test_direct_calls_reach_dispatch_modes() -> None:
    tensors = arguments()
    expected = run(*tensors)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = run(*tensors)
    assert torch.ops.mhesa.numba_forward.default in seen
    assert torch.equal(watched, expected)
    gradients = (torch.autograd.grad(y.sum(), tensors) for y in (watched, expected))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("backend", "rates"), [("inductor", "fixed"), *itertools.product(["aot_eager"], STEPWISE)]
)
def test_compile_whole_graph_dynamic(backend: str, rates: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, *rest: run(x * 2, *rest).relu(), backend=backend, fullgraph=True, dynamic=True
    )
    for batch, length in ((2, 4), (3, 7)):
        tensors = arguments(rates, batch=batch, length=length)
        y = compiled(*tensors)
        truth = run(tensors[0] * 2, *tensors[1:]).relu()
        # Compiled or not, the kernels are the same and run the same steps.
        assert torch.equal(y, truth)
        ours, true = (torch.autograd.grad(value.sum(), tensors) for value in (y, truth))
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-13)


def test_compiled_packing_checks_offsets_where_it_runs() -> None:
    torch._dynamo.reset()
    x, alpha, decay, *_ = (tensor.detach() for tensor in arguments(batch=1))
    scan = torch.compile(
        lambda offsets: exponential_smoothing(x, alpha, decay, cu_seqlens=offsets, backend="numba"),
        backend="aot_eager",
        fullgraph=True,
    )
    expected = exponential_smoothing(x, alpha, decay, cu_seqlens=torch.tensor([0, 2, 5]), backend="numba")
    torch.testing.assert_close(scan(torch.tensor([0, 2, 5])), expected)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the length 5"):
        scan(torch.tensor([0, 2, 500]))


@pytest.mark.parametrize("reverse", [False, True])
def test_packing_compiles_to_shapes_that_do_not_depend_on_it(reverse: bool) -> None:
    torch._dynamo.reset()
    x, alpha, decay, skip, _ = arguments(batch=1, length=7)
    state = torch.randn(4, *x.shape[2:], dtype=x.dtype, requires_grad=True)
    tensors = [x, alpha, decay, skip, state]

    def scan(x, alpha, decay, skip, state, offsets, backend):
        return exponential_smoothing(
            x,
            alpha,
            decay,
            skip=skip,
            initial_state=state,
            cu_seqlens=offsets,
            reverse=reverse,
            return_final_state=True,
            backend=backend,
        )

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    for offsets in ([0, 2, 5, 5, 7], [0, 0, 1, 7, 7]):
        found = compiled(*tensors, torch.tensor(offsets), "chunked")
        truth = scan(*tensors, torch.tensor(offsets), "reference")
        torch.testing.assert_close(found, truth)
        gradients = [torch.autograd.grad(y.sum() + 2 * final.sum(), tensors) for y, final in (found, truth)]
        torch.testing.assert_close(*gradients)
    without = compiled(*tensors[:4], None, torch.tensor(offsets), "chunked")
    torch.testing.assert_close(without, scan(*tensors[:4], None, torch.tensor(offsets), "reference"))


@RATES
def test_export(rates: str) -> None:
    class Scan(torch.nn.Module):
        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            return run(x, *rest)

    tensors = [tensor.detach() for tensor in arguments(rates)]
    length = torch.export.Dim("length", min=2, max=1 << 20)
    varying = {1: length} if rates == "both" else {}
    shapes = ({1: length}, (varying, varying, {}, {}))
    program = torch.export.export(Scan(), tuple(tensors), dynamic_shapes=shapes)
    assert torch.ops.mhesa.numba_forward.default in [node.target for node in program.graph.nodes]
    longer = [tensor.detach() for tensor in arguments(rates, length=9)]
    torch.testing.assert_close(program.module()(*longer), run(*longer))


def test_autocast_keeps_rates_in_full_precision() -> None:
    x, alpha, decay, skip, state = (tensor.detach().float() for tensor in arguments())
    with torch.autocast("cpu", torch.bfloat16):
        y, final = exponential_smoothing(
            x.bfloat16(),
            alpha,
            decay,
            skip=skip,
            initial_state=state,
            return_final_state=True,
            backend="numba",
        )
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(final, reference.scan(x.bfloat16(), alpha, decay, skip, state, None, False)[1])


@RATES
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, rates: str) -> None:
    tensors = arguments(rates)
    energy(*tensors).backward()
    expected = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    checkpoint(energy, *tensors, use_reentrant=reentrant).backward()
    torch.testing.assert_close([tensor.grad for tensor in tensors], expected)


@RATES
def test_only_the_final_state_or_only_the_output(rates: str) -> None:
    tensors = arguments(rates)
    for used in (0, 1):
        outputs = cpu.scan(*tensors, None, False)
        truths = reference.scan(*tensors, None, False)
        ours = torch.autograd.grad(outputs[used].sum(), tensors)
        true = torch.autograd.grad(truths[used].sum(), tensors, materialize_grads=True)
        torch.testing.assert_close(ours, true)


def test_inference_mode() -> None:
    tensors = [tensor.detach() for tensor in arguments()]
    with torch.inference_mode():
        torch.testing.assert_close(run(*tensors), run(*tensors))
