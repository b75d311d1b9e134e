"""Decoding and prefill, against a read of the weights, matrix products, and other models of the size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bandwidth import readers
from benchmarks.packages import installed, say
from benchmarks.timing import interleave
from mhesa.inference.decoder import Decoder
from mhesa.inference.generation import stream
from mhesa.inference.sampling import Sampling
from mhesa.model.lm import GatedExponentialSmoothingLM

# The largest difference from fp64 logits, which are of size 1, at which a precision is timed.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "int8": 5e-2}
BATCHES = (1, 8, 64, 128)
CONTEXTS = (1_000, 32_000, 1_000_000)
# Steps that are timed together; tokens of a prompt; tokens to generate, and those of the slow original.
STEPS, PROMPT, NEW, ORIGINAL_NEW = 16, 2048, 32, 2
# Seconds until torch's threads sleep: between the steps of a text there is nothing for them to do.
SETTLE = 0.02
# Tokens that were read before the steps whose times are compared.
NEAR, FAR = 1_000, 1_000_000


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model to decode with."""

    dim: int
    depth: int
    dim_mhesa: int
    num_tokens: int = 256
    heads: int = 8

    def model(self) -> GatedExponentialSmoothingLM:
        """A model with random weights."""
        torch.manual_seed(0)
        return GatedExponentialSmoothingLM(**asdict(self)).eval()


SMALL = Sizes(dim=128, depth=4, dim_mhesa=256)
MEDIUM = Sizes(dim=384, depth=6, dim_mhesa=512)


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        parameters: number of parameters of the model.
        name: what was timed.
        batch: number of sequences at once.
        mark: what its speed is compared with.
        ratio: speed over that of the mark; above 1 it is faster.
    """

    parameters: int
    name: str
    precision: str
    batch: int
    tokens_per_second: float
    mark: str
    ratio: float


@dataclass(frozen=True)
class Memory:
    """Bytes that a session of a model holds after `context` tokens."""

    name: str
    context: int
    bytes: int


def bench_decode(*, rounds: int = 10, on_round: Callable[[], object] = lambda: None) -> Iterator[list[Row]]:
    """Time decoding on CPU.

    A precision is timed only if its logits are those of fp64 within `TOLERANCE`.

    Args:
        rounds: how many rounds count.
        on_round: called `rounds + 1` times for each of `GROUPS` groups.

    Yields:
        The figures of each group that was timed together.
    """
    for sizes in (SMALL, MEDIUM):
        model = sizes.model()
        yield bench_steps(model, rounds=rounds, on_round=on_round)
        yield _prefill(model, rounds, on_round)
    yield _position(SMALL.model(), rounds, on_round)
    yield _others(MEDIUM.model(), rounds, on_round)


GROUPS = 6


def memory() -> list[Memory]:
    """The size of a session of this model and, where transformers is installed, of GPT-2 and Mamba."""
    sizes = {"mhesa": (MEDIUM.model().initial_state(1).nbytes, 0)}
    if installed("transformers", "GPT-2 and Mamba"):
        cache = _mamba()(torch.zeros(1, 8, dtype=torch.int64), use_cache=True).cache_params
        config = _gpt2().config
        sizes["Mamba"] = (sum(_bytes(vars(layer)) for layer in cache.layers), 0)
        sizes["GPT-2, KV cache"] = (0, 2 * config.n_layer * config.n_embd * 4)
    return [
        Memory(name, context, fixed + per_token * context)
        for name, (fixed, per_token) in sizes.items()
        for context in CONTEXTS
    ]


def _bytes(values: dict[Any, Any]) -> int:
    """The size of all tensors in a dictionary and in the dictionaries in it."""
    parts = [value.values() if isinstance(value, dict) else [value] for value in values.values()]
    return sum(value.nbytes for part in parts for value in part if isinstance(value, Tensor))


def bench_steps(
    model: GatedExponentialSmoothingLM, *, rounds: int, on_round: Callable[[], object] = lambda: None
) -> list[Row]:
    """Time steps at each size of batch, over a read of the weights or over the matrix products alone."""
    # Rows of the embedding are looked up; it is not read as a whole.
    weights = _parameters(model) - model.token_emb.weight.numel()
    things: dict[str, Callable[[], object]] = {}
    # For each precision and batch the things of which the fastest is its mark.
    marks: dict[tuple[str, int], list[str]] = {}
    for precision, (decoder, size) in _decoders(model).items():
        reads = {f"read {precision}, {by}": _repeated(read) for by, read in readers(weights * size).items()}
        things |= reads
        for batch in BATCHES:
            things[f"{precision} {batch}"] = _stepping(decoder, batch)
            marks[precision, batch] = list(reads)
            if batch > 1 and precision != "int8":
                products = f"products {precision}, {batch}"
                things[products] = _products(model, precision, batch)
                marks[precision, batch] = [products]
    seconds = interleave(things, rounds, on_round, settle=SETTLE)
    rows = []
    for (precision, batch), names in marks.items():
        mark, taken = min(names, key=seconds.__getitem__), seconds[f"{precision} {batch}"]
        rate = batch * STEPS / taken
        rows.append(Row(_parameters(model), "step", precision, batch, rate, mark, seconds[mark] / taken))
    return rows


def _parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _repeated(once: Callable[[], object]) -> Callable[[], object]:
    """The function, called as many times as steps are timed together."""
    return lambda: [once() for _ in range(STEPS)]


def _decoders(model: GatedExponentialSmoothingLM) -> dict[str, tuple[Decoder, int]]:
    """A decoder for each precision whose logits are right, with the bytes of one weight."""
    ids = torch.randint(model.token_emb.num_embeddings, (1, 64))
    plain = model.double()
    with torch.no_grad():
        expected = plain(ids)[:, -1]
    model.float()
    half = copy.deepcopy(model).bfloat16()
    made = {
        "fp32": (Decoder(model, max_batch=max(BATCHES)), 4),
        "bf16": (Decoder(half, max_batch=max(BATCHES)), 2),
        "int8": (Decoder(model, max_batch=max(BATCHES), quantize="int8"), 1),
    }
    errors = {precision: _error(decoder, ids, expected) for precision, (decoder, _) in made.items()}
    for precision, error in errors.items():
        if error > TOLERANCE[precision]:
            say(f"{precision}: not timed, its logits are off by {error:.0e}")
    return {name: decoder for name, decoder in made.items() if errors[name] <= TOLERANCE[name]}


def _error(decoder: Decoder, ids: Tensor, expected: Tensor) -> float:
    return (decoder.prefill(ids, decoder.initial_state(1)) - expected).abs().max().item()


def _stepping(decoder: Decoder, batch: int) -> Callable[[], object]:
    state, ids = decoder.initial_state(batch), torch.zeros(batch, dtype=torch.int64)

    def steps() -> None:
        for _ in range(STEPS):
            decoder.step(ids, state)

    return steps


def _products(model: GatedExponentialSmoothingLM, precision: str, batch: int) -> Callable[[], object]:
    """The matrix products of as many steps in the same precision, by torch."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    matrices = [
        module.weight.detach().to(dtype) for module in model.modules() if isinstance(module, nn.Linear)
    ]
    inputs = [torch.randn(batch, matrix.shape[1], dtype=dtype) for matrix in matrices]

    @torch.inference_mode()
    def multiply() -> None:
        for _ in range(STEPS):
            for matrix, x in zip(matrices, inputs, strict=True):
                F.linear(x, matrix)

    return multiply


def _prefill(model: GatedExponentialSmoothingLM, rounds: int, on_round: Callable[[], object]) -> list[Row]:
    """A long prompt, over training's forward pass on as many tokens."""
    ids = torch.randint(model.token_emb.num_embeddings, (1, PROMPT))
    windows = ids.view(-1, 512)

    def forward(autocast: bool) -> Callable[[], object]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(windows)

        return run

    def prefill(decoder: Decoder) -> Callable[[], object]:
        return lambda: decoder.prefill(ids, decoder.initial_state(1))

    decoders = _decoders(model)
    things = {"forward fp32": forward(False), "forward bf16": forward(True)}
    things |= {precision: prefill(decoder) for precision, (decoder, _) in decoders.items()}
    seconds = interleave(things, rounds, on_round, settle=SETTLE)
    marks = {"fp32": "forward fp32", "bf16": "forward bf16", "int8": "forward fp32"}
    return [
        Row(
            parameters=_parameters(model),
            name="prefill",
            precision=precision,
            batch=1,
            tokens_per_second=PROMPT / seconds[precision],
            mark=marks[precision],
            ratio=seconds[marks[precision]] / seconds[precision],
        )
        for precision in decoders
    ]


def _position(model: GatedExponentialSmoothingLM, rounds: int, on_round: Callable[[], object]) -> list[Row]:
    """A step after a million tokens, over one after a thousand."""
    decoder = Decoder(model)
    near, far = decoder.initial_state(1), decoder.initial_state(1)
    decoder.prefill(torch.randint(model.token_emb.num_embeddings, (1, NEAR)), near)
    for _ in range(FAR // 50_000):
        decoder.prefill(torch.randint(model.token_emb.num_embeddings, (1, 50_000)), far)
    token = torch.tensor([1])

    def steps(state: Tensor) -> Callable[[], object]:
        return lambda: [decoder.step(token, state) for _ in range(4 * STEPS)]

    seconds = interleave({"near": steps(near), "far": steps(far)}, 5 * rounds, settle=SETTLE)
    for _ in range(rounds + 1):
        on_round()
    rate, ratio = 4 * STEPS / seconds["far"], seconds["near"] / seconds["far"]
    return [Row(_parameters(model), f"step {FAR:,}", "fp32", 1, rate, f"step {NEAR:,}", ratio)]


def _others(model: GatedExponentialSmoothingLM, rounds: int, on_round: Callable[[], object]) -> list[Row]:
    """Greedy generation of this and of other models of the size, over this model's."""
    ids, decoder, greedy = torch.ones(1, 8, dtype=torch.int64), Decoder(model), Sampling(temperature=0)
    things: dict[str, Callable[[], object]] = {
        "mhesa": lambda: list(stream(decoder, ids[0], max_new_tokens=NEW, sampling=greedy))
    }
    parameters, tokens = {"mhesa": _parameters(model)}, {"mhesa": NEW}
    if installed("gated_state_spaces_pytorch", "the original"):
        things["original"] = _original(model)
        parameters["original"], tokens["original"] = parameters["mhesa"], ORIGINAL_NEW

    def generating(other: Any) -> Callable[[], object]:
        return lambda: other.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    if installed("transformers", "GPT-2 and Mamba"):
        for name, other in {"GPT-2": _gpt2(), "Mamba": _mamba()}.items():
            things[name] = generating(other)
            parameters[name], tokens[name] = _parameters(other), NEW
    seconds = interleave(things, min(rounds, 5), settle=SETTLE)
    for _ in range(rounds + 1):
        on_round()
    rates = {name: tokens[name] / taken for name, taken in seconds.items()}
    return [
        Row(
            parameters=parameters[name],
            name=f"generate, {name}",
            precision="fp32",
            batch=1,
            tokens_per_second=rate,
            mark="generate, mhesa",
            ratio=rate / rates["mhesa"],
        )
        for name, rate in rates.items()
    ]


def _original(model: GatedExponentialSmoothingLM) -> Callable[[], object]:
    """Generation by the original package, which reads its whole context of 512 tokens for each new one."""
    import gated_state_spaces_pytorch.mhesa as original
    from gated_state_spaces_pytorch.autoregressive_wrapper import AutoregressiveWrapper

    theirs = original.GatedExponentialSmoothingLM(**asdict(MEDIUM))
    theirs.load_state_dict(model.state_dict())
    wrapped = AutoregressiveWrapper(theirs, max_seq_len=512)
    context = torch.ones(1, 512, dtype=torch.int64)
    return lambda: wrapped.generate(context, ORIGINAL_NEW)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_embd=384, n_layer=7, n_head=6, n_positions=1024, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=256, hidden_size=384, num_hidden_layers=13, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return MambaForCausalLM(config).eval()
