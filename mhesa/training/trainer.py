"""transformers' `Trainer` with our order of data, our schedule and our checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from mhesa.data import Windows, pack
from mhesa.hf.modeling import MhesaCache, MhesaForCausalLM
from mhesa.training.checkpoint import Parts, load_part
from mhesa.training.distributed import gather, is_parted, parted_like, processes, rank, whole

Batch = dict[str, Any]


class Batches(IterableDataset[Batch]):
    """What this process reads of each step: its share of the windows, micro-batch by micro-batch.

    Args:
        windows: where each step's windows begin.
        accumulate: micro-batches a step.
        eos_token_id: pack, and part documents at this token; `None` joins them.
        first_step: the step to begin with.
    """

    def __init__(
        self, windows: Windows, *, accumulate: int, eos_token_id: int | None, first_step: int = 0
    ) -> None:
        self.windows = windows
        self.accumulate = accumulate
        self.eos_token_id = eos_token_id
        self.first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        step = self.first_step
        while True:
            shares = self.windows.starts(step).reshape(self.accumulate, processes(), -1)
            for starts in shares[:, rank()]:
                yield self._batch(starts, self.windows.begins(step))
            step += 1

    def _batch(self, starts: np.ndarray, begins: bool) -> Batch:
        ids = self.windows.read(starts)
        batch = {
            "input_ids": ids[:, :-1].contiguous(),
            "shift_labels": ids[:, 1:].contiguous(),
            "begins": begins,
        }
        if self.eos_token_id is not None:
            packed, offsets = pack(ids[:, :-1], self.eos_token_id)
            batch |= {"input_ids": packed, "shift_labels": ids[:, 1:].reshape(1, -1), "cu_seqlens": offsets}
        return batch


class StepTrainer(Trainer):
    """A `Trainer` in which everything that a step does is a function of the step and the checkpoint.

    Args:
        batches: what is read.
        rate: the learning rate over its peak before a step.
        after_step: called after every step with the gradient's norm; it says whether to go on.
        seed: of dropout.
        carry: hand the states of each window on to the window that follows it.
    """

    def __init__(
        self,
        *args: Any,
        batches: Batches,
        rate: Callable[[int], float],
        after_step: Callable[[StepTrainer, float | Tensor], bool],
        seed: int,
        carry: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batches = batches
        self.rate = rate
        self.after_step = after_step
        self.seed = seed
        self.carry = carry
        self.losses: list[Tensor] = []
        self.carried: list[Tensor] = []
        self._micro = 0
        # Losses here are means over a micro-batch.
        self.loss_is_scaled_for_ga = False

    # Data

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches as `Batches` makes them: nothing is skipped, shuffled or shared out twice."""
        return DataLoader(self.batches, batch_size=None)

    # A step

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a micro-batch, with random numbers and states that are its own."""
        if self._config.dropout:  # nothing else draws, and seeding every kind of device takes its time
            key = np.random.SeedSequence((self.seed, self.state.global_step, self._micro, rank()))
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
        begins = inputs.pop("begins")
        cache = self._states(inputs, begins) if self.carry else None
        outputs = model(
            **inputs,
            past_key_values=cache,
            loss_only=True,
            return_dict=True,
        )
        if cache is not None:
            self._hand_on(cache, inputs)
        self._micro += 1
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch, forward and backward; its part of the step's loss is kept."""
        loss = super().training_step(*args, **kwargs)
        if self._micro == 1:
            self.losses.append(loss)
        else:
            self.losses[-1] = self.losses[-1] + loss
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted, which would take a walk over all parameters at each step."""
        return 0

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """What the Trainer does between steps is done in `after_step` instead."""
        if self._micro == 0:
            return  # called once more at the end
        self._micro = 0
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        if not self.after_step(self, grad_norm):
            self.control.should_training_stop = True

    # States

    def _states(self, inputs: Batch, begins: bool) -> MhesaCache:
        """The states that a micro-batch begins with: carried for rows that go on, zero for all others."""
        config = self._config
        ids, offsets = inputs["input_ids"], inputs.get("cu_seqlens")
        rows = len(ids) if offsets is None else ids.numel() // self.batches.windows.context
        sequences = rows if offsets is None else len(offsets) - 1
        initial = torch.zeros(config.num_hidden_layers, sequences, config.dim_mhesa, device=ids.device)
        if not begins and self._micro < len(self.carried):
            going_on = torch.ones(rows, dtype=torch.bool, device=ids.device)
            first = torch.arange(rows, device=ids.device)
            if offsets is not None:
                first = self._first_sequences(offsets, rows)
                going_on = ids.view(rows, -1)[:, 0] != self.batches.eos_token_id
            initial[:, first[going_on]] = self.carried[self._micro].to(ids.device)[:, going_on]
        cache = MhesaCache(config)
        cache.advance(list(initial), 0)
        return cache

    def _hand_on(self, cache: MhesaCache, inputs: Batch) -> None:
        """Keep the state at the end of each row, cut off from what made it."""
        offsets = inputs.get("cu_seqlens")
        states = cache.states(len(inputs["input_ids"]) if offsets is None else len(offsets) - 1)
        assert states is not None
        final = torch.stack(states).detach()
        if offsets is not None:
            rows = inputs["input_ids"].numel() // self.batches.windows.context
            first = self._first_sequences(offsets, rows)
            last = torch.cat([first[1:], first.new_tensor([len(offsets) - 1])]) - 1
            final = final[:, last]
        self.carried[self._micro : self._micro + 1] = [final]

    def _first_sequences(self, offsets: Tensor, rows: int) -> Tensor:
        begins = torch.arange(rows, device=offsets.device) * self.batches.windows.context
        return torch.searchsorted(offsets, begins)

    # Processes

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Leave a model that is parted among processes as it is: accelerate would copy it, or raise."""
        if not is_parted(model):
            return super()._wrap_model(model, *args, **kwargs)
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        model._is_accelerate_prepared = True  # type: ignore[assignment]
        return model

    # Optimizer and schedule

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; biases, norms, gates and residual weights do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Follow the budget from wherever the run stands."""
        optimizer = optimizer or self.optimizer
        assert optimizer is not None, "the Trainer makes the optimizer first"
        for group in optimizer.param_groups:
            group["initial_lr"] = self.args.learning_rate
        self.lr_scheduler = LambdaLR(optimizer, self.rate, last_epoch=self.state.global_step - 1)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # Checkpoints

    def parts(self) -> Parts:
        """All tensors that a checkpoint holds, whole and on the CPU. All processes must ask."""
        parts = {"model": self.weights(), "optimizer": self._optimizer_state()}
        if self.carry:
            # (processes, micro-batches, depth, rows, dim) to rows in the order of the step's windows.
            states = gather(torch.stack(self.carried)).permute(2, 1, 0, 3, 4)
            parts["states"] = {"states": states.flatten(1, 3).cpu().contiguous()}
        return parts

    def weights(self) -> dict[str, Tensor]:
        """Every parameter, whole and on the CPU. All processes must ask."""
        return {name: whole(parameter) for name, parameter in self._parameters()}

    def _optimizer_state(self) -> dict[str, Tensor]:
        assert self.optimizer is not None
        state = self.optimizer.state
        return {
            f"{name}:{key}": whole(value)
            for name, parameter in self._parameters()
            for key, value in state[parameter].items()
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_part(Path(resume_from_checkpoint), "model")
        with torch.no_grad():
            for name, parameter in self._parameters(model):
                parameter.copy_(parted_like(weights[name], parameter))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        saved = load_part(Path(checkpoint), "optimizer")
        parameters = dict(self._parameters())
        for place, value in saved.items():
            name, _, key = place.rpartition(":")
            parameter = parameters[name]
            self.optimizer.state[parameter][key] = parted_like(value, parameter)
        states = load_part(Path(checkpoint), "states").get("states")
        if states is not None:
            shares = states.unflatten(1, (self.batches.accumulate, processes(), -1))[:, :, rank()]
            self.carried = list(shares.to(self.args.device).unbind(1))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random numbers are functions of the step: there is nothing to load."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Losses are not scaled in bf16 and fp32."""

    @property
    def _config(self) -> Any:
        return cast(MhesaForCausalLM, self.model).config

    def _parameters(self, model: nn.Module | None = None) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters under their plain names, however it is wrapped."""
        model = model or cast(nn.Module, self.model)
        return [
            (name.removeprefix("module.").replace("_orig_mod.", ""), parameter)
            for name, parameter in model.named_parameters()
        ]
