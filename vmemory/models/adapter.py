"""What a model family tells about itself, in one class a family: where features come from and how they go back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmemory.banks import DualMemory, MemoryConfig
from vmemory.models.geometry import GeometryFusion
from vmemory.models.hooks import install_prompt_hook

Inputs = dict[str, Any]


@dataclass
class Clip:
    """One video as the vision tower saw it.

    Attributes:
        frames: `[T, H, W, C]` features, one row per token.
        key_dim: The first `key_dim` channels are the tokens proper, which similarity looks at; what rides behind them
            (deepstack features) is reduced alike.
        valid: `[T, H, W]` bool, tokens that have a placeholder in the prompt; None = all.
        tail: `[k, C]` rows behind the frames that are always kept (LLaVA's newline).
        time: `[T]` float64 seconds where the inputs tell them.
    """

    frames: Tensor
    key_dim: int
    valid: Tensor | None = None
    tail: Tensor | None = None
    time: Tensor | None = None

    @property
    def placeholders(self) -> int:
        """Tokens the prompt holds for it."""
        grid = self.frames.shape[:3].numel() if self.valid is None else int(self.valid.sum())
        return grid + (0 if self.tail is None else self.tail.shape[0])


class Encoded(NamedTuple):
    """Videos in the order of the prompt, and the tower's output that `Adapter.pack` imitates."""

    clips: list[Clip]
    output: Any


class Adapter:
    """A model family. Subclasses say what differs; `register_adapter` makes them known.

    Attributes:
        modality: `"video"`, or `"image"` where frames travel as images.
        pixels: Name of the model input that holds the frames.
        consumed: Inputs that describe the pixels and go with them.
        frame_text: Every frame has a run of placeholders of its own, with its time as text in front.
        uses_mrope: Positions are rows for time, height and width.
        generates_audio: The model also makes speech from hidden states of the prompt as it was.
    """

    modality = "video"
    pixels = "pixel_values_videos"
    consumed: tuple[str, ...] = (
        "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "video_second_per_grid",
        "video_compression_mask", "video_merge_sizes", "pixel_values", "image_grid_thw", "image_merge_sizes",
        "image_sizes",
    )  # fmt: skip
    frame_text = False
    uses_mrope = False
    generates_audio = False

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where the model cannot be hooked."""
        if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
            from transformers import __version__

            raise ValueError(
                f"model: expected transformers 5.18 or later, whose {type(model).__name__}.forward takes "
                f"mm_encoder_outputs, got transformers {__version__}"
            )

    def install(self, model: nn.Module, memory: Any) -> None:
        """Hook the model for a `PromptMemory`; functions of the model that undo it are appended to `memory.undo`."""
        install_prompt_hook(model, memory)

    def resolve_memory(self, model: nn.Module, memory: Any, settings: MemoryConfig) -> Any:
        """The memory as it goes to work; None = what `settings` says.

        Args:
            model: The model it is for.
            memory: As given to `attach`.
            settings: With the policy that was named there.

        Raises:
            TypeError: It is none.
            ValueError: It is none for this family.
        """
        if isinstance(memory, str):
            memory = None
        if memory is None and settings.memory_policy == DualMemory.policy:
            memory = settings.build(self.hidden_size(model), (1, 1), device=device_of(model), dtype=dtype_of(model))
        if isinstance(memory, DualMemory) and memory.key_dim != self.hidden_size(model):
            wanted = self.hidden_size(model)
            raise ValueError(f"memory: expected a DualMemory for {wanted} channels, got one for {memory.key_dim}")
        if isinstance(memory, GeometryFusion):
            raise ValueError(
                f"memory: expected one without geometry, whose frames {type(model).__name__} does not hand over, got "
                "GeometryFusion"
            )
        makes = callable(memory) and not isinstance(memory, nn.Module)
        if memory is not None and not makes and not callable(getattr(memory, "compress", None)):
            raise TypeError(
                "memory: expected a name, a memory with compress, or a function that makes one, got "
                f"{type(memory).__name__}"
            )
        return memory

    def trainable_module(self, memory: Any) -> nn.Module | None:
        """What of a memory is trained with the model, as `model.vmemory`."""
        has = isinstance(memory, nn.Module) and next(memory.parameters(), None) is not None
        return memory if has else None

    def feature_module(self, model: nn.Module) -> Any:
        """The module with `get_video_features`; which one it is changed between releases."""
        inner = getattr(model, "model", model)
        return inner if hasattr(inner, f"get_{self.modality}_features") else model

    def placeholder_id(self, model: Any) -> int:
        """Id of the token that stands for a visual token."""
        return int(getattr(model.config, f"{self.modality}_token_id"))

    def hidden_size(self, model: Any) -> int:
        """Channels of a visual token where it enters the language model."""
        return int(model.config.get_text_config().hidden_size)

    def encode(self, model: nn.Module, inputs: Inputs) -> Encoded:
        """Run the vision tower once, exactly as the model itself would."""
        raise NotImplementedError

    def iter_chunks(self, model: nn.Module, inputs: Inputs, chunk: int) -> Iterator[Iterator[Inputs]]:
        """For each video, inputs for `encode` of at most `chunk` of its frames each."""
        raise NotImplementedError

    def pack(self, output: Any, tokens: Sequence[Tensor]) -> Any:
        """Tokens `[N_i, C]` per video as the tower's output, the way the model takes it back."""
        return as_pooling(list(tokens))

    def positions(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
        """Positions `[3, B, L]` of the prompt as it is, and its rope deltas `[B, 1]`; None = plain positions."""
        return None

    # for streams, where frames come one after the other and the prompt is written last

    def encode_frames(self, model: nn.Module, frames: Tensor, processor: Any, size: tuple[int, int]) -> Encoded:
        """Run the vision tower on frames of one video.

        Args:
            model: The model.
            frames: `[n, 3, H, W]` uint8, n a multiple of `temporal_patch_size`.
            processor: Of the model, whose pixel statistics count; None = the family's own.
            size: (H, W) in pixels that frames are scaled to.
        """
        return self.encode(model, on_device(model, self.preprocess(model, frames, processor, size)))

    def temporal_patch_size(self, model: Any) -> int:
        """Frames of the video that become one frame of the memory."""
        return 1

    def frame_time(self, first: float, last: float) -> float:
        """Seconds of a frame of the memory out of those of its first and last frame of the video."""
        return first

    def preprocess(self, model: nn.Module, frames: Tensor, processor: Any, size: tuple[int, int]) -> Inputs:
        """Inputs for `encode` from `frames [n, 3, H, W]` uint8, scaled to `size`."""
        raise NotImplementedError

    def frame_size(self, model: nn.Module, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        """The size near `size` (H, W) at which a frame has at most so many tokens."""
        raise NotImplementedError

    def size_of(self, model: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        """The size (H, W) of frames that have a grid of tokens."""
        return self.frame_size(model, grid, grid[0] * grid[1])

    def video_text(self, frames: Sequence[tuple[float, int]], token: str, tail: int) -> str:
        """What stands for a video in a prompt: (seconds, tokens) per frame, `token` for each, `tail` behind them."""
        return token * (sum(count for _, count in frames) + tail)

    def temporal_position(self, model: Any, frame: int, seconds: float) -> int:
        """Position along time of a frame of the memory, counted from the start of the stream."""
        return 0

    def set_rope_deltas(self, model: nn.Module, rope_deltas: Tensor | None) -> None:
        """Tell the model where its prompt ends, which it keeps between calls."""
        for module in (self.feature_module(model), model):
            if rope_deltas is not None and hasattr(module, "rope_deltas"):
                module.rope_deltas = rope_deltas


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; weights that accelerate has put elsewhere are on no device."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """What a model computes in, where its weights say: the dtype of the first that floats."""
    # replicas of nn.DataParallel have no parameters, but what once were
    held = (part.__dict__.get("_former_parameters", part._parameters).values() for part in model.modules())
    weights = (weight for part in held for weight in part if weight is not None)
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)


def on_device(model: nn.Module, inputs: Inputs) -> Inputs:
    """Tensors where the model is, those that float in its dtype; all else as it is."""
    device, dtype = device_of(model), dtype_of(model)
    return {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def as_pooling(tokens: Any) -> Any:
    """Tokens as transformers' towers return them."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=tokens)


def one_tensor(tokens: Sequence[Tensor]) -> Any:
    """Videos' tokens `[N_i, C]` as the towers return them whose models flatten all into one row.

    `[V, N, C]` where all have as many, so that beams copy whole videos; else an entry a token, `[ΣN, 1, C]`, of which
    newer releases of transformers copy those of a row together.
    """
    same = len({len(video) for video in tokens}) == 1
    return as_pooling(torch.stack(list(tokens)) if same else torch.cat(list(tokens))[:, None])


def check_copies(model: Any, inputs: Inputs) -> None:
    """Raise ValueError where beams or several answers would hand a row the video of another."""
    for kind, output in inputs["mm_encoder_outputs"].items():
        pooled = output.pooler_output
        if torch.is_tensor(pooled) and pooled.shape[0] > 1 == pooled.shape[1] and _copies_entry_by_entry(model, kind):
            from transformers import __version__

            raise ValueError(
                "num_beams, num_return_sequences: expected one video, or videos of which the memory keeps equally many "
                f"tokens, with transformers {__version__}, which copies them token by token (5.24 does not)"
            )


def _copies_entry_by_entry(model: Any, kind: str) -> bool:
    token = getattr(model.config, f"{kind}_token_id")
    pair = {kind: as_pooling(torch.tensor([[[0.0]], [[1.0]]]))}
    copied = model._expand_multimodal_outputs(torch.full((1, 2), token), pair, expand_size=2)[kind].pooler_output
    return bool(copied.flatten().tolist() == [0.0, 0.0, 1.0, 1.0])


def known_arguments(function: Callable[..., Any], inputs: Mapping[str, Any], **renamed: str) -> Inputs:
    """Those of `inputs` that `function` takes; `renamed` maps its name for an input to the input's."""
    source = {**inputs, **{name: inputs.get(other) for name, other in renamed.items()}}
    names = inspect.signature(function).parameters
    return {name: value for name, value in source.items() if name in names and value is not None}
