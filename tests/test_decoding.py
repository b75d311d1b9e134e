"""The decoder: its native step against the model, in any type, batch and number of threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from commands import run_code
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding
from torch.nn import functional as F

from mhesa import GatedExponentialSmoothingLM
from mhesa.errors import InputError
from mhesa.inference.decoder import Decoder
from mhesa.inference.decoder.matmul import MAX_INT8_COLUMNS, check_int8_columns, pack, quantize
from mhesa.inference.decoder.native import ROWS, NativeEngine

NATIVE = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8")]
ALL = [*NATIVE, (torch.float64, None)]


def tiny(dtype=torch.float32, *, num_tokens=50, dim=24, depth=3, heads=2, dim_mhesa=12, factor=4.0):
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(
        num_tokens=num_tokens,
        dim=dim,
        depth=depth,
        heads=heads,
        dim_mhesa=dim_mhesa,
        dim_expansion_factor=factor,
    )
    return model.to(dtype).eval()


def fp64_logits(model, ids):
    import gated_state_spaces_pytorch.mhesa as original

    first = model.layers[0]
    theirs = original.GatedExponentialSmoothingLM(
        num_tokens=model.token_emb.num_embeddings,
        dim=model.token_emb.embedding_dim,
        depth=len(model.layers),
        heads=first.mhesa.heads,
        dim_mhesa=first.to_v[0].out_features,
        dim_expansion_factor=first.to_out.in_features / model.token_emb.embedding_dim,
    ).double()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        return theirs(ids)


SIZES = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(2, 70),
        "dim": st.integers(1, 70),
        "depth": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "factor": st.sampled_from([1.0, 1.5, 4.0]),
    }
)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, width=st.integers(1, 25), batch=st.integers(1, 9), length=st.integers(1, 12))
def test_any_model_reads_as_the_original_in_fp64(sizes, width, batch, length):
    model = tiny(**sizes, dim_mhesa=width * sizes["heads"])
    ids = torch.randint(sizes["num_tokens"], (batch, length))
    expected = fp64_logits(model, ids)[:, -1]
    logits = Decoder(model, max_batch=batch).prefill(ids, model.initial_state(batch))
    torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=1e-5)


def test_bf16_weights_are_as_close_as_bf16_allows():
    model = tiny(dim=64, dim_mhesa=64)
    ids = torch.randint(50, (2, 100))
    expected = fp64_logits(model, ids)[:, -1]
    rounded = model.bfloat16()
    ours = Decoder(rounded, max_batch=2).prefill(ids, rounded.initial_state(2))
    with torch.no_grad():
        theirs = rounded(ids)[:, -1]
    assert (ours - expected).norm() <= (theirs - expected).norm()


def test_int8_weights_lose_little():
    model = tiny(dim=64, dim_mhesa=64)
    ids = torch.randint(50, (1, 200))
    expected = fp64_logits(model, ids)[0]
    logits = Decoder(model, quantize="int8").predict(ids[0], model.initial_state(1))
    divergence = F.kl_div(logits.double().log_softmax(-1), expected.softmax(-1), reduction="batchmean")
    assert divergence < 1e-3


@pytest.mark.parametrize(("dtype", "quantize"), ALL)
def test_one_stretch_equals_pieces_equals_token_by_token(dtype, quantize):
    model = tiny(dtype)
    length = ROWS + 37
    ids = torch.randint(50, (length,))
    decoder = Decoder(model, quantize=quantize)
    state = model.initial_state(1)
    whole = decoder.predict(ids, state)
    pieces_state, steps_state = model.initial_state(1), model.initial_state(1)
    pieces = torch.stack([decoder.prefill(part[None], pieces_state)[0] for part in ids.split(53)])
    steps = torch.stack([decoder.step(token[None], steps_state)[0].clone() for token in ids])
    # Natively the same bits; elsewhere torch's products depend on how many rows they have.
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(steps, whole, **tolerance)
    torch.testing.assert_close(pieces, whole[[*range(52, length, 53), length - 1]], **tolerance)
    torch.testing.assert_close(steps_state, state, **tolerance)
    torch.testing.assert_close(pieces_state, state, **tolerance)


@pytest.mark.parametrize(("dtype", "quantize"), NATIVE)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_a_sequence_does_not_depend_on_its_batch(dtype, quantize, lengths):
    model = tiny(dtype, depth=2)
    prompts = [torch.randint(50, (length,)) for length in lengths]
    decoder = Decoder(model, max_batch=len(lengths), quantize=quantize)
    together = model.initial_state(len(lengths))
    logits = decoder.prefill(prompts, together)
    stepped = decoder.step(logits.argmax(-1), together).clone()
    for row, prompt in enumerate(prompts):
        alone = model.initial_state(1)
        assert torch.equal(decoder.prefill([prompt], alone)[0], logits[row])
        assert torch.equal(decoder.step(logits[row].argmax()[None], alone)[0], stepped[row])
        assert torch.equal(alone[:, 0], together[:, row])


@pytest.mark.parametrize(("dtype", "quantize"), NATIVE)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_row_leaves_the_others_alone(dtype, quantize, poison):
    model = tiny(dtype)
    ids = torch.randint(50, (8,))
    decoder = Decoder(model, max_batch=8, quantize=quantize)
    clean, broken = model.initial_state(8), model.initial_state(8)
    broken[:, 3] = poison
    expected, logits = decoder.step(ids, clean).clone(), decoder.step(ids, broken).clone()
    others = [row for row in range(8) if row != 3]
    assert torch.equal(logits[others], expected[others])
    assert torch.equal(broken[:, others], clean[:, others])
    assert logits[3].isnan().all()
    # Nothing of it stays in the memory of the decoder.
    again = model.initial_state(8)
    assert torch.equal(decoder.step(ids, again), expected)


def test_a_slice_of_a_larger_state_is_changed_in_place():
    model = tiny()
    slab = torch.zeros(3, 6, 12)
    ids = torch.randint(50, (4,))
    expected = model.initial_state(4)
    decoder = Decoder(model, max_batch=6)
    logits = decoder.step(ids, slab[:, 1:5]).clone()
    assert torch.equal(decoder.step(ids, expected), logits)
    assert torch.equal(slab[:, 1:5], expected)
    assert not slab[:, [0, 5]].any()


def test_small_calls_take_one_thread_if_asked_to():
    model = tiny(dim=128, dim_mhesa=64)
    results = []
    for single in (False, True):
        decoder, state = Decoder(model, single_thread_small_calls=single), model.initial_state(1)
        results.append((decoder.step(torch.tensor([3]), state), state))
        # A long prompt takes all cores.
        for length, threads in (
            (1, 1 if single else torch.get_num_threads()),
            (100, torch.get_num_threads()),
        ):
            decoder.prefill(torch.zeros(1, length, dtype=torch.int64), model.initial_state(1))
            assert decoder._engine.args.threads == threads
    (logits, state), (same_logits, same_state) = results
    assert torch.equal(logits, same_logits)
    assert torch.equal(state, same_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("token", [-1, 50, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_and_leaves_the_state(dtype, token):
    model = tiny(dtype)
    decoder, state = Decoder(model, max_batch=2), model.initial_state(2)
    decoder.step(torch.tensor([1, 2]), state)
    before = state.clone()
    with pytest.raises(IndexError, match="0 to 49"):
        decoder.step(torch.tensor([3, token]), state)
    assert torch.equal(state, before)


def test_a_state_that_does_not_fit_is_refused():
    model = tiny()
    decoder, ids = Decoder(model, max_batch=2), torch.tensor([1])
    for state in (
        torch.zeros(2, 1, 12),
        torch.zeros(3, 2, 12),
        torch.zeros(3, 1, 12).double(),
        torch.zeros(3, 1, 24)[..., ::2],
    ):
        with pytest.raises(ValueError, match="state must be"):
            decoder.step(ids, state)
    with pytest.raises(ValueError, match="1 to 2 sequences"):
        decoder.step(torch.tensor([1, 2, 3]), torch.zeros(3, 3, 12))
    with pytest.raises(ValueError, match="at least one token"):
        decoder.prefill([ids, ids[:0]], torch.zeros(3, 2, 12))


def test_impossible_settings_are_refused_by_name():
    with pytest.raises(InputError, match="int8"):
        Decoder(tiny(), quantize="int4")
    with pytest.raises(InputError, match="float64"):
        Decoder(tiny(torch.float64), quantize="int8")
    with pytest.raises(InputError, match="max_batch"):
        Decoder(tiny(), max_batch=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_can_share_a_decoder(dtype):
    model = tiny(dtype, dim=128, dim_mhesa=128)
    # In fp64, the model itself steps.
    length, steps = (300, 50) if dtype == torch.float32 else (60, 12)
    decoder, prompts = Decoder(model), torch.randint(50, (8, length))

    def read(prompt):
        state, seen = model.initial_state(1), []
        logits = decoder.prefill(prompt[None], state)
        for _ in range(steps):
            seen.append(logits)
            logits = decoder.step(logits.argmax(dim=-1), state)
        return torch.cat([*seen, logits]), decoder.predict(prompt, state)

    expected = [read(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(3):
            for result, alone in zip(pool.map(read, prompts), expected, strict=True):
                assert all(map(torch.equal, result, alone))


def test_later_changes_of_the_weights_are_not_seen():
    model = tiny()
    decoder, ids = Decoder(model), torch.tensor([7])
    before = decoder.step(ids, model.initial_state(1)).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(decoder.step(ids, model.initial_state(1)), before)


PRODUCTS = """
import sys, torch
from mhesa.inference.decoder.matmul import multiply, pack, padded_columns
from mhesa.inference.decoder.tiles import begin_tiles, end_tiles
from mhesa.ops.cpu.arguments import ACCUMULATION, OPERAND, STORED, struct
from mhesa.ops.cpu.compiling import compiled
from mhesa.ops.cpu.threads import parallel

Arguments = struct(
    "Arguments", x=OPERAND, stride="int64", matrix=STORED, out=ACCUMULATION, columns="int64", rows="int64"
)

def kernel(args):
    begin_tiles(args.matrix)
    multiply(args.matrix, args.x, args.stride, args.out, args.columns, args.rows)
    end_tiles(args.matrix)

found = []
for weight, x in torch.load(sys.argv[1], weights_only=True):
    columns, matrix = padded_columns(weight.shape[1], weight.dtype), pack(weight)
    rows = torch.zeros(16, columns, dtype=x.dtype)
    rows[: len(x), : x.shape[1]] = x
    pointers = {"x": rows.data_ptr(), "matrix": matrix.data_ptr()}
    for count in range(1, len(x) + 1):
        # Tiles write 16 rows, however many are asked for.
        out = torch.zeros(16, 64, dtype=torch.int32 if weight.dtype == torch.int8 else torch.float32)
        args = Arguments(stride=columns, columns=columns, rows=count, out=out.data_ptr(), **pointers)
        parallel(compiled(kernel, weight.dtype, Arguments), args.address, 1)
        found.append(out[:count])
torch.save(found, sys.argv[2])
"""
MISSING = {
    "nothing": (),
    "tiles": ("amx",),
    "groups": ("amx", "avx512bf16", "avx512vnni"),
    "wide registers": ("amx", "avx512"),
}


def features_without(missing):
    """This processor's features as LLVM writes them, without names that begin with one of `missing`."""
    features = binding.get_host_cpu_features()
    features.update((name, False) for name in features if name.startswith(missing))
    return features.flatten()


# Each set of features once: this processor may lack some.
FEATURES = {features_without(missing): name for name, missing in reversed(MISSING.items())}


@pytest.mark.parametrize("features", FEATURES, ids=FEATURES.get)
def test_processors_without_instructions_for_products_get_the_same_sums(tmp_path, features):
    """The instructions are chosen when a kernel is compiled, so compile for processors without them."""
    torch.manual_seed(0)
    int8 = (
        torch.randint(-127, 128, (64, 72), dtype=torch.int8),
        torch.randint(256, (6, 72), dtype=torch.uint8),
    )
    fp32 = torch.randn(64, 72), torch.randn(6, 72)
    bf16 = fp32[0].bfloat16(), fp32[1].bfloat16()
    torch.save([int8, fp32, bf16], tmp_path / "given")
    other = {"NUMBA_CPU_NAME": binding.get_host_cpu_name(), "NUMBA_CPU_FEATURES": features}
    files = [str(tmp_path / "given"), str(tmp_path / "found")]
    if features == features_without(()):
        run_code(f"import sys; sys.argv[1:] = {files}\n{PRODUCTS}")
    else:
        subprocess.run([sys.executable, "-c", PRODUCTS, *files], check=True, env=os.environ | other)
    found = iter(torch.load(tmp_path / "found", weights_only=True))
    for weight, x in (int8, fp32, bf16):
        # Values of rows for int8 are stored with 128 added.
        rows = x.double() - 128 if x.dtype == torch.uint8 else x.double()
        tolerance = 0 if x.dtype == torch.uint8 else 1e-5
        for count in range(1, 7):
            expected = rows[:count] @ weight.double().T
            torch.testing.assert_close(next(found).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dim", [8, 40, 64, 100])
@pytest.mark.parametrize("rows", [1, 6, 15, 17, 50])
def test_products_of_int8_are_exact(dim, rows):
    torch.manual_seed(dim + rows)
    model = GatedExponentialSmoothingLM(num_tokens=70, dim=dim, depth=1, heads=2, dim_mhesa=16)
    engine = NativeEngine(model, torch.int8, rows, single_thread_small_calls=False)
    ids = torch.randint(70, (rows,))
    logits = engine.run(ids, torch.arange(rows + 1), model.initial_state(rows), True)
    # What the last product read is still there: values of 8 bits with 128 added.
    operand, row_scales = engine.operand[:rows, :dim].long() - 128, engine.scales[0, :rows]
    matrix, scales = quantize(model.to_logits.weight)
    expected = (operand @ matrix.long().T).float() * (row_scales[:, None] * scales)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=0)


def test_rows_for_int8_are_rounded_to_127_values_of_each_sign():
    """The rows of a model whose only block adds nothing are its embedding."""
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(num_tokens=9, dim=40, depth=1, heads=2, dim_mhesa=16)
    sizes = torch.tensor([1.0, 1e30, 1e-30, 1e-37, 1e-40, 0.0])
    rows = torch.cat([torch.randn(6, 40) * sizes[:, None], torch.randn(3, 40)])
    rows[6:, 7] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with torch.no_grad():
        model.layers[0].to_out.weight.zero_()
        model.layers[0].to_out.bias.zero_()
        model.token_emb.weight.copy_(rows)
    engine = NativeEngine(model, torch.int8, 9, single_thread_small_calls=False)
    logits = engine.run(torch.arange(9), torch.arange(10), model.initial_state(9), True)
    peaks = rows[:3].abs().amax(1)
    expected = (rows[:3] * (127 / peaks)[:, None]).round().long()
    assert torch.equal(engine.operand[:3, :40].long() - 128, expected)
    torch.testing.assert_close(engine.scales[0, :3], peaks / 127)
    # Smaller ones count as zeros, and what is not finite is seen.
    assert logits[3:6].abs().max() == 0
    assert logits[6:].isnan().all()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.int8])
def test_all_matrices_lie_in_one_block_of_memory(weights):
    engine = NativeEngine(tiny(), weights, 1, single_thread_small_calls=False)
    products = sorted(
        (stage.matrix, stage.panels * stage.panel_size) for stage in engine.stages if stage.panels
    )
    addresses = [address for address, _ in products]
    sizes = [size * weights.itemsize for _, size in products]
    assert addresses == [engine.matrices.data_ptr() + sum(sizes[:index]) for index in range(len(sizes))]
    assert sum(sizes) == engine.matrices.nbytes


@pytest.mark.parametrize("signs", [1, -1])
def test_the_widest_matrices_in_int8_do_not_overflow(signs):
    columns = MAX_INT8_COLUMNS
    check_int8_columns(columns)
    with pytest.raises(InputError, match=f"at most {columns} columns, not {columns + 1}; keep them in fp32"):
        check_int8_columns(columns + 1)
    [panel] = pack(torch.full((64, columns), signs * 127, dtype=torch.int8))
    assert panel[0].reshape(-1).view(torch.int32).tolist() == [-128 * 127 * signs * columns] * 64


@pytest.mark.parametrize("dim", [8, 40, 64, 100])
@pytest.mark.parametrize("rows", [1, 6, 15, 17, 50])
def test_bf16_products_are_exact_and_in_bounds(dim, rows):
    torch.manual_seed(dim + rows)
    model = GatedExponentialSmoothingLM(num_tokens=70, dim=dim, depth=1, heads=2, dim_mhesa=16).bfloat16()
    engine = NativeEngine(model, torch.bfloat16, rows, single_thread_small_calls=False)
    engine.operand.fill_(torch.nan)
    ids = torch.randint(70, (rows,))
    logits = engine.run(ids, torch.arange(rows + 1), model.initial_state(rows), True)
    # What the last product read is still there.
    operand, matrix = engine.operand[:rows, :dim].double(), model.to_logits.weight.double()
    expected = operand @ matrix.T
    scale = (operand.abs() @ matrix.abs().T).max().item()
    assert expected.abs().max() > 0
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_graph_on_a_gpu_equals_the_step():
    model = tiny().cuda()
    decoder, state = Decoder(model, max_batch=3), model.initial_state(3)
    expected = model.initial_state(3)
    for _ in range(5):
        ids = torch.randint(50, (3,))
        with torch.inference_mode():
            logits, expected = model.step(ids.cuda(), expected)
        torch.testing.assert_close(decoder.step(ids, state), logits.to(state.dtype))
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize(("dtype", "quantize"), ALL)
def test_read_equals_single_steps(dtype, quantize):
    decoder = Decoder(tiny(dtype), max_batch=2, quantize=quantize)
    texts = [torch.randint(50, (length,)) for length in (ROWS + 40, 7)]
    state, stepped = decoder.initial_state(2), decoder.initial_state(2)
    found = []

    def take(logits, start):
        assert start == sum(map(len, found))
        found.append(logits.clone())

    decoder.read(texts, state, take)
    expected = [
        decoder.step(token[None], stepped[:, row : row + 1])
        for row, text in enumerate(texts)
        for token in text
    ]
    # The layers sum a stretch in another order than a step.
    limits = {"rtol": 0, "atol": 0 if (dtype, quantize) in NATIVE else 1e-12}
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), **limits)
    torch.testing.assert_close(state, stepped, **limits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_have_the_type_of_the_state(dtype):
    decoder = Decoder(tiny(dtype))
    state, ids = decoder.initial_state(1), torch.tensor([3, 1, 4])
    read = []
    decoder.read(ids, state, lambda logits, start: read.append(logits.dtype))
    types = [decoder.step(ids[:1], state), decoder.prefill([ids], state), decoder.predict(ids, state)]
    assert {*read, *(logits.dtype for logits in types)} == {state.dtype}
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_reader_that_fails_leaves_the_decoder_free():
    decoder = Decoder(tiny())
    state = decoder.initial_state(1)

    def fail(logits, start):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        decoder.read(torch.tensor([1, 2]), state, fail)
    assert decoder.step(torch.tensor([1]), state).shape == (1, 50)
