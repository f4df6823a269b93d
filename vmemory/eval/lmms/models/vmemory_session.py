"""A video model with a memory as a model of lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model

from vmemory.eval.cells import cells_of
from vmemory.models.loading import device_for, load_model
from vmemory.session.session import VideoSession
from vmemory.sources import FrameSource


@register_model("vmemory_session")
class SessionModel(lmms):
    """A model that watches each video through a memory. Questions about one video in a row share its encoding.

    Args:
        pretrained: A folder with a model, or its id on a hub.
        memory: A policy's name, `"default"`, or a `.json` file of settings.
        budget: Tokens (`96`), a share (`25%`) or bytes (`64KiB`); None = the file's own size.
        fps: Frames a second to look at.
        frame_tokens: Largest number of tokens of a frame.
        device, dtype: As in `vmemory.models.loading.load_model`.
        batch_size: Only 1; questions about a video are a batch by themselves.
        other: Arguments that lmms-eval passes to every model.

    Raises:
        ValueError: An argument does not fit.
    """

    def __init__(
        self,
        pretrained: str,
        memory: str = "default",
        budget: str | int | None = "25%",
        fps: float = 1.0,
        frame_tokens: int = 256,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        **other: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(f"batch_size: expected 1, got {batch_size!r}")
        unknown = sorted(set(other) - {"max_batch_size"})
        if unknown:
            raise ValueError(f"model_args: expected arguments of SessionModel, got {', '.join(unknown)}")
        self.cell = cells_of([memory], [] if budget is None else [str(budget)])[-1]
        self.fps, self.frame_tokens = float(fps), int(frame_tokens)
        self.model, self.processor = load_model(pretrained, device_for(device), dtype)

    def watch(self, visuals: Sequence[Any]) -> VideoSession:
        """Return a session that has seen a video: the path of a film, or pictures.

        Raises:
            ValueError: Something else.
        """
        films = [v for v in visuals if isinstance(v, str | Path)]
        if len(visuals) == 0 or (films and len(visuals) != 1):
            raise ValueError(f"visuals: expected one film or pictures, got {len(visuals)} visuals, {len(films)} films")
        source = FrameSource(films[0], self.fps) if films else None
        frames = len(visuals) if source is None else source.expected
        if frames is None:
            raise ValueError(f"{films[0]}: expected a video that states its length")

        def made(**like: Any) -> Any:
            # a video may last a little longer than it says
            return self.cell.memory(frames + (8 if films else 0), **like)

        session = VideoSession(self.model, self.processor, made, fps=self.fps, frame_tokens=self.frame_tokens)
        session.push([picture.convert("RGB") for picture in visuals] if source is None else source)
        return session

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request, greedily.

        Raises:
            ValueError: A request asks for sampling or beams, or its visuals are no video.
        """
        answers: dict[int, str] = {}
        for _, group in groupby(enumerate(requests), key=lambda numbered: _document(numbered[1].args)):
            numbered = list(group)
            session = self.watch(self._visuals(numbered[0][1].args))
            # questions with one limit are one batch
            settings = [_settings(request.args[1]) for _, request in numbered]
            for most in sorted({limit for limit, _ in settings}):
                chosen = [
                    (place, request, stops)
                    for (place, request), (limit, stops) in zip(numbered, settings, strict=True)
                    if limit == most
                ]
                written = session.ask_all([_text(request.args[0]) for _, request, _ in chosen], most)
                for (place, request, stops), answer in zip(chosen, written, strict=True):
                    answers[place] = _until(answer, stops)
                    self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), answers[place])
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return for each request the logarithm of its target's probability, and whether it is the greedy answer."""
        found = []
        for _, group in groupby(requests, key=lambda request: _document(request.args)):
            same = list(group)
            session = self.watch(self._visuals(same[0].args))
            for request in same:
                target = request.args[1]
                if callable(target):
                    target = target(self._doc(request.args))
                found.append(self._likelihood(session, _text(request.args[0]), str(target)))
        return found

    @torch.no_grad()
    def _likelihood(self, session: VideoSession, text: str, target: str) -> tuple[float, bool]:
        prompt = session.prompt(text)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        new = torch.tensor([tokenizer(target, add_special_tokens=False)["input_ids"]]).to(prompt["input_ids"])
        ids = torch.cat([prompt["input_ids"], new], 1)
        inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        places = prompt.get("position_ids")
        if places is not None:
            later = places[1:, :, -1:] + 1 + torch.arange(new.shape[1], device=ids.device)
            inputs["position_ids"] = torch.cat([places[1:], later], -1)
        scores = self.model(**inputs).logits[0, -new.shape[1] - 1 : -1].float().log_softmax(-1)
        return float(scores.gather(1, new[0, :, None]).sum()), scores.argmax(-1).tolist() == new[0].tolist()

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: a memory has no rounds."""
        raise NotImplementedError("vmemory_session: tasks of several rounds are not supported")

    def _doc(self, args: Sequence[Any]) -> Any:
        _, _, _, number, task, split = args
        return self.task_dict[task][split][number]

    def _visuals(self, args: Sequence[Any]) -> list[Any]:
        return list(args[2](self._doc(args)))


def _document(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(args[3:6])


def _text(context: str) -> str:
    return context.replace("<video>", "").replace("<image>", "").strip()


def _settings(generation: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Return the most tokens and the stop words of a request."""
    if generation.get("do_sample") or generation.get("temperature") or (generation.get("num_beams") or 1) > 1:
        raise ValueError(f"gen_kwargs: expected greedy answers, got {generation}")
    stops = generation.get("until") or ()
    return int(generation.get("max_new_tokens") or 128), (stops,) if isinstance(stops, str) else tuple(stops)


def _until(answer: str, stops: Sequence[str]) -> str:
    for stop in stops:
        answer = answer.split(stop)[0] if stop else answer
    return answer
