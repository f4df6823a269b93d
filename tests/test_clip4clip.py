"""CLIP4Clip and STOP, as stand-ins with the documented methods: recognised, compressed, masked, trained, detached."""

from __future__ import annotations

import copy
import io
from argparse import ArgumentParser, Namespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.clip4clip_models import STOP, CLIP4Clip
from tests.clip_models import OpenAICLIP
from tests.replicas import parallel_apply, replicas, sent
from vmemory.compress import AdaptiveFrameResampler, FrameResampler, FrameSelector, TempMe, add_tempme_arguments
from vmemory.eval import RetrievalHead, retrieval_scores
from vmemory.integrations import clip4clip
from vmemory.testing import random_tensor

MERGE: dict[str, Any] = {"frames": 12, "merge_layers": "2-3", "merge_frames": "3-2", "r": 1}


def batch(B: int = 3, T: int = 12, frames: tuple[int, ...] = (12, 3, 9), stop: bool = False) -> tuple[Tensor, ...]:
    """Texts `[B, 1, 7]`, their types and masks, videos, and `video_mask [B, 1, T]` int64; padding is 0."""
    texts = torch.randint(40, (B, 1, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(T) < torch.tensor(frames)[:, None]).long()[:, None]
    video = random_tensor(B, 1, T, 3, 16, 16) * mask[..., None, None, None]
    video = video if stop else video[:, :, :, None]
    return texts, torch.zeros_like(texts), torch.ones_like(texts), video, mask


def frame_compressors() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        FrameSelector(0.5, 16),
        FrameResampler(12, 4, 16, 1, 2),
        AdaptiveFrameResampler(12, 2, 6, 16, 1, 2),
    ]


def test_recognises_by_methods():
    assert clip4clip.family(CLIP4Clip()) == "clip4clip"
    assert clip4clip.family(STOP()) == "stop"
    with pytest.raises(TypeError, match=r"model: expected a CLIP4Clip or STOP model .* got Linear with none of them"):
        clip4clip.attach(nn.Linear(2, 2), FrameSelector())
    with pytest.raises(TypeError, match="got OpenAICLIP"):
        clip4clip.attach(OpenAICLIP(), FrameSelector())


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("shaped", [False, True])
@torch.no_grad()
def test_compressed_frames_are_what_the_tower_sees(which, shaped):
    model, compressor = CLIP4Clip().eval(), frame_compressors()[which].eval()
    texts, types, words, video, mask = batch()
    out = compressor(video[:, 0, :, 0], mask[:, 0] > 0)
    K = out.frames.shape[1]
    wanted = model.clip.encode_image(out.frames.flatten(0, 1)).view(3, K, -1)
    logits = model.get_similarity_logits(model.get_sequence_output(texts, types, words), wanted, words, out.mask)[0]
    with clip4clip.attach(model, compressor) as attached:
        given = (video.flatten(0, 3), mask[:, 0]) if shaped else (video, mask)
        text, visual = model.get_sequence_visual_output(texts, types, words, *given, shaped, 12 if shaped else -1)
        assert torch.equal(visual[out.mask], wanted[out.mask])
        # whoever divides by the norm must not make NaN of a frame that does not exist
        assert bool((visual[~out.mask] == 1).all())
        assert model.seen[-1] == (3 * K, K)
        # the caller's mask speaks of twelve frames
        assert torch.equal(model.get_similarity_logits(text, visual, words, mask, loose_type=True)[0], logits)
        alone = attached.compress(*given)
        assert torch.equal(alone.video.reshape(out.frames.shape), out.frames)
        assert alone.video.dim() == given[0].dim()
        assert alone.mask.dtype == torch.int64
        assert torch.equal(alone.mask > 0, out.mask)
    assert out.mask.sum(1).tolist() != [K] * 3


@torch.no_grad()
def test_merges_inside_the_tower():
    model = CLIP4Clip().eval()
    texts, types, words, video, mask = batch()
    merging = TempMe(model.clip, **MERGE)
    plain = model.get_visual_output(video, mask)
    wanted = merging(video[:, 0, :, 0], mask[:, 0] > 0).frames
    with clip4clip.attach(model, merging):
        text, visual = model.get_sequence_visual_output(texts, types, words, video, mask)
        logits = model.get_similarity_logits(text, visual, words, mask)[0]
    there = mask[:, 0] > 0
    assert torch.equal(visual[there], wanted[there])
    assert not torch.allclose(visual[there], plain[there], rtol=0.01)
    assert logits.isfinite().all()
    head = RetrievalHead()
    head.logit_scale.data.copy_(model.clip.logit_scale)
    torch.testing.assert_close(logits, head(text[:, 0], wanted, there))


@torch.no_grad()
def test_merging_nothing_is_the_model_itself():
    model = CLIP4Clip().double().eval()
    video, mask = (x for x in batch(frames=(12, 12, 12))[3:])
    plain = model.clip.encode_image(video.double().flatten(0, 3)).view(3, 12, -1)
    with clip4clip.attach(model, TempMe(model.clip, merge_layers="", merge_frames="", r=0)):
        torch.testing.assert_close(model.get_visual_output(video.double(), mask), plain.float())


@pytest.mark.parametrize("how", ["simple", "merge"])
def test_retrieval_end_to_end(how):
    """Options on a command line, training, then the evaluation loop of CLIP4Clip over batches, and R@K."""
    parser = ArgumentParser()
    add_tempme_arguments(parser)
    options = {
        "simple": ["--tempme_compression_ratio", "0.5", "--tempme_hidden_dim", "16"],
        "merge": ["--tempme_merge_layer", "2-3", "--tempme_merge_frame_num", "3-2", "--tempme_tome_r", "1"],
    }[how]
    torch.manual_seed(0)
    model = CLIP4Clip(parser.parse_args(["--use_tempme", "True", "--tempme_type", how, *options]))
    clip4clip.attach(model)
    assert all(name.startswith(("clip.", "vmemory.")) for name in model.state_dict())
    assert len({name for name in model.state_dict() if name.startswith("vmemory.")}) > 1
    texts, types, words, video, mask = batch(6, 12, (12, 5, 9, 1, 12, 7))
    texts = (6 * torch.arange(6)[:, None, None] + torch.arange(6)).clamp(max=39)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for _ in range(40):
        optimiser.zero_grad()
        model(texts, types, words, video, mask).backward()
        optimiser.step()
    assert all(not torch.equal(w, before[n]) for n, w in model.named_parameters() if n.startswith("vmemory."))
    model.eval()
    rows, halves = [], (slice(0, 4), slice(4, 6))
    with torch.no_grad():
        cached = [
            model.get_sequence_visual_output(*(x[part] for x in (texts, types, words, video, mask))) for part in halves
        ]
        for text, _ in cached:
            scores = [
                model.get_similarity_logits(text, v, words, mask[part])[0]
                for (_, v), part in zip(cached, halves, strict=True)
            ]
            rows.append(torch.cat(scores, 1))
    for direction in retrieval_scores(torch.cat(rows)):
        assert direction.recall == {1: 1.0, 5: 1.0, 10: 1.0}
        assert (direction.median_rank, direction.mean_rank) == (1.0, 1.0)


def scored(model: Any, texts: list[Any], videos: list[Any], words: list[Tensor], visual: list[Tensor]) -> list[Tensor]:
    """CLIP4Clip's loop over batches of texts and, for each, batches of videos."""
    return [
        torch.cat([model.get_similarity_logits(w, v, t[0], m[0])[0] for m, v in zip(videos, visual, strict=True)], 1)
        for t, w in zip(texts, words, strict=True)
    ]


@pytest.mark.parametrize("which", [0, 1, 2, "merge"])
@torch.no_grad()
def test_evaluation_on_several_devices(which):
    """What CLIP4Clip's evaluation does where it sees several devices: outputs move, replicas give the scores."""
    model = CLIP4Clip().eval()
    clip4clip.attach(model, TempMe(model.clip, **MERGE) if which == "merge" else frame_compressors()[which])
    texts, videos, words, visual = [], [], [], []
    for frames in ((12, 3, 9), (5, 12, 1)):
        text, types, there, video, mask = batch(frames=frames)
        w, v = model.get_sequence_visual_output(text, types, there, video, mask)
        for held, new in zip((texts, videos, words, visual), ((there,), (mask,), w, v), strict=True):
            held.append(new)
    wanted = torch.cat(scored(model, texts, videos, words, visual))
    first = (texts[:1], videos, words[:1], visual)
    second = tuple(map(sent, (texts[1:], videos, words[1:], visual)))
    got = parallel_apply(scored, model, [first, second])
    assert torch.equal(torch.cat([rows for part in got for rows in part]), wanted)


@pytest.mark.parametrize("which", [0, 1, 2, "merge"])
@torch.no_grad()
def test_a_replica_has_methods_and_weights_of_its_own(which):
    model = CLIP4Clip().eval()
    video, mask = batch()[3:]
    clip4clip.attach(model, TempMe(model.clip, **MERGE) if which == "merge" else frame_compressors()[which])
    if which == "merge":
        for position in model.vmemory.values():
            position.normal_()
    wanted = model.get_visual_output(video, mask)
    other = replicas(model)[1]
    twice = replicas(other)[0]
    for weight in model.parameters():
        weight.zero_()
    for replica in (other, twice):
        assert clip4clip.attachment(replica).model is replica
        assert torch.equal(replica.get_visual_output(video, mask), wanted)
        with clip4clip.attachment(replica).disabled():
            assert replica.get_visual_output(video, mask).shape[1] == 12
        assert torch.equal(replica.get_visual_output(video, mask), wanted)
    assert clip4clip.attachment(model).model is model
    assert not torch.equal(model.get_visual_output(video, mask), wanted)


def test_the_mask_goes_wherever_the_output_goes():
    model = CLIP4Clip().eval()
    texts, types, words, video, mask = batch()
    attached = clip4clip.attach(model, AdaptiveFrameResampler(12, 2, 12, 16, 1, 2).eval())
    text, visual = model.get_sequence_visual_output(texts, types, words, video, mask)
    wanted = model.get_similarity_logits(text, visual, words, mask)[0]
    assert 0 < int(clip4clip._mask_of(visual).sum()) < 36
    for other in (visual.clone(), torch.cat([visual[:1], visual[1:]]), torch.from_numpy(visual.detach().numpy())):
        assert torch.equal(model.get_similarity_logits(text, other, words, mask)[0], wanted)
    for other in (F.normalize(visual, dim=-1), visual.half(), visual.bfloat16(), 3 * visual):
        assert torch.equal(clip4clip._mask_of(other), clip4clip._mask_of(visual))
    with pytest.raises(
        ValueError, match=r"visual_output: expected what .* of 12 frames, \[B, 12, D\], got shape \[3, 5"
    ):
        model.get_similarity_logits(text, visual[:, :5], words, mask)
    with attached.disabled():
        model.get_similarity_logits(text, visual[:, :5], words, mask[..., :5])


@torch.no_grad()
def test_stop_gets_its_twelve_frames():
    model = STOP().eval()
    texts, types, words, video, mask = batch(3, 24, (24, 5, 17), stop=True)
    with pytest.raises(RuntimeError, match="shape"):
        model(texts, types, words, video, mask)
    for compressor in (
        FrameSelector(0.5, 16),
        FrameResampler(24, 12, 16, 1, 2),
        FrameSelector(1.0, 16, output_frames=12),
    ):
        compressor.eval()
        frames, there = compressor(video[:, 0], mask[:, 0] > 0)[:2]
        assert frames.shape[1] == 12
        wanted = model.clip.encode_image(frames.flatten(0, 1), torch.zeros(1), video_frame=12)
        with clip4clip.attach(model, compressor):
            assert torch.equal(model.get_visual_output(video, torch.zeros(1), mask[:, 0])[:, 0], wanted)
            out = model(texts, types, words, video, mask)
            torch.testing.assert_close(out["visual_output"], F.normalize(wanted, dim=-1))
            model.get_similarity_logits(out["sequence_output"], out["visual_output"], words, mask)
        assert there.sum(1).tolist() == [12, 5, 12]


def test_stop_refuses_what_its_tower_cannot_take():
    model = STOP()
    video, mask = batch(3, 12, (12, 5, 12), stop=True)[3:]
    with (
        clip4clip.attach(model, FrameSelector(0.5, 16)),
        pytest.raises(
            ValueError, match="makes 12, which is what STOP's tower takes, got 12 frames, of which it makes 6"
        ),
    ):
        model.get_visual_output(video, torch.zeros(1), mask)
    with pytest.raises(TypeError, match=r"compressor: expected a FrameSelector, .* for STOP"):
        clip4clip.attach(model, TempMe(model.clip, **MERGE))


def test_refuses_what_does_not_fit():
    model = CLIP4Clip()
    with pytest.raises(ValueError, match="TempMe of the model's own tower"):
        clip4clip.attach(model, TempMe(OpenAICLIP(), **MERGE))
    with pytest.raises(TypeError, match="compressor: expected a frame compressor or TempMe, got Linear"):
        clip4clip.attach(model, nn.Linear(2, 2))
    with clip4clip.attach(model, FrameSelector(0.5, 16)):
        with pytest.raises(ValueError, match="model: expected one without a vmemory"):
            clip4clip.attach(model, FrameSelector())
        video, mask = batch()[3:]
        with pytest.raises(ValueError, match="video: expected frames for a video_mask of 3 videos of 11 frames"):
            model.get_visual_output(video, mask[..., :11])
        with pytest.raises(ValueError, match=r"video_mask: expected a tensor .* got NoneType"):
            model.get_visual_output(video, None)
    with (
        clip4clip.attach(model, TempMe(model.clip, **MERGE)) as attached,
        pytest.raises(TypeError, match="compressor: expected one of frames, got TempMe"),
    ):
        attached.compress(video, mask)


@pytest.mark.parametrize("how", ["frames", "tokens"])
def test_detach_leaves_no_trace(how):
    model = CLIP4Clip()
    video, mask = batch()[3:]
    wanted = model.get_visual_output(video, mask)
    before = (set(model.__dict__), list(model.state_dict()), [name for name, _ in model.named_modules()])
    attached = clip4clip.attach(model, FrameSelector(0.5, 16) if how == "frames" else TempMe(model.clip, **MERGE))
    assert not torch.equal(model.get_visual_output(video, mask)[:, :6], wanted[:, :6])
    with attached.disabled():
        assert torch.equal(model.get_visual_output(video, mask), wanted)
    attached.detach()
    attached.detach()
    assert before == (set(model.__dict__), list(model.state_dict()), [name for name, _ in model.named_modules()])
    assert torch.equal(model.get_visual_output(video, mask), wanted)
    assert clip4clip.attachment(model) is None


def test_without_the_option_nothing_is_attached():
    model = CLIP4Clip(Namespace(use_tempme=False, tempme_type="merge"))
    before = set(model.__dict__)
    with clip4clip.attach(model) as attached:
        assert set(model.__dict__) == before
        video, mask = batch()[3:]
        assert torch.equal(attached.compress(video, mask).video, video)


@pytest.mark.parametrize("how", ["frames", "tokens"])
def test_copies_and_files_have_an_attachment_of_their_own(how):
    model = CLIP4Clip().eval()
    video, mask = batch()[3:]
    clip4clip.attach(model, FrameSelector(0.5, 16) if how == "frames" else TempMe(model.clip, **MERGE))
    wanted = model.get_visual_output(video, mask)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    clip4clip.attachment(model).detach()
    for other in others:
        assert torch.equal(other.get_visual_output(video, mask), wanted)
        clip4clip.attachment(other).detach()
        assert "get_visual_output" not in other.__dict__
        assert not hasattr(other, "vmemory")


def test_methods_replaced_before_and_after():
    model = CLIP4Clip()
    video, mask = batch()[3:]
    mine = CLIP4Clip.get_visual_output.__get__(model)
    model.get_visual_output = mine
    attached = clip4clip.attach(model, FrameSelector(0.5, 16))
    assert model.get_visual_output(video, mask).shape[1] == 6
    theirs, model.get_visual_output = model.get_visual_output, mine
    with pytest.raises(RuntimeError, match="get_visual_output: expected the method that attach put there"):
        attached.detach()
    model.get_visual_output = theirs
    attached.detach()
    assert model.__dict__["get_visual_output"] is mine
