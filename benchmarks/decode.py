"""Decoding and prefill, against a read of the weights, the products alone, and other models of the size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bandwidth import reader
from benchmarks.timing import interleave
from mhesa.inference.decoder import Decoder
from mhesa.model.lm import GatedExponentialSmoothingLM

# The largest difference from fp64 logits, whose size is about 1, for a figure to be worth printing.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "int8": 5e-2}
BATCHES = (1, 8, 64, 128)
CONTEXTS = (1_000, 32_000, 1_000_000)
# Steps that are timed together; prompt lengths; new tokens of the other packages.
STEPS, PROMPT, NEW = 16, 2048, 32
NEAR, FAR = 1_000, 1_000_000


@dataclass(frozen=True)
class Sizes:
    """A model to decode with."""

    dim: int
    depth: int
    dim_mhesa: int
    num_tokens: int = 256
    heads: int = 8

    def model(self) -> GatedExponentialSmoothingLM:
        """The model, its weights drawn anew."""
        torch.manual_seed(0)
        return GatedExponentialSmoothingLM(
            num_tokens=self.num_tokens,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            dim_mhesa=self.dim_mhesa,
        ).eval()


SMALL = Sizes(dim=128, depth=4, dim_mhesa=256)
MEDIUM = Sizes(dim=384, depth=6, dim_mhesa=512)


@dataclass(frozen=True)
class Row:
    """One figure: how many tokens a second, and how that compares to the mark named."""

    parameters: int
    name: str
    precision: str
    batch: int
    tokens_per_second: float
    mark: str
    ratio: float


@dataclass(frozen=True)
class Memory:
    """What one session remembers after so many tokens, in bytes."""

    name: str
    context: int
    bytes: int


def bench_decode(*, rounds: int = 10, on_round: Callable[[], object] = lambda: None) -> Iterator[list[Row]]:
    """Time decoding on CPU; a list of figures for each group that was timed together.

    A precision's figures appear only if its logits are those of fp64 within `TOLERANCE`.

    Args:
        rounds: turns that count.
        on_round: called `rounds + 1` times for each of `GROUPS` groups.
    """
    for sizes in (SMALL, MEDIUM):
        model = sizes.model()
        yield _steps(model, rounds, on_round)
        yield _prefill(model, rounds, on_round)
    yield _position(SMALL.model(), rounds, on_round)
    yield _others(MEDIUM.model(), rounds, on_round)


GROUPS = 6


def memory() -> list[Memory]:
    """What a session of this model and of two others of its size remembers."""
    ours = MEDIUM.model().initial_state(1).nbytes
    gpt2, mamba = _gpt2(), _mamba()
    a_token = 2 * gpt2.config.n_layer * gpt2.config.n_embd * 4
    cache = mamba(torch.zeros(1, 8, dtype=torch.int64), use_cache=True).cache_params
    fixed = sum(_bytes(vars(layer)) for layer in cache.layers)
    return [
        Memory(name, context, size)
        for context in CONTEXTS
        for name, size in (("mhesa", ours), ("Mamba", fixed), ("GPT-2, KV cache", a_token * context))
    ]


def _bytes(values: dict[Any, Any]) -> int:
    """The size of all tensors in nested dictionaries."""
    parts = [value.values() if isinstance(value, dict) else [value] for value in values.values()]
    return sum(value.nbytes for part in parts for value in part if isinstance(value, Tensor))


def _steps(model: GatedExponentialSmoothingLM, rounds: int, on_round: Callable[[], object]) -> list[Row]:
    """Tokens a second at each size of batch, over a read of the weights or over the products alone."""
    parameters = sum(weight.numel() for weight in model.parameters())
    # An embedding is looked up, not read.
    weights = parameters - model.token_emb.weight.numel()
    things: dict[str, Callable[[], object]] = {}
    marks: dict[tuple[str, int], str] = {}
    for precision, (decoder, size) in _decoders(model).items():
        read = f"read {precision}"
        things[read] = _often(reader(weights * size))
        for batch in BATCHES:
            things[f"{precision} {batch}"] = _stepping(decoder, batch)
            marks[precision, batch] = read
            if batch > 1 and precision != "int8":
                marks[precision, batch] = f"products {precision}, {batch}"
                things[marks[precision, batch]] = _products(model, precision, batch)
    seconds = interleave(things, rounds, on_round)
    return [
        Row(
            parameters,
            "step",
            precision,
            batch,
            batch * STEPS / seconds[f"{precision} {batch}"],
            mark,
            seconds[mark] / seconds[f"{precision} {batch}"],
        )
        for (precision, batch), mark in marks.items()
    ]


def _often(once: Callable[[], object]) -> Callable[[], object]:
    """As many times as steps are timed together."""
    return lambda: [once() for _ in range(STEPS)]


def _decoders(model: GatedExponentialSmoothingLM) -> dict[str, tuple[Decoder, int]]:
    """A decoder for each precision whose results are right, and the bytes of a weight."""
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
    return {
        precision: (decoder, size)
        for precision, (decoder, size) in made.items()
        if _error(decoder, ids, expected) <= TOLERANCE[precision]
    }


def _error(decoder: Decoder, ids: Tensor, expected: Tensor) -> float:
    return (decoder.prefill(ids, decoder.initial_state(1)) - expected).abs().max().item()


def _stepping(decoder: Decoder, batch: int) -> Callable[[], object]:
    state, ids = decoder.initial_state(batch), torch.zeros(batch, dtype=torch.int64)

    def steps() -> None:
        for _ in range(STEPS):
            decoder.step(ids, state)

    return steps


def _products(model: GatedExponentialSmoothingLM, precision: str, batch: int) -> Callable[[], object]:
    """The matrix products of the same number of steps, by torch, in the same precision."""
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
    """A long prompt, over the forward pass of training on as many tokens."""
    parameters = sum(weight.numel() for weight in model.parameters())
    ids = torch.randint(model.token_emb.num_embeddings, (1, PROMPT))
    windows = ids.view(-1, 512)
    things: dict[str, Callable[[], object]] = {"forward fp32": lambda: model(windows)}

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(windows)

    things["forward bf16"] = autocast
    decoders = _decoders(model)
    for precision, (decoder, _) in decoders.items():
        things[precision] = _prefilling(decoder, ids)
    seconds = interleave(things, rounds, on_round)
    marks = {"fp32": "forward fp32", "bf16": "forward bf16", "int8": "forward fp32"}
    return [
        Row(
            parameters,
            "prefill",
            precision,
            1,
            PROMPT / seconds[precision],
            marks[precision],
            seconds[marks[precision]] / seconds[precision],
        )
        for precision in decoders
    ]


def _prefilling(decoder: Decoder, ids: Tensor) -> Callable[[], object]:
    return lambda: decoder.prefill(ids, decoder.initial_state(1))


def _position(model: GatedExponentialSmoothingLM, rounds: int, on_round: Callable[[], object]) -> list[Row]:
    """A step behind a million tokens, over one behind a thousand."""
    parameters = sum(weight.numel() for weight in model.parameters())
    decoder = Decoder(model)
    near, far = decoder.initial_state(1), decoder.initial_state(1)
    decoder.prefill(torch.randint(model.token_emb.num_embeddings, (1, NEAR)), near)
    for _ in range(FAR // 50_000):
        decoder.prefill(torch.randint(model.token_emb.num_embeddings, (1, 50_000)), far)
    token = torch.tensor([1])

    def steps(state: Tensor) -> Callable[[], object]:
        return lambda: [decoder.step(token, state) for _ in range(4 * STEPS)]

    seconds = interleave({"near": steps(near), "far": steps(far)}, 5 * rounds, lambda: None)
    for _ in range(rounds + 1):
        on_round()
    rate = 4 * STEPS / seconds["far"]
    return [
        Row(parameters, f"step {FAR:,}", "fp32", 1, rate, f"step {NEAR:,}", seconds["near"] / seconds["far"])
    ]


def _others(model: GatedExponentialSmoothingLM, rounds: int, on_round: Callable[[], object]) -> list[Row]:
    """Greedy generation of this and of other models of the size, over this model's."""
    import gated_state_spaces_pytorch.mhesa as original
    from gated_state_spaces_pytorch.autoregressive_wrapper import AutoregressiveWrapper

    from mhesa.inference.generation import stream
    from mhesa.inference.sampling import Sampling

    ids, decoder, greedy = torch.ones(1, 8, dtype=torch.int64), Decoder(model), Sampling(temperature=0)
    theirs = original.GatedExponentialSmoothingLM(
        num_tokens=MEDIUM.num_tokens,
        dim=MEDIUM.dim,
        depth=MEDIUM.depth,
        heads=MEDIUM.heads,
        dim_mhesa=MEDIUM.dim_mhesa,
    )
    theirs.load_state_dict(model.state_dict())
    wrapped = AutoregressiveWrapper(theirs, max_seq_len=512)
    context = torch.ones(1, 512, dtype=torch.int64)
    models: dict[str, nn.Module] = {"GPT-2": _gpt2(), "Mamba": _mamba()}

    def generating(other: Any) -> Callable[[], object]:
        return lambda: other.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    things: dict[str, Callable[[], object]] = {
        "mhesa": lambda: list(stream(decoder, ids[0], max_new_tokens=NEW, sampling=greedy)),
        "original": lambda: wrapped.generate(context, 2),
        **{name: generating(other) for name, other in models.items()},
    }
    seconds = interleave(things, min(rounds, 5), lambda: None)
    for _ in range(rounds + 1):
        on_round()
    parameters = {name: sum(p.numel() for p in other.parameters()) for name, other in models.items()}
    counts = {"original": 2}
    ours = NEW / seconds["mhesa"]
    return [
        Row(
            parameters.get(name, sum(p.numel() for p in model.parameters())),
            f"generate, {name}",
            "fp32",
            1,
            (rate := counts.get(name, NEW) / took),
            "generate, mhesa",
            rate / ours,
        )
        for name, took in seconds.items()
    ]


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
