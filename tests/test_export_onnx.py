"""ONNX graphs by onnxruntime give the model's results, for any batch and length."""

import copy
import importlib.util

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from serving import WORDS, save_model

from mhesa import Decoder, load
from mhesa.errors import InputError
from mhesa.export.onnx import export_onnx
from mhesa.inference.decoder.matmul import quantize
from mhesa.model.config import ModelConfig
from mhesa.model.loading import save
from mhesa.tokenizers import Bytes, train_bpe

NAMES = ["prefill.int8.onnx", "prefill.onnx", "step.int8.onnx", "step.onnx"]


def runner(folder, name):
    session = onnxruntime.InferenceSession(folder / name)
    assert [value.name for value in session.get_inputs()] == ["ids", "state"]

    def run(ids, state):
        found = session.run(["logits", "new_state"], {"ids": ids.numpy(), "state": state.numpy()})
        return [torch.from_numpy(value) for value in found]

    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of bf16 weights, rates of every step and a convolution, and the folder of its graphs."""
    torch.manual_seed(0)
    sizes = {"dim": 24, "dim_mhesa": 20, "heads": 4, "depth": 2}
    model = ModelConfig(**sizes, adaptive=True, conv_size=4).build().eval().bfloat16()
    folder = tmp_path_factory.mktemp("graphs")
    assert sorted(path.name for path in export_onnx(model, folder)) == NAMES
    return model.float(), folder


@torch.no_grad()
def test_graphs_continue_a_text_as_the_model_does(exported):
    model, folder = exported
    ids = torch.randint(257, (4, 150))
    expected, state = model(ids, return_state=True)
    prefill, step = (runner(folder, name) for name in ("prefill.onnx", "step.onnx"))
    first, middle = prefill(ids[:, :149], model.initial_state(4))
    last, final = step(ids[:, 149], middle)
    found = torch.cat([first, last[:, None]], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(final, state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_int8_graphs_are_the_model_with_the_decoders_weights(exported):
    model, folder = exported
    ids = torch.randint(257, (1, 60))
    rounded = copy.deepcopy(model).double()
    layers = [layer for layer in rounded.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        matrix, scales = quantize(layer.weight)
        layer.weight.copy_(matrix * scales[:, None])
    found, _ = runner(folder, "prefill.int8.onnx")(ids, model.initial_state(1))
    torch.testing.assert_close(found[0].double(), rounded(ids)[0], atol=1e-4, rtol=0)
    assert (found[0] - model(ids)[0]).abs().max() > 1e-3
    # The decoder rounds rows to 8 bits too.
    decoder = Decoder(model, quantize="int8")
    theirs = decoder.predict(ids[0], decoder.initial_state(1))
    torch.testing.assert_close(found[0], theirs, atol=5e-2, rtol=0)
    stored = onnx.load(folder / "step.int8.onnx").graph.initializer
    eight_bits = sum(np.prod(one.dims) for one in stored if one.data_type == onnx.TensorProto.INT8)
    assert eight_bits == sum(layer.weight.numel() for layer in layers)


@torch.no_grad()
def test_the_command_exports_fixed_rates_and_a_vocabulary_too(run, tmp_path):
    folder = save_model(tmp_path / "bpe", train_bpe([WORDS.encode()] * 9, 300))
    code, out, err = run("export", folder, "--onnx", tmp_path / "out", "--opset", "18")
    assert (code, err) == (0, b""), err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NAMES
    assert all(name.encode() in out for name in NAMES)
    graph = onnx.load(tmp_path / "out" / "step.onnx")
    assert graph.opset_import[0].version == 18
    model, _ = load(folder)
    ids, state = torch.tensor([5]), model.initial_state(1)
    logits, _ = runner(tmp_path / "out", "step.onnx")(ids, state)
    torch.testing.assert_close(logits, model.step(ids, state)[0], atol=1e-4, rtol=0)


def test_a_refused_export_is_one_line(run, tmp_path, monkeypatch):
    model = ModelConfig(dim=16, dim_mhesa=8, depth=1).build()
    save(model, Bytes(), tmp_path / "model")
    code, out, err = run("export", tmp_path / "model", "--onnx", tmp_path / "out", "--opset", "9")
    assert (code, out, err.count(b"\n")) == (2, b"", 1)
    assert b"opset must be 18 to" in err
    # Known to onnx, and not to the exporter.
    newest = onnx.defs.onnx_opset_version()
    code, out, err = run("export", tmp_path / "model", "--onnx", tmp_path / "out", "--opset", newest)
    assert (code, out, err.count(b"\n")) == (2, b"", 1), err
    assert f"cannot make opset {newest}".encode() in err
    code, out, err = run("export", tmp_path / "model", "--web", tmp_path / "out", "--opset", "18")
    assert (code, out, err) == (2, b"", b"Error: --opset needs --onnx\n")
    assert not (tmp_path / "out").exists()
    model.layers[0].to_out.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="weights are not finite"):
        export_onnx(model, tmp_path / "out")
    find = importlib.util.find_spec
    monkeypatch.setattr("mhesa.export.onnx.find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(InputError, match=r"ONNX needs onnx; install them: pip install 'mhesa\[onnx\]'"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
