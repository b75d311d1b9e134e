"""The core where transformers and accelerate are not installed: importing them fails."""

import json
import signal

import httpx
import pytest
import torch
from commands import StartedCommand, run_code
from transformers import AutoModelForCausalLM, AutoTokenizer

import mhesa
import mhesa.hf

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
TEXT = "".join(f"{index} bottles of beer on the wall, {index} bottles of beer.\n" for index in range(3000))
TINY = {"dim": 16, "depth": 2, "heads": 2, "dim-mhesa": 8, "context": 32, "batch-size": 4}


# Runs several commands in one process, and prints a line of its own after each.
COMMANDS = """
import json
from mhesa import cli
assert not {"transformers", "accelerate"} & sys.modules.keys()
for arguments in json.loads(LINES):
    sys.argv = ["mhesa", *arguments]
    try:
        cli.main()
    except SystemExit as error:
        if error.code:
            raise
    print(flush=True)
    print("=" * 40, flush=True)
"""


def run_commands(*lines):
    """Run commands where transformers cannot be imported; what each of them printed."""
    given = json.dumps([[str(argument) for argument in line] for line in lines])
    printed, _ = run_code(f"{BLOCKER}\nLINES = {given!r}\n{COMMANDS}")
    return printed.split("\n" + "=" * 40 + "\n")[:-1]


KINDS = ["bytes", "bpe:300"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind of tokenizer, what each command printed of it, and the text that it read."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "bottles.txt"
    text.write_text(TEXT)
    options = [f"--{name}={value}" for name, value in TINY.items()]
    lines = []
    for number, kind in enumerate(KINDS):
        run = folder / str(number)
        train = [
            "train",
            text,
            "--out",
            run,
            "--steps",
            20,
            "--eval-every",
            10,
            "--tokenizer",
            kind,
            *options,
        ]
        lines += [
            train,
            ["config", run],
            ["generate", run, "--prompt", "7 bott", "--length", 20, "--seed", 1],
            ["eval", run, text, "--json"],
            ["score", run, text],
            ["train", "--resume", "--out", run, "--steps", 22],
        ]
    printed = run_commands(*lines)
    return {
        kind: (folder / str(number), printed[number * 6 : number * 6 + 6])
        for number, kind in enumerate(KINDS)
    }


@pytest.fixture(params=KINDS)
def trained(request, runs):
    """One of them."""
    return runs[request.param]


@pytest.mark.parametrize("name", ["transformers", "accelerate"])
def test_transformers_is_not_there(name):
    tried = f"try:\n    import {name}\nexcept ModuleNotFoundError:\n    print('not there')"
    assert run_code(f"{BLOCKER}\n{tried}")[0] == "not there\n"


def test_every_command_works(trained):
    _, (written, config, generated, evaluated, scored, _) = trained
    assert "held-out text" in written
    assert "dim: 16\n" in config
    assert generated.startswith("7 bott")
    assert json.loads(evaluated)["bytes"] == len(TEXT)
    assert "bottles of beer" in scored


def test_a_server_completes(trained):
    run, _ = trained
    process = StartedCommand("serve", run, "--port", 0, code=f"{BLOCKER}\nfrom mhesa import cli\ncli.main()")
    try:
        url = next(json.loads(line)["url"] for line in process.stderr if b'"listening"' in line)
        body = {"model": run.name, "prompt": "7 bott", "max_tokens": 5, "seed": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 5
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(40) == 0
    finally:
        process.send_signal(signal.SIGKILL)


def test_transformers_reads_a_model_trained_without_it(trained):
    run, _ = trained
    plain, tokenizer = mhesa.load(run)
    model, theirs = (kind.from_pretrained(run) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert type(model) is mhesa.hf.MhesaForCausalLM
    assert model.config.architectures == ["MhesaForCausalLM"]
    assert model.config.use_cache is True
    assert model.generation_config.use_cache is not False
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == theirs.eos_token_id
    assert theirs.bos_token_id == tokenizer.eos_token_id
    # Bytes have no room for a padding token of their own.
    assert theirs.pad_token in ("<|endoftext|>", "<|padding|>")
    assert (theirs.pad_token == "<|endoftext|>") == (len(theirs) == 257)
    assert theirs.padding_side == "left"
    text = "7 bottles of beer, naïvely"
    ids = tokenizer.encode_bytes(text.encode()).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits, plain(torch.tensor([ids])))
