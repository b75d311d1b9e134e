"""A training step of the language model, against the original package's and against its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.packages import say
from benchmarks.timing import interleave
from mhesa.errors import InputError
from mhesa.model.lm import GatedExponentialSmoothingLM

# The largest relative differences from the original's loss and gradients at which a step is timed.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the batch."""

    num_tokens: int = 256
    dim: int = 384
    depth: int = 6
    heads: int = 8
    dim_mhesa: int = 512
    batch: int = 4
    length: int = 512

    @property
    def tokens(self) -> int:
        """Tokens that one step reads."""
        return self.batch * self.length

    def model(self) -> dict[str, Any]:
        """Keyword arguments of the model, the same in both packages."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in ("batch", "length")}


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Args:
        name: name of the package.
        times_the_original: speed over that of the original in fp32.
        over_the_products: time over that of the step's matrix products alone, in the same precision.
    """

    name: str
    precision: str
    milliseconds: float
    tokens_per_second: float
    times_the_original: float
    over_the_products: float | None


def bench_train(
    sizes: Sizes | None = None,
    *,
    rounds: int = 10,
    device: str = "cpu",
    on_round: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Time whole training steps: forward, loss, backward, AdamW.

    The bound is the step's matrix products alone, forward and backward, in the same precision and the same
    rounds. A step is timed only if its loss and gradients are the original's.

    Args:
        sizes: model and batch; 13 million parameters and 4 windows of 512 bytes if omitted.
        rounds: number of times that each is timed.
        device: a torch device.
        on_round: called `rounds + 1` times, for a progress bar.

    Raises:
        InputError: the original package is not installed.
    """
    try:
        from gated_state_spaces_pytorch import GatedExponentialSmoothingLM as Original
    except ImportError as error:
        raise InputError(
            "the comparison needs the original package: pip install gated-state-spaces-pytorch==0.1.0"
        ) from error
    sizes = sizes or Sizes()
    torch.manual_seed(0)
    ids = torch.randint(sizes.num_tokens, (sizes.batch, sizes.length + 1), device=device)
    original = Original(**sizes.model()).to(device)
    models = {"original": original}
    for precision in LOSS_TOLERANCE:
        models[precision] = GatedExponentialSmoothingLM(**sizes.model()).to(device)
        models[precision].load_state_dict(original.state_dict())
    expected = _loss_and_gradients(original, ids, "fp32")
    right = [p for p in LOSS_TOLERANCE if _agrees(_loss_and_gradients(models[p], ids, p), expected, p)]
    for precision in LOSS_TOLERANCE.keys() - right:
        say(f"mhesa {precision}: not timed, its loss or gradients are not the original's")

    steps: dict[str, Callable[[], object]] = {"original fp32": _step(original, ids, "fp32")}
    for precision in right:
        steps[f"mhesa {precision}"] = _step(models[precision], ids, precision)
        steps[f"products {precision}"] = _products(models[precision], sizes, precision)
    seconds = interleave(steps, rounds, on_round, device, enough=60)
    names = ["original fp32", *(f"mhesa {precision}" for precision in right)]
    return [_row(name, seconds, sizes) for name in names]


def _row(name: str, seconds: dict[str, float], sizes: Sizes) -> Row:
    package, precision = name.split()
    products = seconds.get(f"products {precision}")
    return Row(
        name=package,
        precision=precision,
        milliseconds=1e3 * seconds[name],
        tokens_per_second=sizes.tokens / seconds[name],
        times_the_original=seconds["original fp32"] / seconds[name],
        over_the_products=products and seconds[name] / products,
    )


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _loss(model: nn.Module, ids: Tensor, precision: str) -> Tensor:
    with _autocast(ids.device, precision):
        loss: Tensor = model(ids[:, :-1], labels=ids[:, 1:])
    return loss


def _loss_and_gradients(model: nn.Module, ids: Tensor, precision: str) -> list[Tensor]:
    loss = _loss(model, ids, precision)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def _agrees(found: list[Tensor], expected: list[Tensor], precision: str) -> bool:
    tolerances = [LOSS_TOLERANCE[precision], *[GRADIENT_TOLERANCE[precision]] * (len(expected) - 1)]
    return all(
        (mine - theirs).norm() <= tolerance * theirs.norm()
        for mine, theirs, tolerance in zip(found, expected, tolerances, strict=True)
        # Small gradients (of a gate) are sums whose terms can cancel, so their relative error says little.
        if theirs.numel() > 64 or theirs.ndim == 0
    )


def _step(model: nn.Module, ids: Tensor, precision: str) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        _loss(model, ids, precision).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _products(model: nn.Module, sizes: Sizes, precision: str) -> Callable[[], object]:
    """The step's matrix products alone: for each linear layer one forward and two backward."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    triples = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            device = layer.weight.device
            x = torch.randn(sizes.tokens, layer.in_features, dtype=dtype, device=device)
            dy = torch.randn(sizes.tokens, layer.out_features, dtype=dtype, device=device)
            triples.append((x, dy, layer.weight.detach().to(dtype)))

    def products() -> None:
        for x, _, weight in triples:
            x @ weight.T
        for x, dy, weight in reversed(triples):
            dy @ weight
            dy.T @ x

    return products
