"""Training steps with a memory on tiny models of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import vmemory
from tests.tiny_vlms import FAMILIES, tiny
from tests.tiny_words import byte_words
from vmemory.banks import MemoryConfig
from vmemory.train import BudgetedMemory, MemoryTrainer, TrainingArguments

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_self_distillation(family: str, tmp_path: Path) -> None:
    model, inputs = tiny(family, T=6)
    behind = torch.arange(inputs["input_ids"].shape[1])[None] >= inputs["input_ids"].shape[1] - 3
    batch = {**inputs, "labels": inputs["input_ids"].masked_fill(~behind, -100)}
    config = MemoryConfig(memory_policy="merging", memory_capacities=(2,), memory_reduced_sizes=(4,))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, memory_bank_loss_weight=2.0, disable_tqdm=True)
    vmemory.attach(model, BudgetedMemory(config), config)
    trainer = MemoryTrainer(model, args, tokenizer=byte_words())
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    handle = vmemory.attached(model)
    assert handle is not None
    model.eval()
    with torch.no_grad():
        own = model(**batch)
        with handle.disabled():
            whole = model(**inputs).logits[:, -4:-1]
    p, q = whole.log_softmax(-1), own.logits[:, -4:-1].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert divergence > 0
    torch.testing.assert_close(loss.detach(), own.loss + 2 * divergence, rtol=2e-5, atol=1e-6)
