"""Arguments about the training itself."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import transformers


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' `TrainingArguments` with stages and a memory in the loop.

    Raises:
        ValueError: A value does not fit; the message names the argument.
    """

    memory_bank_warmup_steps: int = field(
        default=1000,
        metadata={"help": "Steps over which the memory's budget falls from every frame to its target; 0 = at once."},
    )
    memory_bank_loss_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of self-distillation: divergence of the answers' tokens from those of the same model "
            "without its memory. 0 = none, which saves a forward pass."
        },
    )
    max_seq_length: int = field(default=32768, metadata={"help": "Items with more tokens are left out."})
    grad_checkpoint: bool = field(default=True, metadata={"help": "Compute activations again instead of storing them."})
    stage: int = field(default=1, metadata={"help": "1: the language model is frozen; 2: it is trained."})
    # batches are a model's inputs already
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it off: there are no columns."})
    logging_steps: float = field(default=10, metadata={"help": "Steps from one line of the log to the next."})

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise ValueError(f"stage: expected 1 or 2, got {self.stage}")
        if self.memory_bank_warmup_steps < 0:
            raise ValueError(f"memory_bank_warmup_steps: expected 0 or more, got {self.memory_bank_warmup_steps}")
        if self.memory_bank_loss_weight < 0:
            raise ValueError(f"memory_bank_loss_weight: expected 0 or more, got {self.memory_bank_loss_weight}")
        if self.max_seq_length < 1:
            raise ValueError(f"max_seq_length: expected at least 1, got {self.max_seq_length}")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}; transformers does not shift "
                "the labels of models with pictures then"
            )
        # releases of transformers differ in the name
        known = {known.name for known in fields(self)}
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        if getattr(self, name) in (None, False) and not self.gradient_checkpointing:
            setattr(self, name, self.grad_checkpoint)
        super().__post_init__()
