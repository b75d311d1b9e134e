"""Benchmarks print what is right and nothing else."""

import json
import platform
import sys
from functools import partial

import pytest
import torch
from commands import FORKED  # noqa: F401 - benchmarks fork from the server that it sets up

from benchmarks import lengths, ops, results, score, timing, train
from benchmarks.__main__ import main
from benchmarks.bandwidth import readers
from benchmarks.compare import compare
from benchmarks.context_parallel import bench_context_parallel, on_paper
from benchmarks.decode import Sizes as DecoderSizes
from benchmarks.decode import bench_steps
from benchmarks.lengths import bench_lengths
from benchmarks.ops import Case, Contestant, bench_ops
from benchmarks.packages import installed
from benchmarks.run import bench_run
from benchmarks.tables import PAGES, with_tables
from benchmarks.train import Sizes, bench_train
from mhesa.errors import InputError
from mhesa.training.settings import TrainingSettings


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch):
    """Evict little before each sample: no time is looked at here."""
    monkeypatch.setattr(timing, "CACHE_BYTES", 1 << 12)


SMALL = [Case((2, 64, 2, 8), torch.float32), Case((1, 65, 4, 4), torch.bfloat16)]


def test_rates_of_every_step_are_timed_on_the_backends_that_take_them():
    (rows,) = bench_ops([Case((2, 64, 4, 8), torch.float32, every_step=True)], rounds=1)
    names = ["numba, rates of every step", "chunked, rates of every step"]
    assert [row.operator for row in rows] == 2 * ["clone", *names]
    assert all(row.error <= 1e-5 for row in rows)


def test_every_operator_has_its_rows():
    fp32, bf16 = bench_ops(SMALL, rounds=1)
    timed = {(row.timed, row.operator) for row in fp32}
    for operator in ("clone", "numba", "chunked", "fft", "the original's FFT"):
        assert {("forward", operator), ("forward+backward", operator)} <= timed
    assert ("forward", "scipy lfilter") in timed
    assert ("forward+backward", "scipy lfilter") not in timed
    assert {row.operator for row in bf16} == {"clone", "numba", "chunked", "fft"}
    assert all(row.milliseconds > 0 for row in (*fp32, *bf16))


def test_a_wrong_operator_has_no_row(monkeypatch):
    def wrong(x, alpha, decay, skip):
        return ops.with_backend("chunked")(x, alpha, decay * 1.001, skip)

    def wrong_gradient(x, alpha, decay, skip):
        y = ops.with_backend("chunked")(x, alpha, decay, skip)
        return y + (x - x.detach()) * 1e-3

    contestants = [Contestant("wrong", wrong), Contestant("wrong gradient", wrong_gradient)]
    monkeypatch.setattr(ops, "_contestants", lambda case, device: contestants)
    (rows,) = bench_ops(SMALL[:1], rounds=1)
    assert {(row.timed, row.operator) for row in rows} == {
        ("forward", "clone"),
        ("forward", "wrong gradient"),
        ("forward+backward", "clone"),
    }


def test_processes_that_share_a_sequence_are_measured():
    one, two = bench_context_parallel([64], [1, 2], rounds=1)
    assert (one.sent, one.over_one) == (0, 1)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert 0 < two.sent_over_state <= 4
    assert two.memory_over_one > 0


def test_larger_groups_on_paper_spend_more():
    rows = on_paper()
    assert [row.gpus for row in rows] == sorted(row.gpus for row in rows)
    assert all(row.doubling < row.ring for row in rows)


TINY = Sizes(num_tokens=50, dim=16, depth=2, heads=2, dim_mhesa=8, batch=2, length=32)


def test_a_training_step_is_measured_in_both_precisions():
    rows = bench_train(TINY, rounds=1)
    assert [(row.name, row.precision) for row in rows] == [
        ("original", "fp32"),
        ("mhesa", "fp32"),
        ("mhesa", "bf16"),
    ]
    assert rows[0].times_the_original == 1


def test_a_wrong_model_is_not_timed(monkeypatch):
    class Wrong(train.GatedExponentialSmoothingLM):
        def forward(self, x, labels=None, **kwargs):
            return super().forward(x, labels, **kwargs) * 1.1

    monkeypatch.setattr(train, "GatedExponentialSmoothingLM", Wrong)
    assert [row.name for row in bench_train(TINY, rounds=1)] == ["original"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python -m benchmarks` in this process: its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    return run


def test_the_commands_print_tables_and_json(monkeypatch, command):
    def run(*arguments):
        code, out, _ = command(*arguments)
        assert code == 0
        return out

    assert "x clone" in run("ops", "--rounds", "1", "--shape", "2x64x2x8")
    monkeypatch.setattr(ops, "SHAPES", [(2, 64, 2, 8)])
    monkeypatch.setattr(ops, "EVERY_STEP_SHAPES", [(2, 64, 2, 8)])
    monkeypatch.setattr(lengths, "bench_lengths", partial(bench_lengths, (64, 512)))
    assert "x one eighth" in run("ops", "--rounds", "1")
    tables = json.loads(run("ops", "--rounds", "1", "--json"))["tables"]
    columns = {"shape", "dtype", "operator", "timed", "milliseconds", "over_clone", "error"}
    assert columns <= set(tables["operators"][0])
    columns = {"length", "timed", "milliseconds", "nanoseconds_per_step", "over_shorter"}
    assert columns <= set(tables["lengths"][-1])


def test_a_saved_result_names_the_machine_and_no_place(monkeypatch, command, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    code, _, _ = command("ops", "--rounds", "1", "--shape", "2x64x2x8", "--save")
    assert code == 0
    (path,) = tmp_path.glob("*/ops.json")
    found = json.loads(path.read_text())
    machine = found["machine"]
    assert path.parent.name == f"{machine['family']}-{machine['instruction_sets'][0]}"
    assert machine["cores"] == torch.get_num_threads()
    assert machine["memory_gib"] > 0
    assert {"python", "torch", "numba"} <= set(found["versions"])
    assert found["command"] == "python -m benchmarks ops --rounds 1 --shape 2x64x2x8 --save"
    assert platform.node() not in path.read_text()

    text = with_tables("<!-- results: ops -->\nold\n<!-- end of results -->\n", tmp_path)
    assert "old" not in text
    assert f", {machine['cores']} core" in text
    assert "| 2x64x2x8 | float32 | forward | clone |" in text
    assert with_tables(text, tmp_path) == text


def test_a_command_line_keeps_no_folders():
    found = results.result("serve", {}, ["serve", "/some/where/model", "--streams", "2"])
    assert found["command"] == "python -m benchmarks serve model --streams 2"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_show_the_saved_results(page):
    text = page.read_text()
    assert with_tables(text) == text, "run python -m benchmarks tables"


def test_a_missing_package_is_reported(capsys):
    assert not installed("no_such_package", "its scan")
    assert (
        "its scan: not timed, because the package no_such_package is not installed" in capsys.readouterr().err
    )


@pytest.mark.parametrize("size", [4, 1 << 20, (1 << 20) + 12])
def test_both_reads_read_every_byte(size):
    assert {name: read().sum() for name, read in readers(size).items()} == {
        "native": size // 4,
        "torch": size // 4,
    }


def test_a_step_is_compared_with_the_faster_read():
    model = DecoderSizes(dim=16, depth=2, dim_mhesa=16, heads=2).model()
    rows = bench_steps(model, rounds=1)
    marks = {(row.precision, row.batch): row.mark for row in rows}
    assert {precision for precision, _ in marks} == {"fp32", "bf16", "int8"}
    for (precision, batch), mark in marks.items():
        if batch == 1 or precision == "int8":
            assert mark in (f"read {precision}, native", f"read {precision}, torch")
        else:
            assert mark == f"products {precision}, {batch}"


# A checkout whose operator takes a day.
SLOW = """
import json, sys
assert sys.argv[1:] == ["ops", "--shape", "1x64x2x8", "--rounds", "1", "--json"]
row = {"shape": "1x64x2x8", "dtype": "float32", "timed": "forward", "operator": "numba"}
print(json.dumps({"tables": {"operators": [row | {"milliseconds": 86.4e6}]}}))
"""


def test_two_checkouts_are_compared_row_by_row(tmp_path, monkeypatch):
    other = tmp_path / "benchmarks"
    other.mkdir()
    with pytest.raises(InputError, match="is not a checkout with benchmarks"):
        compare(tmp_path, "ops")
    (other / "__main__.py").write_text(SLOW)
    [row] = compare(tmp_path, "ops", ["--shape", "1x64x2x8", "--rounds", "1"], pairs=1)
    assert row.row == "operators, 1x64x2x8, float32, forward, numba"
    assert row.median > 1e4
    (other / "__main__.py").write_text("import sys; sys.exit('shape must be four sizes')")
    monkeypatch.setattr("benchmarks.compare.HERE", tmp_path)
    with pytest.raises(InputError, match=r"ops in .* failed: shape must be four sizes"):
        compare(tmp_path, "ops", ["--shape", "1x64"], pairs=1)


def test_a_run_is_timed_part_by_part(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {index}, {index * index}\n" for index in range(3000)))
    sizes = {"dim": 16, "depth": 2, "heads": 2, "dim_mhesa": 8, "context": 32, "batch_size": 4}
    settings = TrainingSettings(
        out=str(tmp_path / "run"), sources=(str(tmp_path / "text.txt"),), steps=12, device="cpu", **sizes
    )
    parts, outcome = bench_run(settings)
    assert outcome.steps == 12
    assert sum(part.seconds for part in parts) == pytest.approx(outcome.seconds)
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(part.seconds > 0 for part in parts)
    by_name = {part.name: part.share for part in parts}
    arithmetic = sum(by_name[name] for name in ("forward", "backward", "clipping", "optimizer"))
    assert outcome.outside == pytest.approx(1 - arithmetic)


def test_scoring_is_timed_where_its_bits_are_right(tmp_path, monkeypatch):
    model, text = score.make_model(tmp_path / "model"), tmp_path / "some.log"
    score.write_text(text, 1000, keys=3)
    keyed, output, printed = ["--key", score.KEY, "--key-memory", "8MB"], score._output, []
    monkeypatch.setattr(score, "_output", lambda words: printed.append(output(words)) or printed[-1])
    score.check(model, text, "fp32", keyed)
    held = b"x" * (2 << 30)
    # Python and torch, and nothing of this process.
    assert 100 < score.run(model, text, "fp32", []).peak < 2000
    del held
    monkeypatch.setattr(score, "_output", lambda words: printed[0])
    monkeypatch.setitem(score.TOLERANCE, "fp32", 1e-9)
    with pytest.raises(RuntimeError, match="bits, not"):
        score.check(model, text, "fp32", keyed)


def test_the_start_of_a_command_is_taken_off(tmp_path):
    texts = [tmp_path / "part.log", tmp_path / "whole.log"]
    for text, size in zip(texts, (1000, 8000), strict=True):
        text.write_bytes(b"x" * size)
    seconds = {("one", texts[0]): 3, ("one", texts[1]): 10, ("keyed", texts[0]): 5, ("keyed", texts[1]): 19}
    runs = {
        case: [score.Run(taken + noise, 100.0) for noise in (0, 9, -1)] for case, taken in seconds.items()
    }
    one, keyed = score.rows(runs, ["one", "keyed"], texts, "fp32")
    assert (one.bytes_per_second, one.start, one.over_one) == (1000, 2, 1)
    assert (keyed.bytes_per_second, keyed.start, keyed.over_one) == (500, 3, 0.5)
    with pytest.raises(InputError, match="too short to be timed"):
        score.rows(runs, ["one"], texts[::-1], "fp32")


def test_a_wrong_shape_is_refused(command):
    for shape in ("4x1024", "4x0x8x64", "axbxcxd"):
        code, _, err = command("ops", "--shape", shape)
        assert code == 2
        assert "shape must be four sizes such as 4x1024x8x64" in err


def test_every_length_has_its_rows():
    rows = list(bench_lengths((32, 256), rounds=1))
    assert [(row.length, row.timed) for row in rows] == [
        (32, "forward"),
        (256, "forward"),
        (32, "forward+backward"),
        (256, "forward+backward"),
    ]
    assert [row.over_shorter is None for row in rows] == [True, False] * 2


def test_a_length_with_a_wrong_result_has_no_row(monkeypatch):
    right = lengths.with_backend

    def wrong(name):
        return (lambda x, *rest: right(name)(x, *rest) * 1.001) if name is None else right(name)

    monkeypatch.setattr(lengths, "with_backend", wrong)
    assert list(bench_lengths((32, 256), rounds=1)) == []
