"""A model as ONNX graphs, for onnxruntime and what else reads them.

`step.onnx` reads one token of each sequence. `prefill.onnx` reads many: the step's graph is the body of its
`Scan`, so its results are the step's, whatever batch and length. In the int8 files matrices are stored in 8
bits with a scale for each output, as in `Decoder(quantize="int8")`, and a runtime multiplies in fp32.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhesa.atomic_io import make_folder, write_file
from mhesa.errors import InputError
from mhesa.export.checks import check_finite
from mhesa.inference.decoder.matmul import quantize
from mhesa.model.lm import GatedExponentialSmoothingLM

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# The oldest operator set with everything the graphs hold, as torch exports it.
OLDEST_OPSET = 18
DEFAULT_OPSET = 20
# How far logits and states may be from the model's, as a part of the largest (of 1 at least).
TOLERANCE = 1e-4
# Batches and lengths to compare the graphs with the model on; the first is that of the export.
SHAPES = ((2, 3), (1, 1), (3, 70))


def export_onnx(
    model: GatedExponentialSmoothingLM, folder: str | Path, *, opset: int = DEFAULT_OPSET
) -> list[Path]:
    """Write the model as ONNX graphs with dynamic batch and length, after comparing them with the model.

    `step.onnx` and `step.int8.onnx` take `ids`, int64 `(batch,)`, and `state`, fp32 `(depth, batch,
    state_size)` as `initial_state` gives it; they return `logits`, `(batch, num_tokens)`, and `new_state`.
    `prefill.onnx` and `prefill.int8.onnx` take `ids` `(batch, length)` and return `logits`
    `(batch, length, num_tokens)`.

    Args:
        model: the language model; it is exported in fp32.
        folder: folder to write to; it is made if it is not there.
        opset: the ONNX operator set.

    Returns:
        The paths of the four files.

    Raises:
        InputError: a package of `mhesa[onnx]` is missing, it does not know the operator set, the model is too
            large for one file, its weights are not finite, or a graph's results are not the model's.
        OSError: a file cannot be written.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise InputError(f"ONNX needs {' and '.join(missing)}; install them: pip install 'mhesa[onnx]'")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"opset must be {OLDEST_OPSET} to {newest}, not {opset}")
    if 4 * sum(weight.numel() for weight in model.parameters()) >= onnx.checker.MAXIMUM_PROTOBUF:
        raise InputError("the model is too large for one ONNX file, which holds 2 GB")
    check_finite(model)
    model = copy.deepcopy(model).float().cpu().eval()
    rounded = copy.deepcopy(model)
    for _, layer in _matrices(rounded):
        matrix, scales = quantize(layer.weight.detach())
        layer.weight = nn.Parameter(matrix * scales[:, None])
    step = _step_graph(model, opset)
    made_for = max(one.version for one in step.opset_import if one.domain == "")
    if made_for != opset:
        raise InputError(f"torch.onnx of this environment cannot make opset {opset}; take a lower one")
    graphs: dict[str, Any] = {}
    for kind, graph, oracle in (("", step, model), (".int8", _in_int8(step, model), rounded)):
        made = {f"step{kind}.onnx": graph, f"prefill{kind}.onnx": _prefill_graph(graph)}
        _compare(made, oracle)
        graphs |= made
    make_folder(Path(folder))
    for name, graph in graphs.items():
        with write_file(Path(folder) / name) as file:
            file.write(graph.SerializeToString())
    return [Path(folder) / name for name in graphs]


class _Step(nn.Module):
    def __init__(self, model: GatedExponentialSmoothingLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.step(ids, state)


def _matrices(model: GatedExponentialSmoothingLM) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def _step_graph(model: GatedExponentialSmoothingLM, opset: int) -> Any:
    batch, size = torch.export.Dim("batch"), SHAPES[0][0]
    with _quiet():
        program = torch.onnx.export(
            _Step(model).eval(),
            (torch.zeros(size, dtype=torch.int64), model.initial_state(size)),
            dynamo=True,
            dynamic_shapes=({0: batch}, {1: batch}),
            input_names=["ids", "state"],
            output_names=["logits", "new_state"],
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of itself and of packages that it does not need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _in_int8(step: Any, model: GatedExponentialSmoothingLM) -> Any:
    """The step with each matrix stored in 8 bits, followed by its conversion to fp32."""
    from onnx import helper, numpy_helper

    graph, nodes = copy.deepcopy(step), []
    for name, layer in _matrices(model):
        name = f"model.{name}.weight"
        [stored] = [one for one in graph.graph.initializer if one.name == name]
        graph.graph.initializer.remove(stored)
        matrix, scales = quantize(layer.weight.detach())
        parts = {f"{name}.int8": matrix.numpy(), f"{name}.scales": scales.numpy()}
        graph.graph.initializer.extend(numpy_helper.from_array(value, part) for part, value in parts.items())
        nodes.append(helper.make_node("DequantizeLinear", list(parts), [name], axis=0))
    rest = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes + rest)
    return graph


def _prefill_graph(step: Any) -> Any:
    """A graph that takes the step once for each token."""
    from onnx import TensorProto, helper

    inner = copy.deepcopy(step.graph)
    values = {value.name: value for value in [*inner.input, *inner.output]}
    for names in (names for node in inner.node for names in (node.input, node.output)):
        names[:] = [f"step_{name}" if name in values else name for name in names]
    sizes = {name: [_size(one) for one in value.type.tensor_type.shape.dim] for name, value in values.items()}
    for value in values.values():
        value.name = f"step_{value.name}"
    # Matrices in int8 are converted once, outside.
    conversions = [node for node in inner.node if node.op_type == "DequantizeLinear"]
    body = helper.make_graph(
        [node for node in inner.node if node not in conversions],
        "step",
        [values["state"], values["ids"]],
        [values["new_state"], values["logits"]],
    )
    scan = helper.make_node(
        "Scan",
        ["state", "ids"],
        ["new_state", "logits"],
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[1],
        scan_output_axes=[1],
    )
    for name in ("ids", "logits"):
        sizes[name].insert(1, "length")
    types = dict.fromkeys(sizes, TensorProto.FLOAT) | {"ids": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, types[name], sizes[name]) for name in names]
        for names in (("ids", "state"), ("logits", "new_state"))
    )
    graph = helper.make_graph([*conversions, scan], "prefill", inputs, outputs, list(inner.initializer))
    return helper.make_model(graph, opset_imports=list(step.opset_import), ir_version=step.ir_version)


def _size(dimension: Any) -> int | str:
    return dimension.dim_param or dimension.dim_value


@torch.no_grad()
def _compare(graphs: dict[str, Any], model: GatedExponentialSmoothingLM) -> None:
    """Raise `InputError` unless graphs of the step and of a prompt give the model's logits and states."""
    import onnx
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    for name, graph in graphs.items():
        onnx.checker.check_model(graph, full_check=True)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        for batch, length in SHAPES:
            ids = torch.randint(model.token_emb.num_embeddings, (batch, length), generator=generator)
            state = torch.randn(model.initial_state(batch).shape, generator=generator)
            if name.startswith("step"):
                ids = ids[:, 0]
                expected = model.step(ids, state)
            else:
                expected = model(ids, state=state, return_state=True)
            found = session.run(["logits", "new_state"], {"ids": ids.numpy(), "state": state.numpy()})
            for ours, theirs in zip(expected, map(torch.from_numpy, found), strict=True):
                far = (ours - theirs).abs().max() / ours.abs().max().clamp(min=1)
                if ours.shape != theirs.shape or not far <= TOLERANCE:
                    raise InputError(f"{name} does not give the model's results: they differ by {far:.1e}")
