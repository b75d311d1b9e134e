"""CPU kernels under threads, forks, unusable caches, huge strides and subnormals."""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest
import torch
from commands import FORKED, run_code
from scans import Case, error, same
from torch import Tensor
from torch.utils.data import DataLoader

from mhesa.ops import exponential_smoothing
from mhesa.ops.cpu import compiling
from mhesa.ops.cpu import threads as threading
from mhesa.ops.gelu import gelu

CALL = """
import sys, torch
from mhesa.ops import exponential_smoothing
x = torch.ones(2, 4, 1, 1)
y = exponential_smoothing(x, torch.tensor([0.5]), torch.tensor([0.5]), backend="numba")
sys.stderr.write(str(y[0].flatten().tolist()))
"""
# The same of a kernel that compiles in a quarter of the time.
SMALL_CALL = """
import sys, torch
from mhesa.ops.gelu import gelu
sys.stderr.write(f"{gelu(torch.ones(1)).item():.4f}")
"""
ROOT = Path(__file__).parents[1]
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# The shape of rates for one sequence of 20,000 steps and one head.
RATES = pytest.mark.parametrize("shape", [(1,), (1, 20000, 1)], ids=["fixed", "varying"])


def smooth(x: Tensor) -> list[Tensor]:
    """Outputs and gradients at fixed rates."""
    heads = x.shape[2]
    rates = torch.linspace(0.1, 0.9, heads).requires_grad_()
    x = x.detach().requires_grad_()
    y, final = exponential_smoothing(x, rates, 1 - rates, return_final_state=True, backend="numba")
    return [y.detach(), final.detach(), *torch.autograd.grad(y.sum() + final.sum(), (x, rates))]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.fixture
def threads() -> int:
    """Three threads, whatever the machine has, until the end of the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@REVERSE
@pytest.mark.parametrize(
    ("rates", "shape", "offsets"),
    [
        *itertools.product(
            ["fixed"], [(1, 2000, 4, 64), (3, 300, 2, 80), (40, 70, 2, 33), (2, 9001, 3, 7)], [None]
        ),
        *itertools.product(
            ["both", "alpha", "decay"],
            [(1, 3000, 8, 16), (3, 300, 2, 80), (40, 70, 2, 33), (2, 3001, 1, 7)],
            [None],
        ),
        *itertools.product(["both", "alpha", "decay"], [(1, 900, 32, 8)], [[0, 20, 20, 600, 900]]),
    ],
)
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit(
    rates: str, shape: tuple[int, ...], offsets: list[int] | None, reverse: bool
) -> None:
    case = Case(*shape, rates=rates, dtype=torch.float32, offsets=offsets, reverse=reverse)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(case.results("numba"))
    for several in results[1:]:
        same(several, results[0])
    for result, truth in zip(results[0], case.results("chunked"), strict=True):
        assert error(result, truth) <= 1e-5


@REVERSE
@pytest.mark.parametrize("lengths", [(5000,), (0, 700, 2900, 1, 1399)])
@pytest.mark.usefixtures("threads")
def test_a_relay_changes_no_bit(lengths: tuple[int, ...], reverse: bool) -> None:
    x = torch.randn(1, sum(lengths), 5, 120)
    state = torch.randn(len(lengths), 5, 120)
    rates, skip = torch.linspace(0.1, 0.9, 5), torch.randn(5, 120)

    def run(backend: str) -> list[Tensor]:
        options = {"initial_state": state, "reverse": reverse, "return_final_state": True, "backend": backend}
        offsets = torch.tensor([0, *itertools.accumulate(lengths)])
        return list(exponential_smoothing(x, rates, 1 - rates, skip=skip, cu_seqlens=offsets, **options))

    several = run("numba")
    torch.set_num_threads(1)
    assert equal(run("numba"), several)
    for result, truth in zip(several, run("chunked"), strict=True):
        assert (result - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.usefixtures("threads")
def test_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 300, 2, 64)
    expected = smooth(x)
    monkeypatch.setattr(threading, "_openmp", lambda: None)
    assert equal(smooth(x), expected)


@pytest.mark.usefixtures("threads")
def test_from_several_python_threads_at_once() -> None:
    inputs = [torch.randn(2, 400, 2, 64) for _ in range(8)]
    expected = [smooth(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for result, truth in zip(pool.map(smooth, inputs), expected, strict=True):
                assert equal(result, truth)


def _in_child(x: Tensor, expected: list[Tensor]) -> None:
    # The child process has none of its parent's threads.
    os._exit(0 if equal(smooth(x), expected) else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
@pytest.mark.usefixtures("threads")
def test_in_a_forked_process() -> None:
    # Large enough for our threads, too small for torch's, which hang in a forked process.
    x = torch.randn(2, 200, 1, 64)
    expected = smooth(x)
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(x, expected))
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert process.exitcode == 0


class _Smoothed(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return smooth(torch.full((1, 300, 1, 64), float(index)))[0][0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
def test_in_data_workers() -> None:
    smooth(torch.randn(2, 400, 2, 64))
    loader = DataLoader(_Smoothed(), num_workers=2, multiprocessing_context="fork", timeout=60)
    for index, batch in enumerate(loader):
        assert torch.equal(batch[0], _Smoothed()[index])


def run_fresh(cache: Path, code: str) -> tuple[str, str]:
    """Run code in a process that has called no kernel; what it writes to standard output and error."""
    return run_code(f"import numba\nnumba.config.CACHE_DIR = {str(cache)!r}\n{code}")


def test_the_first_call_is_silent_and_the_next_finds_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = run_fresh(cache, CALL)
    assert first == ("", "[0.5, 0.75, 0.875, 0.9375]")
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")}
    assert kept
    assert run_fresh(cache, CALL) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")} == kept


def test_the_name_of_a_kernel_follows_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("one = 1\n")
    first = compiling._digest.__wrapped__(tmp_path)
    times = (source.stat().st_atime_ns, source.stat().st_mtime_ns)
    source.write_text("one = 2\n")
    # As in archives and images, where all files have one time.
    os.utime(source, ns=times)
    assert compiling._digest.__wrapped__(tmp_path) != first


def compile_at_once(cache, barrier, found):
    numba.config.CACHE_DIR = cache
    barrier.wait(60)
    gelu(torch.ones(1))
    found.put([function.cache_hits for function in compiling._COMPILED])


def test_of_processes_that_start_at_once_one_compiles(tmp_path: Path) -> None:
    barrier, found = FORKED.Barrier(3), FORKED.SimpleQueue()
    arguments = str(tmp_path / "cache"), barrier, found
    processes = [FORKED.Process(target=compile_at_once, args=arguments, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 3
    assert sorted(found.get() for _ in processes) == [[0], [1], [1]]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    # A file in place of the folder: permissions would not stop root.
    (tmp_path / "cache").write_text("")
    assert run_fresh(tmp_path / "cache", SMALL_CALL) == ("", "0.8413")


def test_a_cache_that_fails_while_it_is_written(tmp_path: Path) -> None:
    full = """
import numba.core.caching as caching
def full(self, *args):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = full
"""
    assert run_fresh(tmp_path / "cache", full + SMALL_CALL) == ("", "0.8413")


def test_import_loads_no_numba() -> None:
    code = "import sys, mhesa; sys.exit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_two_to_the_31(dim: int) -> None:
    # Pages that are not touched take no memory.
    far = (1 << 31) + 16
    storage = torch.frombuffer(mmap.mmap(-1, 4 * far), dtype=torch.bfloat16)
    strides = [32, 32, 16, 1]
    strides[dim] = far
    x = storage.as_strided([2 if i == dim else 1 for i in range(3)] + [16], strides)
    x.copy_(torch.randn(x.shape))
    assert equal(smooth(x), smooth(x.contiguous()))


@RATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decayed_carry_ends_at_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(1, 20000, 1, 32, dtype=dtype)
    x[:, 0] = 1
    rate = torch.full(shape, 0.9, dtype=dtype)
    y, final = exponential_smoothing(x, 1 - rate, rate, return_final_state=True, backend="numba")
    assert not final.any()
    tiny = torch.finfo(dtype).smallest_normal
    assert not ((y != 0) & (y.abs() < tiny)).any()
    # Before that, it is the power of the decay.
    steps = torch.arange(200, dtype=torch.float64)
    torch.testing.assert_close(y[0, :200, 0, 0].double(), 0.1 * 0.9**steps, rtol=2e-5, atol=0)


class Long:
    """Packed sequences with few channels; the long ones are scanned in spans."""

    lengths = (20011, 3, 2048, 0, 2047)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.offsets = [0, *itertools.accumulate(self.lengths)]
        self.x, self.dy = (torch.randn(1, self.offsets[-1], 3, 7, dtype=dtype) for _ in range(2))
        self.rates = (
            torch.tensor([0.5, 0.01, 0.0], dtype=dtype),
            torch.tensor([0.9, 0.9999, 1.0], dtype=dtype),
        )
        self.state, self.dfinal = (torch.randn(len(self.lengths), 3, 7, dtype=dtype) for _ in range(2))

    def run(self, backend: str, reverse: bool, sequence: int | None = None) -> list[Tensor]:
        """Outputs and gradients of x and state, packed or of one sequence by itself."""
        rows = slice(None) if sequence is None else slice(*self.offsets[sequence : sequence + 2])
        which = slice(None) if sequence is None else slice(sequence, sequence + 1)
        x, state = self.x[:, rows].clone().requires_grad_(), self.state[which].clone().requires_grad_()
        y, final = exponential_smoothing(
            x,
            *self.rates,
            initial_state=state,
            cu_seqlens=torch.tensor(self.offsets) if sequence is None else None,
            reverse=reverse,
            return_final_state=True,
            backend=backend,
        )
        gradients = torch.autograd.grad((y, final), (x, state), (self.dy[:, rows], self.dfinal[which]))
        return [y.detach(), final.detach(), *gradients]


@REVERSE
def test_spans_of_long_sequences(reverse: bool) -> None:
    long = Long(torch.float64)
    for result, truth in zip(long.run("numba", reverse), long.run("chunked", reverse), strict=True):
        assert (result - truth).norm() <= 1e-11 * truth.norm()


@REVERSE
def test_long_sequences_do_not_depend_on_their_batch(reverse: bool) -> None:
    long = Long()
    y, final, dx, dstate = long.run("numba", reverse)
    for sequence, (begin, end) in enumerate(itertools.pairwise(long.offsets)):
        here = [y[:, begin:end], final[sequence][None], dx[:, begin:end], dstate[sequence][None]]
        assert equal(long.run("numba", reverse, sequence), here)


def test_a_long_sequence_whose_decays_hardly_decay() -> None:
    case = Case(1, 1 << 16, 2, 2, rates="both", dtype=torch.float32)
    case.decay = 1 - 1e-4 * torch.rand(case.decay.shape)
    truths = case.results("chunked", torch.float64)
    for result, truth in zip(case.results("numba"), truths, strict=True):
        assert error(result, truth) <= 1e-5


@REVERSE
def test_states_of_varying_rates_are_kept_or_computed_anew(reverse: bool) -> None:
    case = Case(2, 500, 3, 16, rates="both", dtype=torch.float32, reverse=reverse)
    kept = case.results("numba")
    inputs = [tensor.detach() for tensor in case.tensors()]
    same(torch.ops.mhesa.numba_backward(case.dy, case.dfinal, *inputs, None, reverse), kept[2:])


def test_infinity_and_nan_cross_spans() -> None:
    x = torch.randn(2, 9000, 1, 8)
    clean = smooth(x)[0]
    for value in (torch.inf, torch.nan):
        dirty = x.clone()
        dirty[1, 100, 0, 3] = value
        y = smooth(dirty)[0]
        touched = torch.zeros_like(x, dtype=torch.bool)
        touched[1, 100:, 0, 3] = True
        assert torch.equal(y[~touched], clean[~touched])
        torch.testing.assert_close(y[touched], torch.full((8900,), value), equal_nan=True)


@pytest.mark.parametrize("decay", [0.0, 1 - 1e-7, 1.0])
def test_a_million_steps(decay: float) -> None:
    length = 1 << 20
    x = torch.randn(1, length, 1, 2).requires_grad_()
    alpha = torch.tensor([1.0], requires_grad=True)
    rate = torch.tensor([decay], requires_grad=True)
    y, final = exponential_smoothing(x, alpha, rate, return_final_state=True, backend="numba")
    gradients = torch.autograd.grad(y.sum() + final.sum(), (x, alpha, rate))
    assert all(tensor.isfinite().all() for tensor in (y, final, *gradients))
    if decay == 0:
        assert torch.equal(y, x)
        assert torch.equal(gradients[0][:, :-1], torch.ones(1, length - 1, 1, 2))
        torch.testing.assert_close(gradients[1].double(), (x.double().sum() + final.sum()).reshape(1))
    elif decay == 1:
        truth = x.double().cumsum(1)
        # Each step of a running sum rounds by 2**-24 / sqrt(3) of the sum so far, independently: over n steps
        # of random numbers 2**-24 * sqrt(n / 6) of the whole.
        assert (y - truth).norm() / truth.norm() < 2**-24 * (length / 6) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    # Halfway cases, their neighbours and overflow: with rates of zero, y is skip * x computed in fp32.
    for factor in (1.0, 1 + 2.0**-9, 1 - 2.0**-8, 1.5, 2.0**-8):
        x = values.reshape(1, 1, 1, -1)
        skip = torch.full((1, x.shape[-1]), factor)
        zero = torch.zeros(1)
        finite = values.isfinite()
        y = exponential_smoothing(x, zero, zero, skip=skip, backend="numba").flatten()
        truth = (values.float() * factor).to(dtype)
        torch.testing.assert_close(y[finite], truth[finite], rtol=0, atol=0)
        assert y[values.isnan()].isnan().all()


def measure_gradients(found):
    x = torch.randn(1, 1 << 17, 8, 64).requires_grad_()
    rates = torch.full((8,), 0.5)

    def step(x):
        y = exponential_smoothing(x, rates, rates, backend="numba")
        return y, torch.autograd.grad(y, x, torch.ones(1, 1, 1, 1).expand_as(x))

    step(x[:, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = step(x)
    found.put(
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(held) * x.numel() * 4 // 1024)
    )


def test_gradients_need_little_memory_beyond_their_outputs() -> None:
    found = FORKED.SimpleQueue()
    process = FORKED.Process(target=measure_gradients, args=(found,), daemon=True)
    process.start()
    process.join(100)
    assert process.exitcode == 0
    grown, needed = found.get()
    assert 0.5 * needed < grown < 1.01 * needed


@RATES
def test_unsupported_types_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.zeros(1, 20000, 1, 1, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="'numba' takes float32, float64, bfloat16, float16, not float8"):
        exponential_smoothing(x, torch.zeros(shape), torch.zeros(shape), backend="numba")
