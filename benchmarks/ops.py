"""The operator on every backend and in other packages, against fp64 and against copying its input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.timing import interleave
from mhesa.ops import BACKENDS, exponential_smoothing

# The root mean square of an error over that of the right result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# Steps of a rehearsal.
REHEARSED = 64
# Traffic in elements, by what is timed: read x and write y; then read x and dy, write dx.
ELEMENTS = {"forward": 2, "forward+backward": 5}

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape `(batch, length, heads, head_dim)` in one type."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """Shape and type as a line of a table shows them."""
        return f"{' x '.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    shape: tuple[int, int, int, int]
    dtype: str
    operator: str
    timed: str
    milliseconds: float
    gigabytes_per_second: float
    over_clone: float
    error: float


SHAPES = [(4, 1024, 8, 64), (4, 4096, 8, 64), (1, 65536, 8, 64), (1, 1048576, 1, 8)]
DTYPES = [torch.float32, torch.bfloat16]


def bench_ops(
    cases: Iterable[Case],
    *,
    rounds: int = 15,
    device: str = "cpu",
    on_round: Callable[[], object] = lambda: None,
) -> Iterator[list[Row]]:
    """Time every operator on every case, with `x.clone()` in the same turns.

    Every operator computes smoothing and skip term, and the gradients of x, alpha, decay and skip. It is
    timed only if its results are within `TOLERANCE` of fp64.

    Args:
        cases: shapes and types.
        rounds: how often each is timed.
        device: a torch device.
        on_round: called `2 * (rounds + 1)` times a case, for a progress bar.

    Yields:
        The rows of a case.
    """
    for case in cases:
        yield _rows(case, rounds, device, on_round)


def _rows(case: Case, rounds: int, device: str, on_round: Callable[[], object]) -> list[Row]:
    operands = inputs(case, device)
    dy = torch.randn_like(operands[0])
    few = [operands[0].detach()[:1, :REHEARSED].clone().requires_grad_(), *operands[1:]]
    contestants = list(_contestants(case, device))
    # A different program from those in a hurry, and fast enough in fp64 for a million steps.
    exact = [value.detach().double().requires_grad_() for value in operands]
    rows = []
    for timed in ELEMENTS:
        expected = prepare(with_backend("chunked"), timed, exact, dy.double())()
        things: dict[str, Callable[[], object]] = {"clone": operands[0].detach().clone}
        rehearsals: dict[str, Callable[[], object]] = {"clone": few[0].detach().clone}
        errors = {"clone": 0.0}
        for contestant in contestants:
            if timed == "forward" or contestant.differentiable:
                thing = prepare(contestant.operator, timed, operands, dy)
                worst = max(error(mine, right) for mine, right in zip(thing(), expected, strict=True))
                if worst <= TOLERANCE[case.dtype]:
                    things[contestant.name], errors[contestant.name] = thing, worst
                    rehearsals[contestant.name] = prepare(contestant.operator, timed, few, dy[:1, :REHEARSED])
        seconds = interleave(things, rounds, on_round, device, rehearsals=rehearsals)
        rows += [_row(case, timed, name, seconds, errors[name]) for name in things]
    return rows


def _row(case: Case, timed: str, name: str, seconds: dict[str, float], error: float) -> Row:
    elements = math.prod(case.shape) * (2 if name == "clone" else ELEMENTS[timed])
    return Row(
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        timed=timed,
        operator=name,
        milliseconds=1e3 * seconds[name],
        gigabytes_per_second=elements * case.dtype.itemsize / seconds[name] / 1e9,
        over_clone=seconds[name] / seconds["clone"],
        error=error,
    )


def inputs(case: Case, device: str) -> list[Tensor]:
    """x, alpha, decay and skip, with memories from a few steps to thousands."""
    generator = torch.Generator().manual_seed(0)
    _, _, heads, head_dim = case.shape
    x = torch.randn(case.shape, generator=generator).to(case.dtype)
    alpha = torch.rand(heads, generator=generator)
    decay = 1 - torch.logspace(-0.5, -4, heads)
    skip = torch.randn(heads, head_dim, generator=generator)
    return [value.to(device).requires_grad_() for value in (x, alpha, decay, skip)]


def error(found: Tensor, right: Tensor) -> float:
    """The root mean square of the error over that of the right result."""
    return ((found.double() - right).square().mean().sqrt() / right.square().mean().sqrt()).item()


@dataclass(frozen=True)
class Contestant:
    """An implementation of smoothing with a skip term."""

    name: str
    operator: Operator
    differentiable: bool = True


def prepare(
    operator: Operator, timed: str, operands: list[Tensor], dy: Tensor
) -> Callable[[], Sequence[Tensor]]:
    """What to call: it gives y, and with the backward pass the gradients of x and skip too."""

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
        # A Python loop over a million steps is a definition, not a contestant.
        if name != "reference" and backend.serves(torch.device(device)):
            yield Contestant(name, with_backend(name))
    narrow = case.dtype in (torch.bfloat16, torch.float16)
    if find_spec("gated_state_spaces_pytorch") and not narrow:
        yield Contestant("the original's FFT", _original)
    if find_spec("scipy") and device == "cpu" and not narrow:
        yield Contestant("scipy lfilter", _scipy, differentiable=False)
    if find_spec("torchaudio") and not narrow:
        yield Contestant("torchaudio lfilter", _torchaudio)
    power_of_two = case.shape[1] & (case.shape[1] - 1) == 0
    if find_spec("accelerated_scan") and device == "cuda" and power_of_two:
        yield Contestant("accelerated-scan", _accelerated_scan)
    if find_spec("fla") and device == "cuda":
        yield Contestant("fla", _fla)


def with_backend(name: str | None) -> Operator:
    """Smoothing on a backend, the default one for `None`."""

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
