"""Saved folders in programs that never import `mhesa.hf`: `trust_remote_code=True` is enough."""

import json
import os
import subprocess
import sys

import torch
from serving import WORDS, save_model

from mhesa import Sampling, generate, load, remote_code
from mhesa.model.loading import save
from mhesa.tokenizers import train_bpe

PROMPT = "7 né"
# Is refused each folder without the user's word; writes with it by a pipeline, and saves it again.
PROGRAM = """
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


def test_a_program_that_knows_nothing_of_mhesa_loads_a_folder(folder, tmp_path):
    save(*load(folder), tmp_path / "bytes")
    folders = [tmp_path / "bytes", save_model(tmp_path / "bpe", train_bpe([WORDS.encode()] * 9, 300))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, PROMPT, *map(str, folders)],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    for where, line in zip(folders, done.stdout.splitlines(), strict=True):
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
