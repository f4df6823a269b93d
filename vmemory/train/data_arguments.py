"""Arguments about the data and the memory that sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmemory.data.online.dataset import TURNS
from vmemory.train.checks import only_defaults

_OF_MODEL = "the model's own processor and chat template decide it"


@dataclass
class DataArguments:
    """The data, the sampling of frames, and the memory in the loop.

    `force_image_size`, `max_dynamic_patch`, `min_dynamic_patch`, `use_thumbnail` and `template_name` are known so that
    recipes written elsewhere can be read. The model's processor and chat template decide them; a value other than the
    default is refused. `support_online_format` changes nothing: the format of each item is recognised.

    Raises:
        ValueError: A value does not fit; the message names the argument.
    """

    data_path: str | None = field(
        default=None, metadata={"help": "JSON, JSON lines or meta file of the training data."}
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "The same, of the validation data."})
    world_items: int = field(
        default=0,
        metadata={"help": "Train on so many worlds of vmemory.data.world, drawn in memory, not on data_path."},
    )
    world_eval_items: int = field(default=0, metadata={"help": "Worlds of the validation split."})
    world_seconds: int = field(default=60, metadata={"help": "Length of a world; one frame a second."})
    world_questions: int = field(default=8, metadata={"help": "Questions at the end of each world."})
    world_seed: int = field(default=0, metadata={"help": "Seed of the first world; the next ones follow."})
    video_root: str = field(default="", metadata={"help": "Folder that the videos of a single set are relative to."})
    ds_name: str = field(default="videochat_online", metadata={"help": "Name of the data in the log."})
    turns: str = field(
        default="together",
        metadata={
            "help": "together: a conversation is one prompt, each question behind its own frames; apart: each question "
            "is a prompt of its own behind all frames so far."
        },
    )
    support_online_format: bool = field(default=False, metadata={"help": "Formats are recognised; changes nothing."})
    group_by_length: bool = field(default=False, metadata={"help": "Batches of items of like length."})

    max_num_frame: int = field(default=768, metadata={"help": "Frames of a video at most."})
    min_num_frame: int = field(default=4, metadata={"help": "Frames of a video at least, where it has as many."})
    sampling_method: str = field(default="fps1", metadata={"help": "fps1, fps2, … or middle."})
    num_image_token: int = field(
        default=256, metadata={"help": "Tokens of a frame at most, where the model lets frames have any size."}
    )
    force_image_size: int = field(default=448, metadata={"help": _OF_MODEL})
    max_dynamic_patch: int = field(default=12, metadata={"help": _OF_MODEL})
    min_dynamic_patch: int = field(default=1, metadata={"help": _OF_MODEL})
    use_thumbnail: bool = field(default=False, metadata={"help": _OF_MODEL})
    template_name: str = field(default="Hermes-2", metadata={"help": _OF_MODEL})

    use_memory_bank: bool = field(default=False, metadata={"help": "Train with a memory in the model."})
    memory_policy: str | None = field(
        default=None, metadata={"help": "A policy's name, as in vmemory.attach; none = hierarchical."}
    )
    memory_capacities: list[int] = field(
        default_factory=lambda: [8, 4, 1],
        metadata={"help": "Entries of each tier; a memory of one tier has their sum."},
    )
    memory_reduced_sizes: list[int] = field(
        default_factory=lambda: [256, 64, 16],
        metadata={"help": "Tokens of an entry in each tier; a memory of one tier uses the first."},
    )
    reverse_memory_sample_ratio: list[int] | None = field(
        default_factory=lambda: [8, 4, 1],
        metadata={"help": "memory_intervals of the hierarchical memory: each how-manieth frame a tier takes."},
    )
    max_frames_before_compression: int = field(
        default=0, metadata={"help": "Videos of at most so many frames pass the memory unchanged."}
    )
    memory_budget_range: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={"help": "Capacities are multiplied by a factor that is drawn from this range for each batch."},
    )

    def __post_init__(self) -> None:
        only_defaults(self, _OF_MODEL)
        if self.turns not in TURNS:
            raise ValueError(f"turns: expected one of {', '.join(TURNS)}, got {self.turns!r}")
        for name in ("world_items", "world_eval_items"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.world_items and self.data_path:
            raise ValueError(f"world_items: expected either worlds or data_path, got both, {self.data_path!r}")
        if self.world_eval_items and self.eval_data_path:
            raise ValueError(
                f"world_eval_items: expected either worlds or eval_data_path, got both, {self.eval_data_path!r}"
            )
        span = self.memory_budget_range
        if len(span) != 2 or not 0 < span[0] <= span[1]:
            raise ValueError(f"memory_budget_range: expected two factors above 0 in order, got {span}")
