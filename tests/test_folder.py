"""A model's folder, read without transformers; what transformers makes of it is the oracle."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from commands import ordinary_user
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoTokenizer

import mhesa
from mhesa.errors import InputError
from mhesa.hf import ByteTokenizer, MhesaConfig, MhesaForCausalLM
from mhesa.inference.session import fingerprint
from mhesa.model.loading import load, load_tokenizer
from mhesa.tokenizers import Bytes, TextTokenizer, train_bpe

TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    config = MhesaConfig(hidden_size=16, num_hidden_layers=2, heads=2, dim_mhesa=8, dim_expansion_factor=1.5)
    MhesaForCausalLM(config).save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **values):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def assert_loads_as_transformers_does(folder):
    plain, _ = load(folder)
    theirs = MhesaForCausalLM.from_pretrained(folder).to_plain().eval()
    assert not plain.training
    ours, expected = plain.state_dict(), theirs.state_dict()
    assert list(ours) == list(expected)
    for name, weight in expected.items():
        assert ours[name].dtype == weight.dtype, name
        assert torch.equal(ours[name], weight), name
    assert fingerprint(plain) == fingerprint(theirs)
    assert (plain.to_logits.weight is plain.token_emb.weight) == (
        theirs.to_logits.weight is theirs.token_emb.weight
    )
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in theirs.parameters()]
    ids = torch.randint(256, (2, 9))
    assert torch.equal(plain(ids), theirs(ids))


def test_a_model_that_is_replaced_leaves_nothing_behind(tmp_path):
    def model(tokens):
        return mhesa.GatedExponentialSmoothingLM(num_tokens=tokens, dim=8, depth=1, heads=1, dim_mhesa=4)

    mhesa.save(model(300), train_bpe([b"a text of words"] * 9, 300), tmp_path)
    (tmp_path / "notes.txt").write_text("not of the model")
    mhesa.save(model(257), Bytes(chat_template=TEMPLATE), tmp_path)
    tokenizer = load(tmp_path)[1]
    assert isinstance(tokenizer, Bytes)
    assert tokenizer.chat_template == TEMPLATE
    mhesa.save(model(257), Bytes(), tmp_path)
    assert load(tmp_path)[1].chat_template is None
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("named", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("told", ["float32", "bfloat16"])
def test_weights_and_their_types(folder, named, saved, told):
    def cast(weights):
        for name, weight in weights.items():
            weights[name] = weight.to(saved)

    change_weights(folder, cast)
    edit(folder, **{"dtype": ...} | ({named: told} if named else {}))
    assert_loads_as_transformers_does(folder)


def test_the_plain_models_names_are_read(folder):
    edit(folder, hidden_size=..., num_hidden_layers=..., dim=16, depth=2)
    assert_loads_as_transformers_does(folder)


@pytest.mark.parametrize("missing", ["to_logits.weight", "model.token_emb.weight", "none, and equal", "none"])
def test_tied_embeddings(folder, missing):
    def tie(weights):
        if missing != "none":
            weights["to_logits.weight"] = weights["model.token_emb.weight"].clone()
        weights.pop(missing, None)

    change_weights(folder, tie)
    edit(folder, tie_word_embeddings=True)
    assert_loads_as_transformers_does(folder)


def test_weights_do_not_alias_the_file(folder):
    model, _ = load(folder)
    before = fingerprint(model)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "model.safetensors does not fit config.json"),
        (
            {"vocab_size": 10**30},
            "config.json does not describe a model: vocab_size must fit in 64 bits",
        ),
        ({"hidden_size": 2**40}, "model.safetensors does not fit config.json"),
        ({"dim_mhesa": 2**62}, "model.safetensors does not fit config.json"),
        ({"dim_expansion_factor": 1e15}, "model.safetensors does not fit config.json"),
        ({"dim_expansion_factor": 1e300}, "config.json does not describe a model: dim_expansion_factor"),
        (
            {"dim_expansion_factor": float("inf")},
            "config.json does not describe a model: dim_expansion_factor",
        ),
        ({"dtype": "float8_e4m3fn"}, "config.json does not describe a model: dtype must be one of"),
        ({"dtype": ["float32"]}, "config.json does not describe a model: dtype must be one of"),
        ({"tie_word_embeddings": "no"}, "config.json does not describe a model: tie_word_embeddings must be"),
        ({"heads": None}, "config.json does not describe a model: heads must be a whole number"),
        ({"model_type": ["mhesa"]}, "holds a model of type"),
    ],
    ids=str,
)
def test_forged_sizes_are_refused_before_they_cost_anything(folder, values, message):
    edit(folder, **values)
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.fixture
def parts(folder):
    """A folder whose weights are in several files."""
    MhesaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "model.safetensors").unlink()
    return folder


def test_weights_in_several_files(parts):
    assert_loads_as_transformers_does(parts)


def test_damaged_weights_in_several_files_are_named(parts):
    index = parts / "model.safetensors.index.json"
    whole = index.read_text()
    for text in ("[" * 100_000, "", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "\x00"):
        index.write_text(text)
        with pytest.raises(InputError, match=r"index\.json is damaged"):
            load(parts)
    for name in (f"../{parts.name}/a.safetensors", "/etc/passwd", "..", "", "missing.safetensors"):
        index.write_text(json.dumps({"weight_map": {"to_logits.weight": name}}))
        with pytest.raises(InputError, match=r"index\.json is damaged"):
            load(parts)
    index.write_text(whole)
    part = sorted(parts.glob("model-*.safetensors"))[0]
    save_file({}, part)
    with pytest.raises(InputError, match=r"index\.json does not fit config\.json: missing keys: "):
        load(parts)
    part.unlink()
    with pytest.raises(InputError, match=rf"index\.json is damaged: .*{part.name}"):
        load(parts)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "", "\x00", '{"model_type": "mhesa"', "\udcff"])
def test_a_damaged_configuration_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"config.json is damaged|holds a model of type"):
        load(folder)


def test_weights_that_cannot_be_read_are_not_called_damaged(folder):
    with TemporaryDirectory() as place:  # pytest's own are closed to other users
        os.chmod(place, 0o755)
        load(folder)  # imports what another user may not be allowed to
        copied = Path(shutil.copytree(folder, Path(place) / "model"))
        copied.chmod(0o755)
        (copied / "model.safetensors").chmod(0o000)
        with (
            ordinary_user(),
            pytest.raises(InputError, match=r"cannot read .*: Permission denied"),
        ):
            load(copied)
        copied.chmod(0o000)
        with ordinary_user(), pytest.raises(InputError, match=r"cannot read .*: Permission denied"):
            load(copied)
        copied.chmod(0o755)


def test_a_run_without_a_model_is_named(folder):
    (folder / "config.json").unlink()
    (folder / "settings.json").write_text("{}")
    with pytest.raises(
        InputError, match=rf"no model yet: wait for .* start over with train --overwrite --out {folder}"
    ):
        load(folder)
    (folder / "checkpoints" / "step-10").mkdir(parents=True)
    with pytest.raises(
        InputError, match=rf"no model yet: wait for .* go on with train --resume --out {folder}"
    ):
        load(folder)


def test_every_damaged_header_is_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(header * 8, (300,), generator=generator).tolist()
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        # A flip may leave a header that says the same.
        with suppress(InputError):
            load(folder)
    for size in (0, 7, 8, 100, header, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model.safetensors is damaged"):
            load(folder)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_integer_weights_are_refused(folder, dtype):
    path = folder / "model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in load_file(path).items()}, path)
    with pytest.raises(InputError, match=rf"safetensors is damaged: .* is of type {dtype}"):
        load(folder)


def test_complex_weights_are_refused(folder):
    # Written by hand: safetensors cannot write complex numbers before 0.7, and refuses to read them.
    path = folder / "model.safetensors"
    header, start = {}, 0
    for name, weight in load_file(path).items():
        end = start + 8 * weight.numel()
        header[name] = {"dtype": "C64", "shape": list(weight.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(start))
    with pytest.raises(InputError, match=r"safetensors is damaged: .*([hH]eader|complex64)"):
        load(folder)


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_code_of_a_folder_runs(folder):
    sung = folder / "sung"
    (folder / "canary.py").write_text(f"open({str(sung)!r}, 'w')\nclass Model: pass\n")
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Canary(sung)))
    edit(folder, auto_map={"AutoConfig": "canary.Model", "AutoModelForCausalLM": "canary.Model"})
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["canary.Model", None]}}
    path.write_text(json.dumps(values))
    load(folder)
    assert not sung.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"it has no model.safetensors"):
        load(folder)
    assert not sung.exists()


def test_bytes_without_tokens_of_their_own_are_plain(folder):
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is Bytes
    data = bytes(range(256)) + b"<|endoftext|>"
    assert tokenizer.encode_bytes(data).tolist() == theirs.encode_bytes(data).tolist() == list(data)
    ids = [*range(256), 256, 97]
    assert tokenizer.decode_bytes(ids) == theirs.decode_bytes(ids)
    assert tokenizer.decode_bytes(torch.tensor(ids)) == theirs.decode_bytes(ids)
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.chat_template) == (
        len(theirs),
        theirs.eos_token,
        theirs.eos_token_id,
        theirs.chat_template,
    )
    for bad in (-1, 257):
        with pytest.raises(ValueError, match=f"no token has the id {bad}; the largest is 256"):
            tokenizer.decode_bytes([97, bad])


def test_plain_bytes_are_saved_for_transformers(tmp_path):
    Bytes().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ByteTokenizer
    assert type(load_tokenizer(tmp_path)) is Bytes


def added(tokenizer):
    tokenizer.add_tokens(["é", AddedToken("<|tool|>", special=True)])


def told_to_end(tokenizer):
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})


def chatting(tokenizer):
    tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize("change", [added, told_to_end, chatting])
def test_bytes_with_more_are_transformers_own(tmp_path, change):
    saved = ByteTokenizer()
    change(saved)
    saved.save_pretrained(tmp_path)
    tokenizer, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, Bytes)
    assert len(tokenizer) == len(theirs) == len(saved)
    assert tokenizer.eos_token_id == theirs.eos_token_id == saved.eos_token_id
    ids = [97, *range(256, len(saved))]
    assert tokenizer.decode_bytes(ids) == theirs.decode_bytes(ids) == saved.decode_bytes(ids)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "hello"}]
        expected = theirs.apply_chat_template(messages, return_dict=False)
        assert tokenizer.apply_chat_template(messages) == expected == [*b"hello", 256]


def test_reading_and_writing_import_little(folder, tmp_path_factory):
    words = tmp_path_factory.mktemp("words")
    vocabulary = train_bpe([b"once upon a time there was a word " * 9], 280)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "heads": 2, "dim_mhesa": 8}
    config = MhesaConfig(vocab_size=280, **sizes, adaptive=True, conv_size=3)
    MhesaForCausalLM(config).save_pretrained(words)
    TextTokenizer(vocabulary.tokenizer, chat_template=TEMPLATE).save_pretrained(words)
    code = (
        "import atexit, sys, mhesa, mhesa.cli\n"
        "for folder in sys.argv[1:]:\n"
        "    session = mhesa.Session(mhesa.Reader(*mhesa.load(folder)))\n"
        "    session.score('once'), session.generate(max_new_tokens=3, seed=1)\n"
        "slow = {'transformers', 'pandas', 'sympy', 'torch._dynamo', 'torch.distributed.tensor'}\n"
        "atexit.register(lambda: print(sorted(slow & set(sys.modules))))\n"
        "sys.argv[1:] = ['generate', sys.argv[1], '--length', '0']\n"
        "mhesa.cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, words], capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    ids = load_tokenizer(words).apply_chat_template([{"role": "user", "content": "once"}])
    theirs = AutoTokenizer.from_pretrained(words)
    assert ids == theirs.apply_chat_template([{"role": "user", "content": "once"}], return_dict=False)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["generate", "--help"], 0),
        (["score", "nowhere"], 2),
        (["eval"], 2),
    ],
    ids=str,
)
def test_commands_without_a_model_import_no_torch(arguments, code):
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from mhesa.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith("False\n")


def test_every_public_name_is_there():
    for name in mhesa.__all__:
        assert getattr(mhesa, name).__name__ == name
    lazy = {name for names in mhesa._LAZY_EXPORTS.values() for name in names}
    assert set(mhesa.__all__) == lazy <= set(dir(mhesa))
