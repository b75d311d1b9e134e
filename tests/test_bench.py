"""Benchmarks print what is right and nothing else."""

import json
import sys
from functools import partial

import pytest
import torch

from benchmarks import lengths, ops, train
from benchmarks.lengths import bench_lengths
from benchmarks.ops import Case, Contestant, bench_ops
from benchmarks.run import bench_run, outside
from benchmarks.train import Sizes, bench_train
from mhesa import cli
from mhesa.training import TrainingSettings

SMALL = [Case((2, 64, 2, 8), torch.float32), Case((1, 65, 4, 4), torch.bfloat16)]


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


def test_the_commands_print_tables_and_json(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mhesa", "bench", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        return capsys.readouterr().out

    assert "x clone" in run("ops", "--rounds", "1", "--shape", "2x64x2x8")
    monkeypatch.setattr(ops, "SHAPES", [(2, 64, 2, 8)])
    monkeypatch.setattr(lengths, "bench_lengths", partial(bench_lengths, (64, 512)))
    assert "x one eighth" in run("ops", "--rounds", "1")
    rows = json.loads(run("ops", "--rounds", "1", "--json"))
    assert {"shape", "dtype", "operator", "timed", "milliseconds", "over_clone", "error"} <= set(rows[0])
    assert {"length", "timed", "milliseconds", "nanoseconds_per_step", "over_shorter"} <= set(rows[-1])


def test_a_run_is_timed_part_by_part(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {index}, {index * index}\n" for index in range(3000)))
    sizes = {"dim": 16, "depth": 2, "heads": 2, "dim_mhesa": 8, "context": 32, "batch_size": 4}
    settings = TrainingSettings(
        out=str(tmp_path / "run"), sources=(str(tmp_path / "text.txt"),), steps=12, device="cpu", **sizes
    )
    parts, summary = bench_run(settings)
    assert summary.steps == 12
    assert sum(part.seconds for part in parts) == pytest.approx(summary.seconds)
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(part.seconds > 0 for part in parts)
    by_name = {part.name: part.share for part in parts}
    arithmetic = sum(by_name[name] for name in ("forward", "backward", "clipping", "optimizer"))
    assert outside(parts) == pytest.approx(1 - arithmetic)


def test_a_shape_that_is_none_is_refused(monkeypatch, capsys):
    for shape in ("4x1024", "4x0x8x64", "axbxcxd"):
        monkeypatch.setattr(sys, "argv", ["mhesa", "bench", "ops", "--shape", shape])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert "shape must be four sizes such as 4x1024x8x64" in capsys.readouterr().err


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
