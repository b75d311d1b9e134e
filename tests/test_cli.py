"""The command line as a person uses it: in a process of its own, and with everything mistaken."""

import gc
import json
import math
import os
import re
import signal
import sys
import time
from functools import partial
from itertools import pairwise

import pytest
from commands import StartedCommand, run_command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhesa import cli
from mhesa.errors import InputError
from mhesa.hf import MhesaConfig, MhesaForCausalLM
from mhesa.training.schedule import learning_rate

TINY = [
    "--dim",
    "16",
    "--depth",
    "2",
    "--heads",
    "2",
    "--dim-mhesa",
    "8",
    "--context",
    "32",
    "--batch-size",
    "4",
]
TEXT = "".join(f"{index} bottles of beer on the wall, {index} bottles of beer.\n" for index in range(3000))


def mhesa(*arguments):
    return run_command(*arguments, text=True)


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run the command in this process; it must fail with one line on standard error, which is returned."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mhesa", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert caught.value.code == 2
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "bottles.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = mhesa("train", corpus, "--out", out, "--steps", 60, "--precision", "fp32", *TINY)
    assert done.returncode == 0, done.stderr
    return out, done


# The main job


@pytest.fixture
def frozen(monkeypatch):
    """The names of gc's functions that keep objects out of collection and let them in, as they are called."""
    called = []
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, partial(called.append, name))
    return called


@pytest.mark.parametrize("command", ["generate", "score", "eval", "train", "serve", "export"])
def test_garbage_is_collected_while_a_command_works(command, trained, corpus, tmp_path, monkeypatch, frozen):
    seen = {}

    def work(*_, **__):
        seen["while it works"] = gc.isenabled()
        raise InputError("far enough")

    monkeypatch.setattr("mhesa.training.run.train", work)
    monkeypatch.setattr("mhesa.serve.http.server.serve", work)
    monkeypatch.setattr("mhesa.export.web.export_web", work)
    monkeypatch.setattr("mhesa.inference.session.Session.stream", work)
    # The package has functions of these names.
    for name in ("score", "evaluate"):
        monkeypatch.setattr(sys.modules[f"mhesa.cli.{name}"], "share", work)
    out = tmp_path / "out"
    sources = {
        "train": [corpus, "--out", out],
        "eval": [trained[0], corpus],
        "export": [trained[0], "--web", out],
    }
    monkeypatch.setattr("sys.argv", ["mhesa", command, *map(str, sources.get(command, [trained[0]]))])
    with pytest.raises(SystemExit):
        cli.main()
    assert seen == {"while it works": True}
    assert gc.isenabled()
    assert frozen[-1] == "unfreeze"


def test_train_prints_a_summary(trained):
    out, done = trained
    for part in ("sample", "held-out text", "this model", "xz -9", "gzip -9", "60 steps", str(out)):
        assert part in done.stdout
    assert "bytes to train on from 1 document, " in done.stderr


def test_the_folder_holds_a_whole_run(trained):
    out, _ = trained
    names = {"config.json", "model.safetensors", "tokenizer_config.json", "settings.json", "metrics.jsonl"}
    assert names <= {path.name for path in out.iterdir()}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "settings.json").read_text())
    assert saved["settings"]["steps"] == 60
    assert saved["settings"]["batch_size"] == 4
    assert saved["corpus"]["held_out_bytes"] > 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 1
    assert rows[-1]["held_out_bits_per_byte"] > 0
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert len({path.stat().st_mode for path in out.iterdir() if path.is_file()}) == 1


def test_auto_classes_load_the_folder(trained):
    tokenizer, model = (kind.from_pretrained(trained[0]) for kind in (AutoTokenizer, AutoModelForCausalLM))
    ids = tokenizer("12 bottles", return_tensors="pt")
    assert type(model) is MhesaForCausalLM
    assert model.generate(**ids, max_new_tokens=5, do_sample=False).shape == (1, 15)


def test_generate_continues_a_prompt(trained, run):
    out, _ = trained
    alone = mhesa("generate", out, "--prompt", "7 bott", "--length", 40, "--seed", 3)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("7 bott")
    whole = alone.stdout.encode()
    assert run("generate", out, "--prompt", "7 bott", "--length", 40, "--seed", 3) == (0, whole, b"")
    _, piped, _ = run(
        "generate", out, "--prompt", "-", "--length", 40, "--seed", 3, "--no-echo", data=b"7 bott"
    )
    assert b"7 bott" + piped == whole
    first = alone.stdout[6]
    _, cut, _ = run("generate", out, "--prompt", "7 bott", "--length", 40, "--seed", 3, "--stop", first)
    assert cut == b"7 bott\n"


def test_eval_measures_files(trained, corpus, tmp_path, run):
    out, _ = trained
    (tmp_path / "noise.bin").write_bytes(os.urandom(5000))
    code, table, err = run("eval", out, corpus, tmp_path)
    assert code == 0, err
    assert b"perplexity" in table
    assert b"all" in table
    figures = json.loads(run("eval", out, corpus, "--json")[1])
    assert list(figures) == ["loss", "bits_per_byte", "perplexity", "tokens", "bytes"]
    assert figures["tokens"] == figures["bytes"] == len(TEXT)
    noise = json.loads(run("eval", out, tmp_path, "--json")[1])
    assert noise["bits_per_byte"] > 7 > figures["bits_per_byte"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_run_resumes_to_the_same_weights(trained, corpus, tmp_path, fails, number):
    whole, _ = trained
    out = tmp_path / "stopped"
    command = ["train", str(corpus), "--out", str(out), "--steps", "60", "--precision", "fp32", *TINY]
    process = StartedCommand(*command)
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text()) < 100:
        assert process.returncode is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Continue with: mhesa train --resume" in err
    assert (out / "model.safetensors").exists()

    refused = fails("train", "--resume", "--out", out, "--dim", 24)
    assert "has dim 16; it cannot be resumed with 24" in refused
    resumed = mhesa("train", "--resume", "--out", out)
    assert resumed.returncode == 0, resumed.stderr
    assert "goes on from step" in resumed.stderr
    expected, weights = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all((weights[name] == expected[name]).all() for name in expected)
    steps, expected_steps = (
        [(row["step"], row["loss"]) for row in rows(folder) if "loss" in row] for folder in (out, whole)
    )
    # Where the run was stopped a row was logged early, and its interval is parted in two.
    assert {step for step, _ in expected_steps} <= {step for step, _ in steps}
    assert steps[-1] == expected_steps[-1]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_minutes_are_a_budget_too(trained, corpus, tmp_path):
    done = mhesa("train", corpus, "--out", tmp_path / "timed", "--minutes", 0.02, *TINY)
    assert done.returncode == 0, done.stderr
    steps = [row for row in rows(tmp_path / "timed") if "loss" in row]
    # No step began after the time was over, however long the last one took.
    budget = 60 * 0.02
    assert steps[-1]["seconds"] >= budget
    assert all(row["seconds"] < budget for row in steps[:-1])
    # The rate of a step follows from the time before it: after the row above, and before its own.
    chosen = json.loads((tmp_path / "timed" / "settings.json").read_text())["settings"]
    for before, row in pairwise(row for row in steps if row["seconds"] > budget * chosen["warmup"]):
        latest, earliest = (
            learning_rate(each["seconds"] / budget, chosen["warmup"]) for each in (row, before)
        )
        assert latest - 0.02 < row["learning_rate"] / chosen["lr"] < earliest + 0.02


def test_bytes_that_are_no_text_are_trained_on(tmp_path):
    source = tmp_path / "latin1.txt"
    source.write_bytes("né\xff\x00".encode("latin-1") * 5000)
    done = mhesa("train", source, "--out", tmp_path / "run", "--steps", 2, *TINY)
    assert done.returncode == 0, done.stderr
    corpus = json.loads((tmp_path / "run" / "settings.json").read_text())["corpus"]
    assert corpus["training_bytes"] + corpus["held_out_bytes"] == 20_000


def test_settings_from_a_file_and_back(trained, tmp_path):
    out, _ = trained
    printed = mhesa("config", out)
    assert printed.returncode == 0, printed.stderr
    assert "batch-size: 4\n" in printed.stdout
    # Steps on the command line replace minutes in the file.
    (tmp_path / "run.yaml").write_text(re.sub("(?m)^steps: .*$", "minutes: 3", printed.stdout))
    done = mhesa(
        "train", "--config", tmp_path / "run.yaml", "--out", tmp_path / "run", "--seed", 1, "--steps", 5
    )
    assert done.returncode == 0, done.stderr
    saved, first = (
        json.loads((path / "settings.json").read_text())["settings"] for path in (tmp_path / "run", out)
    )
    assert saved == first | {"out": str(tmp_path / "run"), "seed": 1, "steps": 5}


def test_a_vocabulary_goes_with_the_model(corpus, tmp_path, run):
    out = tmp_path / "run"
    options = ["--tokenizer", "bpe:300", "--eval-every", 10, "--report-to", "tensorboard", "--dropout", 0.1]
    done = mhesa("train", corpus, "--out", out, "--steps", 20, *options, *TINY)
    assert done.returncode == 0, done.stderr
    assert "tokens (bpe:300), " in done.stderr
    assert "bits/byte held out" in done.stderr
    assert list(out.rglob("events.out.tfevents.*"))
    code, written, err = run("generate", out, "--prompt", "7 bott", "--length", 20, "--seed", 1)
    assert code == 0, err
    assert written.startswith(b"7 bott")
    figures = json.loads(run("eval", out, corpus, "--json")[1])
    assert figures["bytes"] == len(TEXT) > 2 * figures["tokens"]
    nats = figures["loss"] * figures["tokens"]
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--minuts", "3"], "--minuts"),
        (["train", "--steps", "many"], "invalid value for '--steps'"),
        (["train", "--steps"], "option '--steps' requires an argument"),
        (["generate"], "missing argument 'DIR'. See mhesa generate --help."),
        (["learn"], "no such command 'learn'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_be_parsed(fails, arguments, message):
    assert message in fails(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "nan"], "lr must be a number from 1e-30 to 1e30, not nan"),
        (["--lr", "-1"], "lr must be a number from 1e-30 to 1e30, not -1.0"),
        (["--muon-lr", "1e308"], "muon_lr must be a number from 1e-30 to 1e30, not 1e+308"),
        (["--holdout", "content:1e-320"], "F between 1e-9 and 1"),
        (["--lr", "1e999"], "lr must be a number from 1e-30 to 1e30, not inf"),
        (["--steps", "0"], "steps must be at least 1, not 0"),
        (["--minutes", "0"], "minutes must be a number from 1e-30 to 1e30, not 0.0"),
        (["--steps", "1", "--minutes", "1"], "steps or minutes as the budget, not both"),
        (["--dim", "0"], "dim must be at least 1, not 0"),
        (["--heads", "3"], "dim_mhesa must be divisible by heads, but 256 is not by 3"),
        (["--depth", "-1"], "must be at least 1, not -1"),
        (["--context", "1"], "context must be at least 2"),
        (["--context", "1000000"], "fewer than one window of 1,000,000"),
        (["--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--backend", "fast"], "unknown backend 'fast'; choose from"),
        (
            ["--backend", "triton"],
            "backend 'triton' cannot serve a cpu tensor with rates of every step here; these can: numba",
        ),
        (
            ["--tokenizer", "words"],
            "tokenizer must be bytes, bpe:N, or a folder or file with a tokenizer.json, not words",
        ),
        (["--precision", "fp8"], "precision must be one of auto, bf16, fp32, not fp8"),
        (["--device", "warp"], "unknown device 'warp'"),
        (["--holdout", "tail:2"], "holdout must be content:F or tail:F"),
        (["--tokenizer", "bpe:7"], "bpe:N needs N from 257 (256 bytes and end of text)"),
        (["--tokenizer", "bpe:many"], "bpe:N needs N from 257"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1, not 1.0"),
        (["--accumulate", "0"], "accumulate must be at least 1, not 0"),
        (["--batch-size", "5", "--accumulate", "2"], "batch_size 5 cannot be divided into 2 micro-batches"),
        (["--schedule", "linear"], "schedule must be one of cosine, wsd, not linear"),
        (["--clip", "0"], "clip must be a number from 1e-30 to 1e30, not 0.0"),
        (["--keep", "0"], "keep must be at least 1, not 0"),
        (["--eval-every", "-1"], "eval_every must be 0 or more, not -1"),
        (["--patience", "3"], "patience counts evaluations: also give eval_every"),
        (["--report-to", "paper"], "report_to must be one of none, tensorboard, wandb, trackio, not paper"),
        (["--batch-size", "1000000000"], "make batch_size or context smaller"),
        (["--dim", "1000000000"], "make dim, depth or dim_mhesa smaller"),
        (["--config", "missing.yaml"], "cannot read missing.yaml: No such file or directory"),
        (["--resume"], "holds no run"),
        (["--resume", "--overwrite"], "give --resume or --overwrite, not both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_training_leaves_no_folder(fails, corpus, tmp_path, arguments, message):
    out = tmp_path / "run"
    assert message in fails("train", corpus, "--out", out, *arguments)
    assert not out.exists()


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "short.txt", "empty"])
def test_a_refused_corpus_leaves_no_folder(fails, tmp_path, name):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty").mkdir()
    assert name in fails("train", tmp_path / name, "--out", tmp_path / "run") or name == "short.txt"
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_by_accident(fails, trained, corpus):
    out, _ = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "already holds a run" in fails("train", corpus, "--out", out, "--steps", 1)
    assert "is complete at step 60" in fails("train", "--resume", "--out", out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_overwrite_leaves_other_files_alone(corpus, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "metrics.jsonl").write_text("old")
    done = mhesa("train", corpus, "--out", out, "--steps", 1, "--overwrite", *TINY)
    assert done.returncode == 0, done.stderr
    assert (out / "notes.txt").read_text() == "mine"
    assert [row["step"] for row in rows(out)] == [1, 1]


def test_a_file_in_the_place_of_the_folder_is_refused(fails, corpus):
    assert "is a file" in fails("train", corpus, "--out", corpus)
    assert "cannot write to" in fails("train", corpus, "--out", corpus / "below")
    assert "out must name a folder" in fails("train", corpus, "--out", "")
    assert "give --out, the folder" in fails("train", corpus)


def test_other_text_does_not_resume_a_run(fails, trained, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    out, _ = trained
    # A pattern is kept as it was given, so what it matches can change.
    message = fails("train", other, "--resume", "--out", out, "--steps", 90)
    assert "sources" in message


@pytest.fixture
def saved(tmp_path):
    """A folder with an untrained model in it."""
    folder = tmp_path / "model"
    MhesaForCausalLM(MhesaConfig(hidden_size=16, num_hidden_layers=1, heads=2, dim_mhesa=8)).save_pretrained(
        folder
    )
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(**values):
    def apply(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", lambda path: path.unlink(), "is not a model's folder: it has no config.json"),
        ("config.json", truncate, "config.json is damaged"),
        ("config.json", edit(model_type="gpt2"), "holds a model of type gpt2, not mhesa"),
        ("config.json", edit(heads=3), "config.json does not describe a model: dim_mhesa must be divisible"),
        ("config.json", edit(hidden_size=32), "does not fit config.json: mismatched keys"),
        ("config.json", edit(num_hidden_layers=2), "does not fit config.json: missing keys"),
        (
            "model.safetensors",
            lambda path: path.unlink(),
            "is not a whole model: it has no model.safetensors",
        ),
        ("model.safetensors", truncate, "model.safetensors is damaged"),
        ("model.safetensors", lambda path: path.write_bytes(b"not tensors"), "model.safetensors is damaged"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_damaged_model_is_named(fails, saved, corpus, command, name, damage, message):
    damage(saved / name)
    arguments = [corpus] if command == "eval" else []
    assert message in fails(command, saved, *arguments)


def test_a_missing_model_is_named(fails, tmp_path):
    assert "no such folder" in fails("generate", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--top-k", "-5"], "top_k must be 0 or more"),
        (["--length", "-1"], "length must be 0 or more"),
        (["--backend", "fast"], "unknown backend 'fast'; choose from"),
        (["--backend", "triton"], "backend 'triton' cannot serve a cpu tensor here"),
        (["--device", "warp"], "unknown device 'warp'"),
    ],
)
def test_invalid_arguments_of_generate_are_refused(fails, saved, arguments, message):
    assert message in fails("generate", saved, *arguments)


@pytest.mark.parametrize("command", ["train", "generate", "eval", "score", "config", "serve"])
def test_help_has_examples(command):
    done = mhesa(command, "--help")
    assert done.returncode == 0
    assert f"mhesa {command} " in done.stdout
    assert "Examples" in done.stdout
