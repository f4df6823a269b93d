"""CLIP4Clip and STOP as far as their methods are documented, tiny and with random weights."""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import nn

from tests.clip_models import OpenAICLIP


class CLIP4Clip(nn.Module):
    """By its methods: pairs of texts and videos in, a loss while training; features and logits apart in evaluation."""

    def __init__(self, task_config: Namespace | None = None) -> None:
        super().__init__()
        self.task_config = task_config or Namespace()
        self.loose_type = True
        self.clip = OpenAICLIP()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids, token_type_ids, attention_mask, video, video_mask=None):
        video_mask = video_mask.view(-1, video_mask.shape[-1])
        video = torch.as_tensor(video).float()
        b, pair, bs, ts, channel, h, w = video.shape
        video = video.view(b * pair * bs * ts, channel, h, w)
        text, visual = self.get_sequence_visual_output(
            input_ids, token_type_ids, attention_mask, video, video_mask, shaped=True, video_frame=bs * ts
        )
        if not self.training:
            return None
        logits, *_ = self.get_similarity_logits(text, visual, attention_mask, video_mask, shaped=True, loose_type=True)
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def get_sequence_output(self, input_ids, token_type_ids, attention_mask, shaped=False):
        return self.clip.encode_text(input_ids.view(-1, input_ids.shape[-1]))[:, None]

    def get_visual_output(self, video, video_mask, shaped=False, video_frame=-1):
        if shaped is False:
            video_mask = video_mask.view(-1, video_mask.shape[-1])
            video = torch.as_tensor(video).float()
            b, pair, bs, ts, channel, h, w = video.shape
            video = video.view(b * pair * bs * ts, channel, h, w)
            video_frame = bs * ts
        self.seen.append((len(video), video_frame))
        visual = self.clip.encode_image(video, video_frame=video_frame).float()
        return visual.view(video_mask.size(0), -1, visual.size(-1))

    def get_sequence_visual_output(
        self, input_ids, token_type_ids, attention_mask, video, video_mask, shaped=False, video_frame=-1
    ):
        text = self.get_sequence_output(input_ids, token_type_ids, attention_mask, shaped)
        return text, self.get_visual_output(video, video_mask, shaped=shaped, video_frame=video_frame)

    def get_similarity_logits(
        self, sequence_output, visual_output, attention_mask, video_mask, shaped=False, loose_type=False
    ):
        mask = video_mask.view(-1, video_mask.shape[-1])[..., None].float()
        visual = visual_output / visual_output.norm(dim=-1, keepdim=True)
        visual = (visual * mask).sum(1) / mask.sum(1).clamp_min(1)
        text = F.normalize(sequence_output.squeeze(1), dim=-1)
        return self.clip.logit_scale.exp() * text @ F.normalize(visual, dim=-1).T, ()


class PromptedCLIP(OpenAICLIP):
    """STOP's: prompts with the images, and a table of them for a fixed number of frames; a vector a video."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(12, 24))

    def encode_prompt(self, batch_size, device=None):
        return torch.zeros(1, device=device), torch.zeros(1, device=device)

    def encode_image(self, image, unified_visual_prompt, video_frame=-1):
        frames = super().encode_image(image).view(-1, video_frame, 24)
        return (frames + self.prompts.view(1, video_frame, 24)).mean(1) + unified_visual_prompt


class STOP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.task_config, self.video_frames, self.pre_visual_pooling = Namespace(max_frames=12), 12, 1
        self.clip = PromptedCLIP()

    def forward(self, input_ids=None, token_type_ids=None, attention_mask=None, video=None, video_mask=None):
        text_prompt, visual_prompt = self.clip.encode_prompt(1)
        video_frame = video.shape[2]
        video_mask = video_mask.view(-1, video_mask.shape[-1])
        visual = self.get_visual_output(video, visual_prompt, video_mask, video_frame=video_frame)
        visual = visual / visual.norm(dim=-1, keepdim=True)
        mask = video_mask.float()[..., None]
        visual = (visual * mask).sum(1) / mask.sum(1).clamp_min(1)
        return {"sequence_output": self.get_sequence_output(input_ids, text_prompt), "visual_output": visual}

    def get_sequence_output(self, input_ids, unified_text_prompt, token_type_ids=None, attention_mask=None):
        return self.clip.encode_text(input_ids.view(-1, input_ids.shape[-1]))[:, None]

    def get_visual_output(self, video, unified_visual_prompt, video_mask=None, video_frame=-1):
        images, video_frame = video.view(-1, *video.shape[3:]), video.shape[2]
        visual = self.clip.encode_image(images, unified_visual_prompt, video_frame=video_frame)
        return visual.view(video_mask.size(0), -1, visual.size(-1))

    def get_similarity_logits(self, sequence_output, visual_output, attention_mask, video_mask, shaped=False):
        text = F.normalize(sequence_output.squeeze(1), dim=-1)
        return text @ F.normalize(visual_output, dim=-1).T, ()
