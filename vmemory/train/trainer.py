"""transformers' `Trainer` with a memory in the loop."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.trainer_pt_utils import LengthGroupedSampler

from vmemory._attach import MemoryHandle, attached, base_of
from vmemory.data.online import Collator, Skipped
from vmemory.data.online.prompt import IGNORED
from vmemory.train.budgeted_memory import BudgetedMemory
from vmemory.train.profiler import MemoryProfiler
from vmemory.train.training_arguments import TrainingArguments

_log = logging.getLogger(__name__)


class MemoryTrainer(transformers.Trainer):
    """Trains a model on conversations about videos, with the memory that is attached to it, if any.

    Each batch meets the capacity that `BudgetedMemory` draws. With a memory, self-distillation is added to the loss:
    `memory_bank_loss_weight` times the divergence KL(p ‖ q) of the answers' tokens, where p are the probabilities of
    the same model without its memory, in evaluation mode and without gradient, and q those with it.

    Items that cannot be used are left out, named in `skipped`; a batch without any other is passed over. Several
    processes have to do each step together, so there such a batch is an error.

    Evaluation meets the memory at its target. It tells `eval_loss` and `eval_answers`, the share of answers whose every
    token would be written.

    Args:
        model: Of a family that `vmemory.attach` supports.
        args: `vmemory.train.TrainingArguments`.
        tokenizer: Of the model; fills up batches.
        given: Further arguments of `transformers.Trainer`.
    """

    args: TrainingArguments

    def __init__(self, model: Any, args: Any, *, tokenizer: Any, **given: Any) -> None:
        self.skipped: list[Skipped] = []
        self.profiler = MemoryProfiler()
        self._distilled: list[Tensor] = []
        self._part = 0
        super().__init__(
            model, args, data_collator=_Batches(Collator(tokenizer)), processing_class=tokenizer,
            compute_metrics=answers_right, preprocess_logits_for_metrics=_written, **given,
        )  # fmt: skip
        self.add_callback(self.profiler)
        sharded = self.is_fsdp_enabled or getattr(self, "is_distributed_loading_by_transformers", False)
        if self.args.fsdp and not sharded:
            raise ValueError(
                f"fsdp: expected several processes with a GPU each, over which accelerate shards, got "
                f"{self.args.world_size} on {self.args.device}"
            )

    @property
    def handle(self) -> MemoryHandle | None:
        """The handle of the attached memory."""
        model: Any = self.model
        return attached(model)

    @property
    def budget(self) -> BudgetedMemory | None:
        """The object that draws the memory's capacity, or None."""
        memory = None if self.handle is None else self.handle.memory
        return memory if isinstance(memory, BudgetedMemory) else None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do a step on the usable items of a batch."""
        self._note(inputs)
        if self.budget is not None:
            self.budget.draw(self.state.global_step, self._part)
        # the batches of one optimizer's step are told apart
        self._part = 0 if self.accelerator.sync_gradients else self._part + 1
        if not inputs:
            if self.args.world_size > 1:
                name, reason = self.skipped[-1]
                raise ValueError(
                    f"batch: expected an item that can be used, got {name}: {reason}; several processes cannot pass "
                    "over a batch"
                )
            return torch.zeros((), device=self.args.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def prediction_step(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        """Evaluate a batch, with the memory at its target."""
        self._note(inputs)
        if not inputs:
            return None, None, None
        if self.budget is not None:
            self.budget.settle()
        return super().prediction_step(model, inputs, *given, **named)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the model's own loss, and add that of self-distillation."""
        weight = self.args.memory_bank_loss_weight if self.handle is not None and model.training else 0.0
        target = self._without_memory(model, inputs) if weight else None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if target is not None:
            labels = inputs["labels"][:, 1:]
            learned = labels != IGNORED
            found = outputs["logits"][:, :-1][learned].float().log_softmax(-1)
            summed = F.kl_div(found, target, log_target=True, reduction="sum")
            own = learned.sum().clamp(min=1)
            self._distilled.append((summed / own).detach())
            # as many tokens as the model's own loss is divided by, over all batches and devices of the step
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                devices = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                summed = summed * devices / num_items_in_batch
            else:
                summed = summed / own
            loss = loss + weight * summed
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _without_memory(self, model: Any, inputs: Any) -> Tensor:
        """Return the log-probabilities of the answers' tokens `[n, V]` by the model without its memory."""
        assert self.handle is not None
        learned = inputs["labels"][:, 1:] != IGNORED
        given = {name: value for name, value in inputs.items() if name != "labels"}
        # logits of whole prompts would take most of the memory that the model's memory saves
        inner: Any = self.model
        columns = learned.any(0).nonzero().flatten()
        if "logits_to_keep" in inspect.signature(type(base_of(inner)).forward).parameters:
            given["logits_to_keep"] = columns
        model.eval()
        try:
            with self.handle.disabled():
                logits = model(**given)["logits"]
        finally:
            model.train()
        # some families take the argument and do not heed it
        kept = logits if logits.shape[1] == len(columns) else logits[:, columns]
        return kept[learned[:, columns]].float().log_softmax(-1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a line of the log: self-distillation, the capacity's factor, peaks of memory in MiB."""
        if "loss" in logs:
            if self._distilled:
                logs["memory_bank_loss"] = float(torch.stack(self._distilled).mean())
                self._distilled = []
            if self.budget is not None:
                logs["memory_warmup"] = round(self.budget.progress, 4)
            logs["host_peak_mib"] = round(self.profiler.host_peak / 2**20, 1)
            if self.profiler.device_peak:
                logs["device_peak_mib"] = round(self.profiler.device_peak / 2**20, 1)
        super().log(logs, start_time)

    def _note(self, inputs: Any) -> None:
        """Take the items that were left out from a batch, and tell of each once."""
        for item in inputs.pop("skipped", ()):
            if item not in self.skipped:
                self.skipped.append(item)
                _log.warning("left out: %s: %s", item.name, item.reason)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return super()._get_train_sampler(train_dataset)
        # transformers would decode every video to know its length
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps, dataset=dataset, lengths=lengths
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return torch.utils.data.SequentialSampler(eval_dataset)


class _Batches:
    """A collator that hands items that cannot be used on to the trainer, in `skipped`."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        skipped = [item for item in items if isinstance(item, Skipped)]
        used = [item for item in items if not isinstance(item, Skipped)]
        batch = self.collate(used) if used else {}
        return {**batch, "skipped": skipped} if skipped else batch


def _written(logits: Any, labels: Tensor) -> Tensor:
    """Return the tokens that would be written, which take less room than their logits."""
    scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(-1)


def answers_right(prediction: Any) -> dict[str, float]:
    """Compute the share of answers whose every token would be written; an answer is a run of learned tokens."""
    written = np.asarray(prediction.predictions)[:, :-1]
    labels = np.asarray(prediction.label_ids)[:, 1:]
    learned = labels >= 0
    starts = learned & ~np.pad(learned, ((0, 0), (1, 0)))[:, :-1]
    run = starts.cumsum()[learned.ravel()] - 1
    count = int(starts.sum())
    wrong = np.bincount(run[(written != labels)[learned]], minlength=count)
    return {"answers": float((wrong == 0).mean()) if count else float("nan")}
