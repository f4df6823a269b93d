"""A training loop beside a memory: logits stand at the caller's labels, for whoever looks at them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
import transformers

import vmemory
from tests.attaching import SMALL
from tests.tiny_vlms import FAMILIES, tiny

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def with_labels(family, left=False, B=2):
    """Inputs with labels, of the last five tokens of each row, as collators mask the prompt."""
    model, inputs = tiny(family, T=6, B=B, left=left)
    mask = inputs["attention_mask"]
    behind = mask.flip(1).cumsum(1).flip(1)
    return model, inputs | {"labels": inputs["input_ids"].masked_fill((mask == 0) | (behind > 5), -100)}


def cross_entropy(logits, labels):
    """Of what is labelled, as a loop of one's own takes it."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stand_at_the_caller_s_labels(family):
    for left in (True, False):
        model, inputs = with_labels(family, left)
        labels = inputs["labels"]
        with vmemory.attach(model, config=SMALL):
            new = vmemory.compress_inputs(model, inputs, generating=False)
            out = model(**inputs)
        assert new["labels"].shape[1] < labels.shape[1]
        assert out.logits.shape[:2] == labels.shape
        inner = model(**new)
        torch.testing.assert_close(inner.loss, out.loss)
        torch.testing.assert_close(cross_entropy(inner.logits, new["labels"]), out.loss)
        torch.testing.assert_close(cross_entropy(out.logits, labels), out.loss)
        # what DPO and GRPO look up
        there = labels[:, 1:] != -100
        found = out.logits[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0][there]
        torch.testing.assert_close(-found.mean(), out.loss)
        cross_entropy(out.logits, labels).backward()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "video_llama_3"])
def test_the_last_logits_and_those_asked_for(family):
    model, inputs = tiny(family, T=6, B=2)
    L = inputs["input_ids"].shape[1]
    with vmemory.attach(model, config=SMALL), torch.no_grad():
        whole = model(**inputs).logits
        assert whole.shape[1] == L
        for asked in (1, 7, L - 1, torch.tensor([0, 3, L // 2, L - 2])):
            kept = whole[:, -asked:] if isinstance(asked, int) else whole[:, asked]
            # which transformers' VideoLLaMA3 takes and does not heed
            kept = whole if family == "video_llama_3" else kept
            torch.testing.assert_close(model(**inputs, logits_to_keep=asked).logits, kept, rtol=0, atol=1e-5)
        assert torch.equal(model(**inputs, return_dict=False)[0], whole)
        labels = inputs["input_ids"]
        assert torch.equal(model(**inputs, labels=labels, return_dict=False)[1], whole)
    with vmemory.attach(model, config={**SMALL, "memory_full_logits": False}), torch.no_grad():
        short = vmemory.compress_inputs(model, inputs, generating=False)
        assert model(**inputs).logits.shape[1] == short["input_ids"].shape[1] < L


def first_of(out):
    """The logits, where a trainer gathers other outputs with them."""
    return out[0] if isinstance(out, tuple) else out


class Twice(torch.utils.data.Dataset):
    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.inputs


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_trainer_with_metrics_and_label_smoothing(tmp_path, smoothing):
    pytest.importorskip("accelerate")
    model, inputs = with_labels("qwen2_5_vl", B=1)
    labels = inputs["labels"]
    seen = {}

    def metrics(prediction):
        logits, wanted = (torch.as_tensor(x) for x in (prediction.predictions, prediction.label_ids))
        there = wanted[:, 1:] != -100
        seen["shape"] = logits.shape[:2], wanted.shape
        return {"accuracy": (logits[:, :-1].argmax(-1) == wanted[:, 1:])[there].float().mean().item()}

    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=1, per_device_eval_batch_size=1, max_steps=12, learning_rate=2e-2,
        label_smoothing_factor=smoothing, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    with vmemory.attach(model, config=SMALL):
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Twice(inputs), eval_dataset=Twice(inputs), compute_metrics=metrics,
            data_collator=lambda rows: rows[0], preprocess_logits_for_metrics=lambda out, _: first_of(out),
        )  # fmt: skip
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    assert seen["shape"] == ((2, labels.shape[1]), (2, labels.shape[1]))
    assert before["eval_accuracy"] < 1
    # five tokens are learned by heart; smoothed labels of a model with pictures are not shifted in transformers
    assert smoothing or after["eval_accuracy"] == 1
    assert after["eval_loss"] < before["eval_loss"]
