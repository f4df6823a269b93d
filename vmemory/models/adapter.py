"""Base class of the model families: it encodes a model's videos and writes compressed tokens back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vmemory.banks import DualMemory, MemoryConfig
from vmemory.models.geometry import GeometryFusion
from vmemory.models.hooks import Shrinks, install_prompt_hook
from vmemory.models.memories import GivenMemory, MemoryLike

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

Inputs = dict[str, Any]


@dataclass
class Clip:
    """The features of one video, as the vision tower returned them.

    Attributes:
        frames: `[T, H, W, C]` features, one row per token.
        key_dim: Number of leading channels that similarity uses. Further channels (deepstack features) are reduced with
            the same weights.
        mask: `[T, H, W]` bool, tokens that have a placeholder in the prompt; None = all.
        tail: `[k, C]` rows after the frames that are always kept (LLaVA's newline).
        time: `[T]` float64 seconds if the inputs have them, else None.
    """

    frames: Tensor
    key_dim: int
    mask: Tensor | None = None
    tail: Tensor | None = None
    time: Tensor | None = None


class Encoded(NamedTuple):
    """Videos in the order of the prompt, and the tower's output, whose form `Adapter.pack` copies."""

    clips: list[Clip]
    output: Any


class Adapter:
    """Base class of a model family's adapter; `register_adapter` registers subclasses.

    Attributes:
        modality: `"video"`, or `"image"` where frames travel as images.
        pixels: Name of the model input with the frames.
        consumed: Inputs that describe the pixels and are removed with them.
        frame_text: Whether every frame has its own run of placeholders, after its time as text.
        uses_mrope: Whether positions have rows for time, height and width.
        generates_audio: Whether the model also generates speech from hidden states of the original prompt.
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
        """Raise ValueError if the model cannot be hooked."""
        if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
            from transformers import __version__

            raise ValueError(
                f"model: expected transformers 5.18 or later, whose {type(model).__name__}.forward takes "
                f"mm_encoder_outputs, got transformers {__version__}"
            )

    def install(self, model: nn.Module, memory: Shrinks) -> None:
        """Install the hooks of a `PromptMemory`, and append functions that undo this to `memory.undo`."""
        install_prompt_hook(model, memory)

    def resolve_memory(self, model: nn.Module, memory: MemoryLike | None, settings: MemoryConfig) -> GivenMemory | None:
        """Return the memory to use for the argument of `attach`; None = a memory made from `settings`.

        Args:
            model: The model.
            memory: The argument of `attach`.
            settings: The settings, with the policy that was named in `attach`.

        Raises:
            TypeError: `memory` is not a memory.
            ValueError: `memory` does not fit this family.
        """
        if isinstance(memory, str):
            memory = None
        if memory is None and settings.memory_policy == DualMemory.policy:
            memory = settings.build(self.hidden_size(model), (1, 1), device=device_of(model), dtype=dtype_of(model))
        channels = getattr(self.trainable_module(memory), "key_dim", None)
        if channels not in (None, self.hidden_size(model)):
            wanted = self.hidden_size(model)
            raise ValueError(
                f"memory: expected a {type(memory).__name__} for {wanted} channels, got one for {channels}"
            )
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

    def trainable_module(self, memory: object) -> nn.Module | None:
        """Return the module of a memory that is trained with the model, as `model.vmemory`, or None."""
        return memory if isinstance(memory, nn.Module) and next(memory.parameters(), None) is not None else None

    def feature_module(self, model: nn.Module) -> Any:
        """Return the module with `get_video_features`, which differs between releases of transformers."""
        inner = getattr(model, "model", model)
        return inner if hasattr(inner, f"get_{self.modality}_features") else model

    def placeholder_id(self, model: nn.Module) -> int:
        """Return the id of the placeholder of a visual token."""
        return int(getattr(model.config, f"{self.modality}_token_id"))

    def hidden_size(self, model: nn.Module) -> int:
        """Return the channels of a visual token at the input of the language model."""
        config: Any = model.config
        return int(config.get_text_config().hidden_size)

    def encode(self, model: nn.Module, inputs: Inputs) -> Encoded:
        """Run the vision tower once, exactly as the model does."""
        raise NotImplementedError

    def iter_chunks(self, model: nn.Module, inputs: Inputs, chunk: int) -> Iterator[Iterator[Inputs]]:
        """Yield for each video an iterator of inputs for `encode`, with at most `chunk` frames each."""
        raise NotImplementedError

    def pack(self, output: ModelOutput, tokens: Sequence[Tensor]) -> ModelOutput:
        """Return tokens `[N_i, C]` per video in the form of the tower's output."""
        return as_pooling(list(tokens))

    def positions(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
        """Return positions `[3, B, L]` of the given prompt and its rope deltas `[B, 1]`; None = plain positions."""
        return None

    # for streams: frames arrive one by one, and the prompt is written at the end

    def encode_frames(self, model: nn.Module, frames: Tensor, processor: object, size: tuple[int, int]) -> Encoded:
        """Run the vision tower on frames of one video.

        Args:
            model: The model.
            frames: `[n, 3, H, W]` uint8, n a multiple of `temporal_patch_size`.
            processor: The model's processor, for its pixel statistics; None = the family's own statistics.
            size: (H, W) in pixels to which frames are scaled.
        """
        return self.encode(model, on_device(model, self.preprocess(model, frames, processor, size)))

    def temporal_patch_size(self, model: nn.Module) -> int:
        """Return the number of video frames in one frame of the memory."""
        return 1

    def frame_time(self, first: float, last: float) -> float:
        """Return the seconds of a frame of the memory from those of its first and last video frame."""
        return first

    def preprocess(self, model: nn.Module, frames: Tensor, processor: object, size: tuple[int, int]) -> Inputs:
        """Return inputs for `encode` from `frames [n, 3, H, W]` uint8, scaled to `size`."""
        raise NotImplementedError

    def frame_size(self, model: nn.Module, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        """Return the size near `size` (H, W) at which a frame has at most `tokens` tokens."""
        raise NotImplementedError

    def size_of(self, model: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the size (H, W) in pixels of frames with a given token grid."""
        return self.frame_size(model, grid, grid[0] * grid[1])

    def video_text(self, frames: Sequence[tuple[float, int]], token: str, tail: int) -> str:
        """Return a video's text in a prompt: `token` for each of `frames` (seconds, tokens), then `tail` tokens."""
        return token * (sum(count for _, count in frames) + tail)

    def temporal_position(self, model: nn.Module, frame: int, seconds: float) -> int:
        """Return the temporal position of a frame of the memory, counted from the start of the stream."""
        return 0

    def set_rope_deltas(self, model: nn.Module, rope_deltas: Tensor | None) -> None:
        """Set the model's rope deltas, which it keeps between calls for the positions after the prompt."""
        for module in (getattr(model, "model", model), model):
            if rope_deltas is not None and hasattr(module, "rope_deltas"):
                module.rope_deltas = rope_deltas


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which a model computes, even if accelerate has offloaded its weights."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a model computes: that of its first floating weight."""
    # replicas of nn.DataParallel have no parameters, only `_former_parameters`
    held = (part.__dict__.get("_former_parameters", part._parameters).values() for part in model.modules())
    weights = (weight for part in held for weight in part if weight is not None)
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)


def on_device(model: nn.Module, inputs: Inputs) -> Inputs:
    """Move tensors to the model's device, floating ones in its dtype; other inputs are unchanged."""
    device, dtype = device_of(model), dtype_of(model)
    return {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def as_pooling(tokens: Any) -> ModelOutput:
    """Return tokens in the output class of transformers' towers."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=tokens)


def one_tensor(tokens: Sequence[Tensor]) -> ModelOutput:
    """Return videos' tokens `[N_i, C]` as one tensor, for models that flatten the towers' output.

    `[V, N, C]` if all videos have equally many, so that beams copy whole videos. Otherwise one entry per token,
    `[ΣN, 1, C]`; newer releases of transformers copy the entries of a row together.
    """
    same = len({len(video) for video in tokens}) == 1
    return as_pooling(torch.stack(list(tokens)) if same else torch.cat(list(tokens))[:, None])


def check_copies(model: Any, inputs: Inputs) -> None:
    """Raise ValueError if beams or several answers would give a row the video of another row."""
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
    """Return the `inputs` that `function` accepts; `renamed` maps a parameter's name to the input's."""
    source = {**inputs, **{name: inputs.get(other) for name, other in renamed.items()}}
    names = inspect.signature(function).parameters
    return {name: value for name, value in source.items() if name in names and value is not None}
