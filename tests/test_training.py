"""Settings, schedule and the parts of a run that the command line's tests do not reach."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_code
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from training_runs import TEXT, assert_same_run, needs_compiler, rows, small_run, weights

from mhesa.data.corpus import Source, open_corpus
from mhesa.data.windows import Windows
from mhesa.errors import InputError, TrainingError
from mhesa.hf import ByteTokenizer, MhesaForCausalLM
from mhesa.training.folder import read_metrics
from mhesa.training.optimizers import decay_groups
from mhesa.training.run import train
from mhesa.training.schedule import Budget, learning_rate
from mhesa.training.settings import TrainingSettings


@pytest.fixture
def settings(tmp_path):
    return small_run(tmp_path)


def test_the_schedule_has_no_jumps():
    rates = np.array([learning_rate(spent, 0.1) for spent in np.linspace(0, 1, 10_001)])
    assert rates.max() == 1
    assert rates[-1] == pytest.approx(0.1)
    assert rates[1000] == 1
    assert np.abs(np.diff(rates)).max() < 0.011
    assert (np.diff(rates[1000:]) < 0).all()
    assert learning_rate(0.0, 0.0) == 1
    assert learning_rate(2.0, 0.1) == pytest.approx(0.1)


def test_minutes_become_steps():
    assert Budget(steps=300, minutes=None).expected_steps(20, 1.0) == 300
    budget = Budget(steps=None, minutes=2)
    budget.seconds = 60.0
    assert budget.expected_steps(20, 0.5) == 20 + 120


def test_only_matrices_decay():
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "emb": nn.Embedding(3, 2)})
    decayed, plain = decay_groups(list(model.parameters()), 0.1)
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.1, 0.0]
    assert decayed["params"] == [model["linear"].weight, model["emb"].weight]
    assert plain["params"] == [model["linear"].bias, model["norm"].weight, model["norm"].bias]


def test_settings_survive_a_file(settings, tmp_path):
    resolved = settings.resolve()
    resolved.save(tmp_path / "settings.json", corpus={"bytes": 1})
    assert TrainingSettings.load(tmp_path / "settings.json") == resolved
    assert json.loads((tmp_path / "settings.json").read_text())["corpus"] == {"bytes": 1}


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 3}', '{"settings": {"sources": [], "colour": 1}}'])
def test_settings_of_something_else_are_refused(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError, match=r"settings\.json"):
        TrainingSettings.load(tmp_path / "settings.json")
    with pytest.raises(InputError, match="holds no training run: it has no"):
        TrainingSettings.load(tmp_path / "nowhere" / "settings.json")


def test_automatic_choices_keep_given_settings(settings):
    auto = replace(settings, batch_size=None, steps=None, precision="auto").resolve()
    assert auto.windows_per_step * auto.context >= 1024
    assert auto.minutes == 3
    assert auto.precision in ("bf16", "fp32")
    assert settings.resolve().batch_size == 4
    assert settings.resolve().minutes is None


def test_every_process_gets_as_much_as_one_alone(settings, monkeypatch):
    auto = replace(settings, batch_size=None, accumulate=3)
    alone = auto.resolve().windows_per_step
    monkeypatch.setattr("mhesa.processes.processes", lambda: 4)
    assert auto.resolve().windows_per_step == 4 * alone
    assert replace(auto, batch_size=24).resolve().windows_per_step == 24


def test_a_run_from_python(settings):
    summary = train(settings)
    assert summary.steps == 3
    assert summary.score.bytes > 0
    assert {"model.safetensors", "loss.png"} <= set(summary.files)
    with pytest.raises(InputError, match="already holds a run"):
        train(settings)
    more = train(replace(settings, steps=5), resume=True)
    assert more.steps == 5


@pytest.mark.parametrize("as_a_command", [False, True], ids=["from Python", "as a command"])
def test_only_the_command_lets_the_process_keep_freed_memory(settings, as_a_command):
    if as_a_command:
        arguments = "train", settings.sources[0], "--out", settings.out, "--steps", "1", "--dim", "8"
        call = f"sys.argv[1:] = {arguments}; mhesa.cli.main()"
    else:
        call = f"mhesa.train(mhesa.{settings})"
    code = (
        "import resource, sys, torch, mhesa, mhesa.cli\n"
        f"try: {call}\n"
        "except SystemExit: pass\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20\n"
        "tensor = torch.ones(100 << 18)\n"
        "before = resident()\n"
        "del tensor\n"
        "print(before - resident())\n"
    )
    returned = int(run_code(code)[0].split()[-1])
    assert returned < 10 if as_a_command else returned > 90


@pytest.mark.parametrize(("steps", "probability"), [(20, 0.0), (40, 0.1)], ids=["4 times", "8 times"])
def test_dropout_follows_how_often_the_text_is_read(settings, tmp_path, steps, probability):
    text = tmp_path / "short.txt"
    text.write_text(TEXT[:800])
    automatic = replace(settings, sources=(str(text),), holdout="tail:0.2", steps=steps)
    given = replace(automatic, out=str(tmp_path / "given"), dropout=probability)
    other = replace(automatic, out=str(tmp_path / "other"), dropout=0.1 - probability)
    for run in (automatic, given, other):
        train(run)
    assert_same_run(automatic, given, steps)
    assert not all(torch.equal(value, weights(other)[name]) for name, value in weights(automatic).items())
    assert {row["dropout"] for row in rows(automatic) if "loss" in row} == {probability}
    # What is not given is no property of the model.
    for run, saved in ((automatic, 0.0), (given, probability)):
        assert json.loads((Path(run.out) / "config.json").read_text())["dropout"] == saved


def test_a_time_decides_about_dropout_once_the_speed_is_known(settings, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text(TEXT[:400])
    # What is compiled at first is not to take of the time.
    train(replace(settings, out=str(tmp_path / "first")))
    timed = replace(settings, sources=(str(text),), holdout="tail:0.2", steps=None, minutes=0.03)
    train(timed)
    chosen = {row["step"]: row["dropout"] for row in rows(timed) if "loss" in row}
    assert {dropout for step, dropout in chosen.items() if step <= 20} == {0.0}
    # In these steps alone the text was read eight times; how often in all depends on the machine.
    (later,) = {dropout for step, dropout in chosen.items() if step > 20}
    assert later in (0.1, 0.2, 0.3, 0.4, 0.5)


def test_a_loss_that_is_no_number_ends_the_run(settings):
    with pytest.raises(TrainingError, match=r"the (loss|gradient) became .* at step .*learning rate"):
        train(replace(settings, lr=1e30, steps=50))


def test_weights_that_a_step_breaks_are_found_by_the_evaluation_after_it(settings):
    diverging = replace(settings, lr=1e30, muon_lr=1e30, warmup=0.0, steps=50)
    with pytest.raises(TrainingError, match=r"held-out text became inf at step .*learning rate"):
        train(replace(diverging, eval_every=1))
    with pytest.raises(TrainingError, match=r"logits are not numbers.*start over with a lower learning rate"):
        train(replace(diverging, steps=1, out=f"{settings.out}-1"))


def test_a_run_goes_on_where_its_text_is_now(settings, tmp_path):
    train(settings)
    text = Path(settings.sources[0])
    moved = text.rename(tmp_path / "moved.txt")
    summary = train(replace(settings, sources=(str(moved),), steps=settings.steps + 2), resume=True)
    assert summary.steps == settings.steps + 2


def test_another_corpus_does_not_resume_a_run(settings):
    train(settings)
    with open(settings.sources[0], "a") as file:
        file.write("one more line\n")
    with pytest.raises(InputError, match="the text is not the one"):
        train(replace(settings, steps=5), resume=True)


def test_early_stopping_takes_the_best(settings):
    run, said = replace(settings, steps=400, eval_every=5, patience=3, lr=0.3, warmup=0.5), io.StringIO()
    summary = train(run, console=Console(file=said))
    evaluations = [row for row in rows(run) if "sample" in row]
    best = min(evaluations, key=lambda row: row["held_out_bits_per_byte"])
    assert summary.steps == best["step"] + 15 < 400
    assert f"that of step {best['step']}, is kept" in said.getvalue()
    saved = load_file(Path(run.out) / "checkpoints" / f"step-{best['step']}" / "model.safetensors")
    assert all(torch.equal(weights(run)[name], value) for name, value in saved.items())
    assert summary.score.bits_per_byte == pytest.approx(best["held_out_bits_per_byte"])


@pytest.mark.parametrize(("optimizer", "error"), [("adamw", 1e-5), ("muon", 1e-4)])
def test_accumulation_takes_the_same_steps(settings, tmp_path, optimizer, error):
    whole = replace(settings, steps=20, optimizer=optimizer)
    parted = replace(whole, accumulate=4, out=str(tmp_path / "parted"))
    train(whole)
    train(parted)
    for one, other in zip(rows(whole), rows(parted), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], abs=error)


def test_a_carried_state_equals_that_of_the_whole_stream(settings):
    """Windows with states handed on are one long window, as far as the loss can tell."""
    text = Path(settings.sources[0])
    stream = replace(
        settings,
        carry_state=True,
        join=True,
        batch_size=1,
        lr=1e-30,
        muon_lr=1e-30,
        steps=10,
        weight_decay=0.0,
    )
    train(stream)
    losses = [row["loss"] for row in rows(stream) if "loss" in row]
    tokens = open_corpus(Source([str(text)]), ByteTokenizer()).tokens
    windows = Windows(tokens, context=320, rows=1, seed=0, streams=True)
    begin = Windows(tokens, context=32, rows=1, seed=0, streams=True).starts(0)
    ids = windows.read(begin)
    model = MhesaForCausalLM.from_pretrained(stream.out)
    with torch.no_grad():
        expected = model.to_plain()(ids[:, :-1], labels=ids[:, 1:])
    assert losses == [pytest.approx(expected.item(), abs=1e-5)]


@needs_compiler
def test_a_compiled_model_learns_the_same(settings, tmp_path):
    plain = replace(settings, depth=1, carry_state=True)
    compiled = replace(plain, compile=True, out=str(tmp_path / "compiled"))
    train(plain)
    train(compiled)
    [one], [other] = ([row["loss"] for row in rows(run) if "loss" in row] for run in (plain, compiled))
    assert one == pytest.approx(other, abs=1e-5)


def test_a_run_that_waits_for_busy_cores_says_once_what_helps():
    code = """
import os, subprocess, sys, time, torch
from mhesa.training import busy_cores

def compute(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass

busy_cores.INTERVAL = 0.5
torch.set_num_threads(2)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
cores = busy_cores.BusyCores("cpu")
found = []
for what in (time.sleep, compute, compute):
    what(1)
    found.append(cores.hint())
for device, chosen in (("cuda", {}), ("cpu", {"GOMP_SPINCOUNT": "1000"})):
    os.environ |= chosen
    cores = busy_cores.BusyCores(device)
    compute(1)
    found.append(cores.hint())
other.kill()
print([bool(hint) for hint in found])
"""
    assert run_code(code)[0] == "[False, True, False, False, False]\n"


def test_a_run_does_not_depend_on_what_is_around_it(settings, tmp_path):
    """Gradients that are off outside; sources as a list of paths; what excludes one another is refused."""
    train(settings)
    other = replace(settings, out=str(tmp_path / "other"), sources=[Path(name) for name in settings.sources])
    with torch.inference_mode():
        train(other)
    assert_same_run(settings, other, settings.steps)
    with pytest.raises(InputError, match="give resume or overwrite, not both"):
        train(replace(settings, steps=99), resume=True, overwrite=True)


def test_a_damaged_row_of_metrics_hides_no_other(settings):
    train(settings)
    path = Path(settings.out) / "metrics.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first[:-5], *others, '{"step": 9']))
    assert read_metrics(Path(settings.out)) == [json.loads(row) for row in others]
