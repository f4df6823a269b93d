"""Arguments about the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmemory.train.checks import only_defaults

_OF_CHECKPOINT = "the checkpoint decides it"


@dataclass
class ModelArguments:
    """The model to train, which of its parts learn, and settings of its memory.

    `vision_encoder`, `mm_vision_select_layer`, `mm_vision_select_feature`, `pretrain_mm_projector` and
    `mm_projector_type` are known so that recipes written elsewhere can be read. The checkpoint decides them; a value
    other than the default is refused.

    Raises:
        ValueError: A value does not fit; the message names the argument.
    """

    model_name_or_path: str = field(
        default="", metadata={"help": "Folder or hub id of a video model or of PEFT's adapters; or worldlm."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the loaded weights: float32, bfloat16 or auto."})
    memory_bank_config: str | None = field(
        default=None,
        metadata={
            "help": "JSON or YAML file of a memory's settings, or the folder of a model trained with a memory; "
            "replaces the memory_* settings of the data arguments."
        },
    )
    freeze_llm: bool = field(default=True, metadata={"help": "Freeze the language model in stage 1."})
    freeze_backbone: bool = field(default=True, metadata={"help": "Freeze the vision tower."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA in the language model (stage 2); 0 = none."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's scale, as in PEFT."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout."})
    vision_encoder: str = field(default="siglip_so400m_patch14_384", metadata={"help": _OF_CHECKPOINT})
    mm_vision_select_layer: int = field(default=-2, metadata={"help": _OF_CHECKPOINT})
    mm_vision_select_feature: str = field(default="patch", metadata={"help": _OF_CHECKPOINT})
    pretrain_mm_projector: str | None = field(default=None, metadata={"help": _OF_CHECKPOINT})
    mm_projector_type: str = field(default="linear", metadata={"help": _OF_CHECKPOINT})

    def __post_init__(self) -> None:
        only_defaults(self, _OF_CHECKPOINT)
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise ValueError(f"dtype: expected float32, bfloat16 or auto, got {self.dtype!r}")
        if self.lora_r < 0:
            raise ValueError(f"lora_r: expected 0 or a rank, got {self.lora_r}")
