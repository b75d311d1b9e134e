"""Programs of others that know nothing of mhesa.

`trust_remote_code=True` is enough for transformers' own classes, trl, torchao and lm-evaluation-harness.
"""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from serving import WORDS, running, save_model

from mhesa import Reader, Sampling, Session, generate, load, remote_code
from mhesa.tokenizers import train_bpe

PROMPT = "7 né"
# Is refused a folder without the user's word; writes with it by a pipeline, and saves each folder again.
PIPELINES = """
import json, sys
from transformers import AutoModelForCausalLM, pipeline
prompt, *folders = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folders[0], trust_remote_code=False)
except ValueError:
    assert "mhesa" not in sys.modules
else:
    sys.exit("code of a folder was imported without leave")
for folder in folders:
    write = pipeline("text-generation", model=folder, trust_remote_code=True)
    [text] = write(prompt, max_new_tokens=20, do_sample=False, return_full_text=False)
    write.model.save_pretrained(f"{folder}-copy")
    write.tokenizer.save_pretrained(f"{folder}-copy")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}-copy", trust_remote_code=True)
    print(json.dumps([type(again).__module__, text["generated_text"]]))
"""
# Trains on lines by trl, with the options of its own command.
SFT = """
import sys
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
folder, out = sys.argv[1:]
settings = SFTConfig(
    output_dir=out, model_init_kwargs={"trust_remote_code": True}, trust_remote_code=True, use_cpu=True,
    max_steps=20, learning_rate=1e-2, max_length=64, per_device_train_batch_size=8, logging_steps=5,
    report_to="none",
)
texts = Dataset.from_dict({"text": [f"{n} is followed by {n + 1}\\n" for n in range(200)]})
trainer = SFTTrainer(model=folder, args=settings, train_dataset=texts)
trainer.train()
trainer.save_model(out)
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
assert losses[-1] < 0.7 * losses[0], losses
"""
INT8 = """
import sys, torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    before = model(ids).logits
    quantize_(model, Int8WeightOnlyConfig())
    after = model(ids).logits
assert "Int8Tensor" in type(model.model.layers[0].to_gate.weight).__name__
error = ((after - before).norm() / before.norm()).item()
assert 0 < error < 0.02, error
import mhesa
plain, _ = mhesa.load(sys.argv[1])
quantize_(plain, Int8WeightOnlyConfig())
with torch.no_grad():
    logits = mhesa.Decoder(plain).predict(ids[0], plain.initial_state(1))
    torch.testing.assert_close(logits, plain(ids[:1])[0], rtol=1e-4, atol=1e-4)
"""
# Without the harness's own tasks, whose 14,000 files take it 15 seconds to read.
HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
model, arguments, tasks, out, *names = sys.argv[1:]
found = simple_evaluate(
    model=model, model_args=arguments, tasks=names, device="cpu", log_samples=True,
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
)
with open(out, "w") as file:
    json.dump(found["samples"], file)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of bytes and one with a vocabulary."""
    root = tmp_path_factory.mktemp("programs")
    words = train_bpe([WORDS.encode()] * 9, 300)
    return {"bytes": save_model(root / "bytes"), "bpe": save_model(root / "bpe", words)}


# Runs each program in a process forked after the imports, which take it several seconds. Answers with the
# number of the program and its status.
FORKS = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import datasets, lm_eval.evaluator, torchao.quantization, transformers.generation, trl
from trl import SFTTrainer
assert "mhesa" not in sys.modules
for line in sys.stdin:
    number, code, *arguments = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for stream in (1, 2):
            os.dup2(os.open(arguments.pop(0), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv[1:] = arguments
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    print(json.dumps([number, os.waitpid(pid, 0)[1]]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """The process that programs are forked from, which has no network."""
    home = tmp_path_factory.mktemp("home")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, env=os.environ | offline, start_new_session=True, **pipes) as process:
        yield process
        # With a program that has not ended.
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def program(forks, tmp_path):
    """Run a Python program; what it prints."""
    out, err, numbers = tmp_path / "stdout", tmp_path / "stderr", itertools.count()

    def run(code, *arguments):
        number = f"{tmp_path} {next(numbers)}"
        forks.stdin.write(json.dumps([number, code, *map(str, (out, err, *arguments))]) + "\n")
        forks.stdin.flush()
        assert json.loads(forks.stdout.readline()) == [number, 0], err.read_text()[-4000:]
        return out.read_text()

    return run


def test_transformers_writes_by_a_folder_and_saves_it_again(folders, program, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / kind) for kind, folder in folders.items()]
    for where, line in zip(copies, program(PIPELINES, PROMPT, *copies).splitlines(), strict=True):
        model, tokenizer = load(where)
        ids = torch.from_numpy(tokenizer.encode_bytes(PROMPT.encode()).astype("int64"))
        [new] = generate(model, [ids], max_new_tokens=20, sampling=Sampling(temperature=0))
        text = tokenizer.decode_bytes(new.tolist()).decode("utf-8", "replace")
        assert json.loads(line) == ["mhesa.hf.modeling", text]
        copy = where.with_name(f"{where.name}-copy")
        for saved in (where, copy):
            assert [path.name for path in saved.glob("*.py")] == [remote_code.FILE]
            assert (saved / remote_code.FILE).read_text() == remote_code.SOURCE
        assert torch.equal(load(copy)[0](ids[None]), model(ids[None]))


def test_trl_trains_on_texts(folders, program, tmp_path):
    program(SFT, folders["bytes"], tmp_path / "out")
    trained, untrained = (bits(folder) for folder in (tmp_path / "out", folders["bytes"]))
    assert trained < 0.7 * untrained


def test_torchao_holds_weights_in_8_bits(folders, program):
    program(INT8, folders["bytes"])


def bits(folder: Path) -> float:
    """What a line as those of `SFT` costs."""
    return Session(Reader(*load(folder))).score("5 is followed by 6\n").sum()


# lm-evaluation-harness

# No text ends with a space: the harness would move it to the options. No two questions read the same: it
# would take the answer to the first for both.
WORDS_AND_SPACES = re.findall(r" *[^ ]+", " ".join(WORDS.split() * 3))
QUESTIONS = [
    {
        "text": "".join(WORDS_AND_SPACES[:count]),
        "options": ["".join(WORDS_AND_SPACES[count : count + 5]), " x", " ü"],
    }
    for count in range(1, 21)
]
DOCUMENTS = [{"text": WORDS * 2}, {"text": "a second text\nof two lines"}]
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rolling.json}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of 60 log-likelihoods and one of two whole texts."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in {"choices": QUESTIONS, "rolling": DOCUMENTS}.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(TASKS[name].format(folder=folder))
    return folder


@pytest.fixture
def harness(program, tasks, tmp_path):
    """Run lm-evaluation-harness: each log-likelihood by task."""

    def run(model, arguments):
        program(HARNESS, model, arguments, tasks, tmp_path / "samples", *TASKS)
        found = {}
        for name, rows in json.loads((tmp_path / "samples").read_text()).items():
            rows.sort(key=lambda row: row["doc_id"])
            answers = [answer[0] for row in rows for answer in row["resps"]]
            found[name] = [float(answer[0] if isinstance(answer, list) else answer) for answer in answers]
        return found

    return run


def encode(tokenizer, text):
    return torch.from_numpy(tokenizer.encode_bytes(text.encode()).astype("int64"))


def expected(folder, bits_of):
    """The log-likelihoods of all options by a function that gives the bits of each token of a text."""
    tokenizer = load(folder)[1]
    answers = []
    for question in QUESTIONS:
        for option in question["options"]:
            # Text and option are tokenized as one.
            bits = bits_of(encode(tokenizer, question["text"] + option))
            known = len(encode(tokenizer, question["text"]))
            answers.append(-math.log(2) * float(bits[known:].sum()))
    return answers


def expected_rolling(folder):
    reader = Reader(*load(folder))
    return [-math.log(2) * Session(reader).score(document["text"]).sum() for document in DOCUMENTS]


@torch.no_grad()
def test_lm_eval_reads_a_folder(folders, harness):
    folder = folders["bytes"]
    found = harness("hf", f"pretrained={folder},trust_remote_code=True")
    model = load(folder)[0].double()

    def bits_of(ids):
        # The harness puts no end-of-text token before a text, so that the first token has no prediction.
        nats = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")
        return F.pad(nats / math.log(2), (1, 0))

    assert found["choices"] == pytest.approx(expected(folder, bits_of), rel=1e-6)
    assert found["rolling"] == pytest.approx(expected_rolling(folder), rel=1e-6)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_lm_eval_asks_a_server(folders, harness, tmp_path, kind):
    folder = folders[kind]
    with running(folder, tmp_path / "log", keys={}) as server:
        model = f"model=tiny,base_url={server.url}/v1/completions,tokenizer_backend=remote"
        found = harness("local-completions", model)
    reader = Reader(*load(folder))
    scores = expected(folder, lambda ids: Session(reader).score_ids(ids))
    assert found["choices"] == pytest.approx(scores, abs=1e-4)
    assert found["rolling"] == pytest.approx(expected_rolling(folder), abs=1e-4)
