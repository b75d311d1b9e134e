"""Checks of tensors before native code gets their addresses: it would read and write whatever lies there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from mhesa.errors import InputError

INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def is_plain(tensor: Tensor) -> bool:
    """Whether the values of a tensor, of any shape, lie in memory as they are.

    They do not for subclasses, on the meta device, in sparse layouts, under `torch.func`, and where PyTorch
    has yet to negate them or to write zeros.

    Raises:
        InputError: the tensor's memory was freed.
    """
    if type(tensor) not in (Tensor, Parameter) or tensor.is_neg():
        return False
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # it has no memory of its own
        return False
    if address or not tensor.numel():
        return True
    # Private, because no public function tells zeros that are yet to be written from freed memory.
    if tensor.is_meta or tensor._is_zerotensor():
        return False
    raise InputError("a tensor has no memory: its storage was resized to 0 bytes")


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors, of any shapes, are plain. Looks at every one: a freed tensor always raises."""
    plain = [is_plain(tensor) for tensor in tensors]
    return all(plain)


def check_plain(tensors: Iterable[Tensor | None]) -> None:
    """Raise `InputError` unless all tensors, of any shapes, hold real numbers, in memory as they are."""
    for tensor in tensors:
        if tensor is not None and (not is_plain(tensor) or tensor.is_complex() or tensor.is_quantized):
            raise InputError(f"native code reads real numbers in plain tensors, not {_described(tensor)}")


def check_devices(tensors: Iterable[Tensor | None], cu_seqlens: Tensor | None, device: torch.device) -> None:
    """Raise `InputError` unless tensors of any shapes are on `device`; offsets may also be on CPU."""
    offsets = None if cu_seqlens is None or cu_seqlens.is_cpu else cu_seqlens
    for tensor in (*tensors, offsets):
        if tensor is not None and tensor.device != device:
            raise InputError(f"a tensor is on {tensor.device}; move it to {device}, where x is")


def check_scan(
    x: Tensor,
    alpha: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check the arguments of smoothing, shaped as `mhesa.ops.exponential_smoothing` takes them.

    Raises:
        InputError: one does not fit; the message names it.
    """
    check_input(x, "batch", "length", "heads", "head_dim")
    _check_parameters(x, alpha, decay, skip)
    if cu_seqlens is not None or initial_state is not None:
        _check_sequences(x, cu_seqlens, initial_state, *x.shape[2:])


def check_step(x: Tensor, alpha: Tensor, decay: Tensor, state: Tensor, skip: Tensor | None) -> None:
    """Check the arguments of a step, shaped as `mhesa.ops.exponential_smoothing_step` takes them."""
    check_input(x, "batch", "heads", "head_dim")
    _check_parameters(x, alpha, decay, skip)
    _check_shape("state", state, x.device, x.shape)


def check_gradients(dy: Tensor, dfinal: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check gradients: `dy` and `x` `(batch, length, heads, head_dim)`, `dfinal` as the final state."""
    _check_shape("dy", dy, x.device, x.shape)
    _check_shape("dfinal", dfinal, x.device, (count_sequences(x, cu_seqlens), *x.shape[2:]))


def check_convolution(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Check arguments, shaped as `mhesa.ops.convolution.causal_convolution` takes them.

    Raises:
        InputError: one does not fit; the message names it.
    """
    if not _is_dense(weight) or weight.ndim != 2 or not len(weight):
        raise InputError(f"weight must be (taps, dim), not {_described(weight)}")
    check_input(x, "batch", "length", "dim")
    _check_shape("weight", weight, x.device, (len(weight), x.shape[2]))
    _check_sequences(x, cu_seqlens, initial_state, len(weight) - 1, x.shape[2])


def check_input(x: Tensor, *dimensions: str) -> None:
    """Raise `InputError` unless `x` is dense, of floating-point numbers, and `(*dimensions,)`."""
    if not _is_dense(x) or x.ndim != len(dimensions):
        raise InputError(f"x must be ({', '.join(dimensions)}), not {_described(x)}")
    if not x.is_floating_point():
        raise InputError(f"x must be floating-point, not {x.dtype}")


def _check_parameters(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor | None) -> None:
    *steps, heads, head_dim = x.shape
    _check_shape("alpha", alpha, x.device, (heads,), (*steps, heads))
    _check_shape("decay", decay, x.device, (heads,), (*steps, heads))
    if skip is not None:
        _check_shape("skip", skip, x.device, (heads, head_dim))


def _check_shape(name: str, tensor: Tensor, device: torch.device, *shapes: tuple[int, ...]) -> None:
    """Check the device and the shape of a tensor; one of `shapes`, which `x` decides about."""
    # Only shapes of as many dimensions: an exported graph would note that another's first one is not `batch`.
    if not _is_dense(tensor) or tensor.shape not in [one for one in shapes if len(one) == tensor.ndim]:
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise InputError(f"{name} must be {wanted} for this x, not {_described(tensor)}")
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}; move it to {device}, where x is")


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences are in `x`, `(batch, length, ...)`: its batch, or those of the offsets."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_sequences(
    x: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, *state_shape: int
) -> None:
    """Check where the sequences of `x` are, and the state that each begins with."""
    if cu_seqlens is not None:
        _check_offsets(cu_seqlens, x)
    if initial_state is not None:
        shape = (count_sequences(x, cu_seqlens), *state_shape)
        _check_shape("initial_state", initial_state, x.device, shape)


def _check_offsets(cu_seqlens: Tensor, x: Tensor) -> None:
    """Check that the offsets of packed sequences cover `x`; they are on CPU or where `x` is."""
    batch, length = x.shape[:2]
    if not _is_dense(cu_seqlens):
        raise InputError(f"cu_seqlens must be a dense tensor, not {_described(cu_seqlens)}")
    if not cu_seqlens.is_cpu and cu_seqlens.device != x.device:
        raise InputError(f"cu_seqlens is on {cu_seqlens.device}; move it to {x.device}, where x is")
    if batch != 1:
        raise InputError(f"with cu_seqlens x must have batch 1, its sequences end to end, not batch {batch}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in INTEGERS:
        raise InputError("cu_seqlens must be integer offsets, (sequences + 1,)")
    # Offsets on an accelerator are not checked: reading them would synchronise at every call.
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        offsets = _values(cu_seqlens)
        if offsets[0] != 0 or offsets[-1] != length or offsets != sorted(offsets):
            raise InputError(f"cu_seqlens must rise from 0 to the length {length}")


def check_ids(ids: Tensor, device: torch.device, num_tokens: int | None = None) -> None:
    """Check token ids, int64 `(tokens,)`, on CPU or on `device`; with `num_tokens` their values too.

    Raises:
        InputError: they are something else.
        IndexError: an id is outside the vocabulary.
    """
    if (
        not is_plain(ids)
        or ids.is_nested
        or ids.dtype is not torch.int64
        or ids.ndim != 1
        or not (ids.is_cpu or ids.device == device)
    ):
        found = _described(ids)
        if getattr(ids, "dtype", None) is not torch.int64:
            found += "; convert them with torch.as_tensor(ids, dtype=torch.int64)"
        raise InputError(f"ids must be torch.int64 of (tokens,) on {_or_on(device)}, not {found}")
    if num_tokens is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_tokens:
        raise IndexError(f"token ids must be 0 to {num_tokens - 1}")


def check_targets(targets: Tensor, rows: int, num_tokens: int) -> Tensor:
    """Tokens that came after `rows` others, as kernels read them: int64 `(rows,)` on CPU, contiguous.

    Raises:
        InputError: they are no integers of one dimension, or not as many.
        IndexError: one is outside the vocabulary of `num_tokens`.
    """
    if not is_plain(targets) or targets.is_nested or targets.ndim != 1 or targets.dtype not in INTEGERS:
        raise InputError(f"targets must be integers of (tokens,), not {_described(targets)}")
    if len(targets) != rows:
        raise InputError(f"{len(targets)} targets for {rows} tokens")
    targets = targets.to("cpu", torch.int64).contiguous()
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < num_tokens:
        raise IndexError(f"targets must be 0 to {num_tokens - 1}")
    return targets


def check_sequences(ids: Tensor | Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """The sequences of ids `(batch, length)`, or of one tensor each, checked as `check_ids` does."""
    if not isinstance(ids, Iterable) or (isinstance(ids, Tensor) and not (_is_dense(ids) and ids.ndim == 2)):
        raise InputError(f"ids must be (batch, length), or a list of tensors, not {_described(ids)}")
    sequences = list(ids)
    for sequence in sequences:
        check_ids(sequence, device)
    return sequences


def distinct_tokens(ids: Tensor | Iterable[int]) -> Iterable[int]:
    """The different ids of a tensor of any shape, or those of an iterable as they are.

    Raises:
        InputError: they are no integers.
    """
    if not isinstance(ids, Tensor) and isinstance(ids, Iterable):
        return ids
    if not _is_dense(ids) or ids.dtype not in INTEGERS or ids.is_meta:
        raise InputError(f"ids must be integers, not {_described(ids)}")
    return set(_values(ids.flatten()))


def check_state(state: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Check a model's state, `(depth, batch, state_size)`, that is to be changed in place.

    Raises:
        InputError: its shape, type or device is another one, or two of its elements share memory.
    """
    if (
        not is_plain(state)
        or state.is_nested
        or state.shape != shape
        or state.dtype is not dtype
        or state.device != device
        or state.requires_grad
        or not _rows_are_apart(shape, state.stride())
    ):
        raise InputError(
            f"state must be {dtype} of {shape} on {device}, with state_size innermost, without gradients, "
            f"and every element in memory of its own, not {_described(state)}"
        )


def _rows_are_apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether rows of the last dimension are contiguous, and no two of them share memory."""
    depth, batch, width = shape
    by_layer, by_sequence, by_value = strides
    if by_value == 1 and by_sequence >= width and by_layer >= batch * by_sequence:
        return True
    # Strides of dimensions of size 1 mean nothing; batches may also lie outside of layers.
    outer = sorted(pair for pair in ((by_layer, depth), (by_sequence, batch)) if pair[1] > 1)
    extents = [width, *(stride * size for stride, size in outer)]
    apart = all(stride >= extent for (stride, _), extent in zip(outer, extents, strict=False))
    return (by_value == 1 or width == 1) and (apart or 0 in shape)


def check_logits(logits: Tensor, num_tokens: int) -> None:
    """Raise `InputError` unless logits are real numbers `(rows, num_tokens)` or wider, on any device."""
    if (
        not _is_dense(logits)
        or logits.ndim != 2
        or logits.shape[1] < num_tokens
        or not logits.is_floating_point()
        or logits.is_meta
    ):
        raise InputError(f"logits must be numbers of (rows, {num_tokens}) or wider, not {_described(logits)}")


def check_weights(parameters: Iterable[Tensor]) -> None:
    """Raise `InputError` unless all weights of a model, of any shapes, are there."""
    if any(parameter.is_meta for parameter in parameters):
        raise InputError("the model has no weights, it is on the meta device; load them first")


def _values(tensor: Tensor) -> list[int]:
    """The values of a tensor of integers, `(length,)`."""
    values: list[int] = (tensor if is_plain(tensor) else tensor.clone()).tolist()
    return values


def _is_dense(tensor: object) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested


def _or_on(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"cpu or {device}"


def _described(value: object) -> str:
    """What a wrong argument is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    layout = f" {value.layout}"
    if value.layout is torch.strided:
        layout = "" if value.is_contiguous() else f" with strides {value.stride()}"
    kind = "" if type(value) in (Tensor, Parameter) else f" ({type(value).__name__})"
    return f"{value.dtype} of {tuple(value.shape)}{layout} on {value.device}{kind}"
