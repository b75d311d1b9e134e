"""The operator on every backend and in other packages, against fp64 and against a copy of its input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.packages import installed, say
from benchmarks.timing import interleave
from mhesa.ops import BACKENDS, exponential_smoothing

# The largest relative error (root mean square) of a result whose time is printed.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# Steps of the short input that warms up the instruction cache.
WARMUP_STEPS = 64
# Tensors of x's size that are read or written: x and y; in the backward pass x, dy and dx as well.
ELEMENTS = {"forward": 2, "forward+backward": 5}

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape `(batch, length, heads, head_dim)` in one type, at fixed rates or those of every step."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    every_step: bool = False

    @property
    def shape_text(self) -> str:
        """The shape as `--shape` takes it.

        >>> Case((4, 1024, 8, 64), torch.float32).shape_text
        '4x1024x8x64'
        """
        return "x".join(map(str, self.shape))

    @property
    def narrow(self) -> bool:
        """Whether the type has 16 bits, which few other packages take."""
        return self.dtype.itemsize == 2


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Args:
        shape: `BxLxHxD`: batch, length, heads, head_dim.
        over_clone: time over that of `x.clone()` in the same rounds.
        error: the largest relative error (root mean square) of the result and its gradients, against fp64.
    """

    shape: str
    dtype: str
    operator: str
    timed: str
    milliseconds: float
    gigabytes_per_second: float
    over_clone: float
    error: float


SHAPES = [(4, 1024, 8, 64), (4, 4096, 8, 64), (1, 65536, 8, 64), (1, 1048576, 1, 8)]
EVERY_STEP_SHAPES = [(4, 4096, 32, 16), (1, 65536, 32, 16)]
DTYPES = [torch.float32, torch.bfloat16]


def bench_ops(
    cases: Iterable[Case],
    *,
    rounds: int = 15,
    device: str = "cpu",
    on_round: Callable[[], object] = lambda: None,
) -> Iterator[list[Row]]:
    """Time every operator on every case, with `x.clone()` in the same rounds.

    Every operator computes the smoothing and the skip term, and the gradients of x, alpha, decay and skip. It
    is timed only if its results are within `TOLERANCE` of fp64.

    Args:
        cases: shapes and types.
        rounds: number of times that each case is timed.
        device: a torch device.
        on_round: called `2 * (rounds + 1)` times for each case, for a progress bar.

    Yields:
        The rows of a case.
    """
    for case in cases:
        yield _rows(case, rounds, device, on_round)


def _rows(case: Case, rounds: int, device: str, on_round: Callable[[], object]) -> list[Row]:
    operands = inputs(case, device)
    dy = torch.randn_like(operands[0])
    few = [
        value.detach()[:1, :WARMUP_STEPS].clone().requires_grad_() if value.ndim > 2 else value
        for value in operands
    ]
    contestants = list(_contestants(case, device))
    # `chunked` shares no code with the native kernels and is fast enough in fp64 for a million steps.
    exact = [value.detach().double().requires_grad_() for value in operands]
    rows = []
    for timed in ELEMENTS:
        expected = prepare(with_backend("chunked"), timed, exact, dy.double())()
        things: dict[str, Callable[[], object]] = {"clone": operands[0].detach().clone}
        warmups: dict[str, Callable[[], object]] = {"clone": few[0].detach().clone}
        errors = {"clone": 0.0}
        for contestant in contestants:
            if timed == "forward" or contestant.differentiable:
                thing = prepare(contestant.operator, timed, operands, dy)
                worst = max(error(mine, right) for mine, right in zip(thing(), expected, strict=True))
                if worst <= TOLERANCE[case.dtype]:
                    things[contestant.name], errors[contestant.name] = thing, worst
                    warmups[contestant.name] = prepare(contestant.operator, timed, few, dy[:1, :WARMUP_STEPS])
                else:
                    say(f"{contestant.name}, {case.shape_text}, {timed}: not timed, its error is {worst:.0e}")
        seconds = interleave(things, rounds, on_round, device, warmups=warmups)
        rows += [_row(case, timed, name, seconds, errors[name]) for name in things]
    return rows


def _row(case: Case, timed: str, name: str, seconds: dict[str, float], error: float) -> Row:
    elements = math.prod(case.shape) * (2 if name == "clone" else ELEMENTS[timed])
    return Row(
        shape=case.shape_text,
        dtype=str(case.dtype).removeprefix("torch."),
        timed=timed,
        operator=name,
        milliseconds=1e3 * seconds[name],
        gigabytes_per_second=elements * case.dtype.itemsize / seconds[name] / 1e9,
        over_clone=seconds[name] / seconds["clone"],
        error=error,
    )


def inputs(case: Case, device: str) -> list[Tensor]:
    """x of the shape, alpha and decay `(heads,)` or `(batch, length, heads)`, skip `(heads, head_dim)`.

    The time constants are from 3 to 10,000 steps.
    """
    generator = torch.Generator().manual_seed(0)
    *steps, heads, head_dim = case.shape
    x = torch.randn(case.shape, generator=generator).to(case.dtype)
    alpha = torch.rand((*steps, heads) if case.every_step else (heads,), generator=generator)
    decay = 1 - torch.logspace(-0.5, -4, heads)
    if case.every_step:
        decay = decay ** (2 * torch.rand((*steps, heads), generator=generator))
    skip = torch.randn(heads, head_dim, generator=generator)
    return [value.to(device).requires_grad_() for value in (x, alpha, decay, skip)]


def error(found: Tensor, right: Tensor) -> float:
    """The root mean square of `found - right` over that of `right`, two tensors of one shape."""
    return ((found.double() - right).square().mean().sqrt() / right.square().mean().sqrt()).item()


@dataclass(frozen=True)
class Contestant:
    """An implementation of smoothing with a skip term.

    Args:
        name: name in the table.
        operator: takes x, alpha, decay and skip, and returns y of x's shape.
        differentiable: whether it has a backward pass.
    """

    name: str
    operator: Operator
    differentiable: bool = True


def prepare(
    operator: Operator, timed: str, operands: list[Tensor], dy: Tensor
) -> Callable[[], Sequence[Tensor]]:
    """A function that returns y, and with the backward pass the gradients of x and skip too."""

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [operator(*operands)]

    def both() -> Sequence[Tensor]:
        y = operator(*operands)
        dx, _, _, dskip = torch.autograd.grad(y, operands, dy)
        return [y.detach(), dx, dskip]

    return forward if timed == "forward" else both


def _contestants(case: Case, device: str) -> Iterator[Contestant]:
    for name, backend in BACKENDS.items():
        # `reference` is a Python loop: too slow for a million steps.
        if name != "reference" and backend.serves(torch.device(device), fixed_rates=not case.every_step):
            label = f"{name}, rates of every step" if case.every_step else name
            yield Contestant(label, with_backend(name))
    if case.every_step:
        return
    if not case.narrow and installed("gated_state_spaces_pytorch", "the original's FFT"):
        yield Contestant("the original's FFT", _original)
    if not case.narrow and device == "cpu" and installed("scipy", "scipy lfilter"):
        yield Contestant("scipy lfilter", _scipy, differentiable=False)
    if not case.narrow and installed("torchaudio", "torchaudio lfilter"):
        yield Contestant("torchaudio lfilter", _torchaudio)
    power_of_two = case.shape[1].bit_count() == 1
    if device.startswith("cuda") and power_of_two and installed("accelerated_scan", "accelerated-scan"):
        yield Contestant("accelerated-scan", _accelerated_scan)
    if device.startswith("cuda") and installed("fla", "flash-linear-attention"):
        yield Contestant("fla", _fla)


def with_backend(name: str | None) -> Operator:
    """`exponential_smoothing` on a backend; on the default one for `None`."""

    def smooth(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor) -> Tensor:
        return exponential_smoothing(x, alpha, decay, skip=skip, backend=name)

    return smooth


def _original(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor) -> Tensor:
    from gated_state_spaces_pytorch.mhesa import conv1d_fft

    powers = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    h: Tensor = conv1d_fft(x, alpha * decay ** powers[:, None], dim=-3, weight_dim=-2)
    return h + skip * x


def _scipy(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor) -> Tensor:
    from scipy.signal import lfilter

    values = x.numpy()
    heads = [
        lfilter(alpha[head : head + 1].numpy(), [1.0, -decay[head].item()], values[:, :, head], axis=1)
        for head in range(x.shape[2])
    ]
    return torch.stack([torch.from_numpy(head) for head in heads], dim=2).to(x.dtype) + skip * x


def _torchaudio(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor) -> Tensor:
    from torchaudio.functional import lfilter

    poles = torch.stack([torch.ones_like(decay), -decay], dim=1)
    gains = torch.stack([alpha, torch.zeros_like(alpha)], dim=1)
    waves = x.permute(0, 3, 2, 1)
    h: Tensor = lfilter(waves, poles, gains, clamp=False, batching=True)
    return h.permute(0, 3, 2, 1) + skip * x


def _accelerated_scan(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor) -> Tensor:
    from accelerated_scan.scalar import scan

    batch, length, heads, head_dim = x.shape
    values = (alpha[:, None] * x).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    gates = decay.repeat_interleave(head_dim)[:, None].expand(batch, -1, length).to(values.dtype)
    h: Tensor = scan(gates.contiguous(), values)
    return h.unflatten(1, (heads, head_dim)).permute(0, 3, 1, 2).to(x.dtype) + (skip * x).to(x.dtype)


def _fla(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor) -> Tensor:
    from fla.ops.hgrn import chunk_hgrn

    gates = decay.log().repeat_interleave(x.shape[3]).expand(*x.shape[:2], -1).contiguous()
    h: Tensor = chunk_hgrn((alpha[:, None] * x).flatten(2).contiguous(), gates)[0]
    return h.unflatten(2, x.shape[2:]).to(x.dtype) + (skip * x).to(x.dtype)
