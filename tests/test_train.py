"""Training by recipes: arguments, parts, budgets, self-distillation, interruptions, what is written."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import vmemory
from tests.commands import Run, colours, expect_error, run
from tests.tiny_vlms import FAMILIES, tiny
from vmemory.banks import MemoryConfig
from vmemory.train import (
    BudgetedMemory,
    DataArguments,
    MemoryProfiler,
    MemoryTrainer,
    ModelArguments,
    TrainingArguments,
    load_model_with_memory_bank,
    loss_picture,
    read_recipe,
    train,
)
from vmemory.train.parts import freeze, part_of, projectors
from vmemory.train.recipe import last_checkpoint, world_items
from vmemory.train.trainer import answers_right
from vmemory.train.worldlm import world_model, world_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
__all__ = ["colours", "run"]

SMALL = {
    "num_image_token": 4, "world_items": 8, "world_seconds": 10, "world_questions": 2, "stage": 2, "max_steps": 2,
    "per_device_train_batch_size": 2, "learning_rate": "1e-3", "use_cpu": True, "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip
MERGING = {"use_memory_bank": True, "memory_policy": "merging", "memory_capacities": [3], "memory_reduced_sizes": [4]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's model with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    world_model().save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return folder


Trained = Callable[..., MemoryTrainer]


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    def written(**changes: Any) -> Path:
        given = {"model_name_or_path": str(checkpoint), "output_dir": str(tmp_path / "out"), **SMALL, **changes}
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(given))
        return file

    return written


@pytest.fixture
def trained(recipe: Callable[..., Path]) -> Trained:
    return lambda **changes: train(read_recipe([str(recipe(**changes))]))


# ---- arguments


def test_names_and_defaults_are_those_of_the_plan() -> None:
    plan: dict[type, dict[str, Any]] = {
        DataArguments: {
            "reverse_memory_sample_ratio": [8, 4, 1], "use_memory_bank": False, "memory_capacities": [8, 4, 1],
            "memory_reduced_sizes": [256, 64, 16], "max_num_frame": 768, "min_num_frame": 4, "sampling_method": "fps1",
            "support_online_format": False, "video_root": "", "num_image_token": 256, "force_image_size": 448,
            "max_dynamic_patch": 12, "use_thumbnail": False, "min_dynamic_patch": 1, "template_name": "Hermes-2",
            "group_by_length": False, "ds_name": "videochat_online",
        },
        ModelArguments: {
            "memory_bank_config": None, "freeze_llm": True, "freeze_backbone": True,
            "vision_encoder": "siglip_so400m_patch14_384", "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "pretrain_mm_projector": None, "mm_projector_type": "linear",
        },
        TrainingArguments: {
            "memory_bank_warmup_steps": 1000, "memory_bank_loss_weight": 1.0, "max_seq_length": 32768,
            "grad_checkpoint": True, "stage": 1,
        },
    }  # fmt: skip
    for cls, named in plan.items():
        made = cls()
        assert {name: getattr(made, name) for name in named} == named


def test_a_recipe_is_read_with_numbers_lists_and_words_behind_it(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "learning_rate: 1e-4\nmemory_capacities: [4, 2]\nbf16: true\ngrad_checkpoint: false\n"
        "fsdp_config: {version: 2}\nstage: 2\nmemory_bank_config:\n"
        "reverse_memory_sample_ratio: null\ngroup_by_length: true\n"
    )
    model, data, training = read_recipe([str(file), "--max_steps", "7", "--stage", "1", "--use_cpu"])
    assert (training.learning_rate, training.max_steps, training.stage, training.bf16) == (1e-4, 7, 1, True)
    assert (data.memory_capacities, model.memory_bank_config) == ([4, 2], None)
    assert data.reverse_memory_sample_ratio is None
    assert (training.train_sampling_strategy, training.gradient_checkpointing) == ("group_by_length", False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--max_stps", "3"],
            "max_stps: expected an argument of a recipe, got an unknown one; did you mean max_steps?",
        ),
        (["--max_steps", "x"], "max_steps: invalid int value: 'x'"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor: expected 0, got 0.1"),
        (["--stage", "3"], "stage: expected 1 or 2, got 3"),
        (["--template_name", "x"], "template_name: expected the default 'Hermes-2', the model's own"),
        (["--pretrain_mm_projector", "x"], "pretrain_mm_projector: expected the default None, the checkpoint"),
        (["--turns", "x"], "turns: expected one of together, apart, got 'x'"),
        (["--memory_budget_range", "2", "1"], r"memory_budget_range: expected two factors above 0 in order, got \[2"),
        (["--world_items", "2", "--data_path", "a"], "world_items: expected either worlds or data_path"),
        (["--memory_bank_warmup_steps", "-1"], "memory_bank_warmup_steps: expected 0 or more, got -1"),
        (["--output_dir", "nowhere", "--resume_from_checkpoint", "true"], "expected a checkpoint in nowhere, got none"),
        (["--use_cpu"], "model_name_or_path: expected a folder or the id of a model, got none"),
    ],
)
def test_arguments_that_do_not_fit_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(read_recipe(words))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_capacities": [4]}, "memory_reduced_sizes: expected 1, as many as memory_capacities, got"),
        (
            {"memory_capacities": [4, 2], "memory_reduced_sizes": [16, 4]},
            "reverse_memory_sample_ratio: expected null, or",
        ),
        ({"memory_reduced_sizes": [15, 4, 1]}, "memory_reduced_sizes: expected square numbers of tokens, got 15"),
        ({"memory_policy": "nope"}, "memory_policy: expected one of 'dual', 'episodic'"),
        ({"memory_policy": "dual"}, "memory_capacities: expected two of a dual memory"),
        ({"memory_policy": "dual", "memory_capacities": [0, 0, 1]}, "memory_capacities: expected two of a dual memory"),
    ],
)
def test_memories_that_do_not_fit_are_told_before_the_first_step(
    trained: Trained, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(use_memory_bank=True, **changes)


def test_a_command_tells_in_one_line(run: Run, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    expect_error(run("train", tmp_path / "none.yaml"), "none.yaml: No such file")
    (tmp_path / "bad.yaml").write_text("a: 1\nb: [1\nc: 2\n")
    expect_error(run("train", tmp_path / "bad.yaml"), r"bad.yaml: line 3: not YAML")
    (tmp_path / "list.yaml").write_text("- 1\n")
    expect_error(run("train", tmp_path / "list.yaml"), r"list.yaml: expected an argument a line")
    (tmp_path / "data.json").write_text('[{"video": "x",\n "conversations": [}]')
    file = recipe(world_items=0, data_path=str(tmp_path / "data.json"))
    code, _, err = run("train", file)
    assert code == 1
    assert "data.json: line 2: not JSON" in err.splitlines()[-1]
    (tmp_path / "data.json").write_text('[{"video": "gone", "conversations": []}]')
    code, _, err = run("train", file)
    assert code == 1
    assert "expected items that can be used, got 0 items, 1 left out (data.json, item 0 (gone)" in err.splitlines()[-1]


# ---- parts of a model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_parts(family: str) -> None:
    model, _ = tiny(family, T=4)
    found = {part_of(name) for name, _ in model.named_parameters()}
    assert found == {"backbone", "projector", "language"}
    inside = {id(w) for name in projectors(model) for w in model.get_submodule(name).parameters()}
    named = {n for n, w in model.named_parameters() if part_of(n) == "projector" and id(w) not in inside}
    assert named <= {"model.image_newline"}
    trained = freeze(model, language=True, backbone=True)
    assert set(trained) == {"projector"}
    assert set(freeze(model, language=False, backbone=True)) == {"projector", "language"}


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_train_what_they_say(trained: Trained, stage: int) -> None:
    trainer = trained(stage=stage, **MERGING, memory_bank_warmup_steps=0)
    before = dict(world_model().named_parameters())
    moved = {part_of(n) for n, w in trainer.model.named_parameters() if not torch.equal(w, before[n])}
    assert moved == ({"projector"} if stage == 1 else {"projector", "language"})


# ---- budgets


@pytest.mark.parametrize("policy", sorted(set(vmemory.banks.POLICIES) - {"dual"}))
def test_the_budget_falls_from_everything_to_its_target(policy: str) -> None:
    several = policy == "hierarchical"
    config = MemoryConfig(
        memory_policy=policy, memory_capacities=(3, 2, 1) if several else (6,),
        memory_reduced_sizes=(16, 4, 1) if several else (4,),
    )  # fmt: skip
    memory = BudgetedMemory(config, warmup_steps=4)
    clip = torch.randn(40, 4, 4, 8)

    def tokens() -> Any:
        made = memory(dim=8, grid=(4, 4), key_dim=8, device=clip.device, dtype=clip.dtype)
        return made.compress(clip)

    counts = []
    for step in range(6):
        memory.draw(step)
        counts.append(len(tokens().tokens))
        if step == 0:
            assert torch.equal(tokens().tokens, clip.flatten(0, 2))
    target = config.build(8, (4, 4), device="meta").compress(clip).tokens
    assert torch.equal(tokens().tokens, target)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 5
    assert counts[4] == counts[5] == len(target)


def test_budgets_are_drawn_alike_everywhere_and_settle() -> None:
    config = MemoryConfig(memory_policy="recent", memory_capacities=(8,))
    one, two = (BudgetedMemory(config, spread=(0.5, 2.0), seed=3) for _ in range(2))
    factors = []
    for step in range(50):
        one.draw(step, step % 2)
        factors.append(one.factor)
    two.draw(49, 1)
    assert two.factor == factors[-1]
    assert 0.5 <= min(factors) < 0.7 < 1.4 < max(factors) <= 2
    two.settle()
    clip = torch.randn(20, 2, 2, 4)
    made = two(dim=4, grid=(2, 2), key_dim=4, device=clip.device, dtype=clip.dtype).compress(clip)
    assert torch.equal(made.tokens, clip[-8:].flatten(0, 2))


# ---- the loss


def test_self_distillation_is_the_divergence_from_the_model_without_memory(trained: Trained) -> None:
    trainer = trained(**MERGING, memory_bank_warmup_steps=0, memory_bank_loss_weight=0.5, max_steps=1)
    model, handle = trainer.model.train(), trainer.handle
    assert handle is not None
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.budget.draw(5)
    loss = trainer.compute_loss(model, batch)
    learned = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        own = model(**batch)
        with handle.disabled():
            whole = model(**batch)
    p, q = (out.logits[:, :-1][learned].softmax(-1) for out in (whole, own))
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    assert divergence > 1e-6
    torch.testing.assert_close(loss.detach(), own.loss + 0.5 * divergence, rtol=1e-5, atol=1e-6)
    # normalised over two batches of a step, as the model's own loss is
    count = learned.sum() * 2
    half = trainer.compute_loss(model, batch, num_items_in_batch=count)
    torch.testing.assert_close(half.detach(), loss.detach() / 2, rtol=1e-5, atol=1e-6)
    assert "memory_bank_loss" in trainer.state.log_history[0]


def test_answers_are_right_when_their_every_token_is() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 7], [-100, -100, 8, 9, -100]])
    wrote = torch.tensor([[5, 6, 0, 7, 0], [0, 8, 1, 0, 0]])

    class Prediction:
        predictions, label_ids = wrote.numpy(), labels.numpy()

    assert answers_right(Prediction) == {"answers": 2 / 3}


# ---- a run from end to end


def test_an_interrupted_run_goes_on_to_the_same_weights(
    trained: Trained, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        **MERGING, "memory_bank_warmup_steps": 4, "memory_budget_range": [0.5, 2], "max_steps": 4, "save_steps": 2,
        "save_strategy": "steps", "gradient_accumulation_steps": 2, "world_items": 24,
    }  # fmt: skip
    whole = trained(**given, output_dir=str(tmp_path / "whole")).model.state_dict()
    step = MemoryTrainer.training_step

    def interrupted(self: MemoryTrainer, *args: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted after step 3; .* goes on from checkpoint-2"):
            trained(**given)
    # killed while it was written
    (tmp_path / "out" / "checkpoint-3").mkdir()
    assert last_checkpoint(str(tmp_path / "out")) == str(tmp_path / "out" / "checkpoint-2")
    resumed = trained(**given, resume_from_checkpoint="true")
    assert resumed.state.global_step == 4
    assert [line["step"] for line in resumed.state.log_history if "loss" in line] == [1, 2, 3, 4]
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole[name]), name


def test_items_that_cannot_be_used_are_left_out_and_told(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = world_items(2, 10, 2) + world_items(2, 40, 2, seed=2)
    file = tmp_path / "items.json"
    file.write_text(json.dumps([*items, {"video": "gone.mp4", "conversations": []}]))
    with caplog.at_level(logging.INFO, "vmemory"):
        trainer = trained(
            world_items=0, data_path=str(file), max_seq_length=100, max_steps=4, per_device_train_batch_size=1
        )
    assert trainer.state.global_step == 4
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sum("max_seq_length: expected up to 100 tokens, got 2" in line for line in told) == 2
    assert sum("gone.mp4" in line for line in told) == 1
    assert told[-1] == "3 items were left out"
    assert sum(line.get("grad_norm", 0) > 0 for line in trainer.state.log_history) == 2


def test_what_a_run_writes(trained: Trained, tmp_path: Path) -> None:
    trainer = trained(world_eval_items=2, eval_strategy="steps", eval_steps=1, group_by_length=True, bf16=True)
    out = tmp_path / "out"
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json", "memory.json", "loss.png"} <= {
        path.name for path in out.iterdir()
    }
    peaks = json.loads((out / "memory.json").read_text())
    assert [step["step"] for step in peaks["steps"]] == [1, 2]
    assert peaks["host_peak"] > 50e6
    lines = trainer.state.log_history
    assert sum("eval_answers" in line for line in lines) == 2
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="history: expected lines with a loss, got none"):
        loss_picture([{"step": 1}], out / "no.png")
    assert not (out / "no.png").exists()


def test_lengths_are_grouped_without_decoding(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(max_steps=1)
    trainer.args.train_sampling_strategy = "group_by_length"
    monkeypatch.setattr(type(trainer.train_dataset), "__getitem__", None)
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(8))
    assert trainer._get_train_sampler().lengths == trainer.train_dataset.lengths


def test_logs_for_tensorboard(trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(report_to="tensorboard", max_steps=1, **MERGING)
    [folder] = (tmp_path / "out" / "runs").iterdir()
    read = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/memory_bank_loss", "train/host_peak_mib"} <= set(read.Tags()["scalars"])


# ---- memories with weights, LoRA


def arguments(name: object, **changes: Any) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    values = {"model_name_or_path": str(name), "use_cpu": True, "stage": 2, "output_dir": "unused", **changes}
    made = []
    for cls in (ModelArguments, DataArguments, TrainingArguments):
        known = {field.name for field in dataclasses.fields(cls)}
        made.append(cls(**{name: value for name, value in values.items() if name in known}))
    return made[0], made[1], made[2]


@pytest.mark.parametrize("lora", [0, 2])
def test_the_dual_memory_is_trained_written_and_restored(
    trained: Trained, checkpoint: Path, tmp_path: Path, lora: int
) -> None:
    if lora:
        pytest.importorskip("peft")
    dual = {"use_memory_bank": True, "memory_policy": "dual", "memory_capacities": [2, 4]}
    new, _ = load_model_with_memory_bank(*arguments(checkpoint, **dual))
    assert new.vmemory.alpha.item() == 0
    trainer = trained(**dual, lora_r=lora)
    model = trainer.model
    inner: Any = vmemory.attached(model)
    alpha = inner.memory.alpha.item() if not lora else inner.model.vmemory.modules_to_save["default"].alpha.item()
    assert alpha != 0
    trained_names = {name for name, w in model.named_parameters() if w.requires_grad}
    assert bool(lora) == any("lora_A" in name for name in trained_names)
    assert not lora or not any(part_of(n) == "language" and "lora" not in n for n in trained_names)
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    restored, _ = load_model_with_memory_bank(*arguments(tmp_path / "out", **dual))
    with torch.no_grad():
        assert torch.equal(restored.eval()(**batch).logits, model.eval()(**batch).logits)
        base = vmemory.attached(restored)
        assert base is not None
        with base.disabled():
            assert not torch.equal(restored(**batch).logits, model(**batch).logits)
    if not lora:
        config = tmp_path / "other.json"
        config.write_text(json.dumps({"memory_policy": "dual", "memory_options": {"hidden": 4}}))
        other = arguments(tmp_path / "out", use_memory_bank=True, memory_bank_config=str(config))
        with pytest.raises(ValueError, match="model_name_or_path: expected a memory of the same form in"):
            load_model_with_memory_bank(*other)


def test_the_model_of_the_package_by_its_name(trained: Trained) -> None:
    trainer = trained(
        model_name_or_path="worldlm", turns="apart", world_eval_items=8, max_steps=1, learning_rate="0", world_items=2
    )
    assert trainer.evaluate()["eval_answers"] > 0.9


def test_a_memory_out_of_a_file_or_of_a_trained_model(trained: Trained, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    file.write_text("memory_policy: uniform\nmemory_capacities: [5]\n")
    trained(use_memory_bank=True, memory_bank_config=str(file), max_steps=1)
    model, _ = load_model_with_memory_bank(
        *arguments(checkpoint, use_memory_bank=True, memory_bank_config=str(tmp_path / "out"))
    )
    handle = vmemory.attached(model)
    assert handle is not None
    assert (handle.config.policy, handle.config.memory_capacities) == ("uniform", (5,))
    with pytest.raises(ValueError, match="memory_bank_config: expected a model trained with a memory"):
        load_model_with_memory_bank(*arguments(checkpoint, use_memory_bank=True, memory_bank_config=str(checkpoint)))
    with pytest.raises(ValueError, match="stage: expected 2 with LoRA"):
        load_model_with_memory_bank(*arguments(checkpoint, lora_r=2, stage=1))


# ---- the profiler


def test_peaks_are_of_their_own_step() -> None:
    with MemoryProfiler() as profiler:
        block = torch.ones(40 << 20)
        high = profiler.step()
        del block
        low = profiler.step()
    assert [step.step for step in profiler.steps] == [1, 2, 3]
    # the second step begins while the block is there, the third does not
    assert high.host_peak - profiler.steps[2].host_peak > 150 << 20
    assert profiler.host_peak >= low.host_peak
    assert profiler.host_peak == max(step.host_peak for step in profiler.steps)
    with pytest.raises(RuntimeError, match="expected a step that was begun"):
        MemoryProfiler().step()


def test_peaks_without_permission_are_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vmemory.train.profiler._RESET", tmp_path)
    with MemoryProfiler() as profiler:
        profiler.step()
    assert profiler.host_peak > 50e6
    assert len(caplog.records) == 1
    assert "since the process began" in caplog.text


# ---- several processes


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def test_two_processes_train_as_one_does(trained: Trained, recipe: Callable[..., Path], tmp_path: Path) -> None:
    given = {**MERGING, "memory_bank_warmup_steps": 2, "grad_checkpoint": False, "world_items": 16}
    trained(**given, per_device_train_batch_size=4, output_dir=str(tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    file = recipe(**given)
    subprocess.run([*command, "-m", "tests.train_twice", str(file), str(tmp_path)], check=True, timeout=120)
    from safetensors.torch import load_file

    one, replicated, sharded = (losses(tmp_path / name) for name in ("one", "replicated", "sharded"))
    assert len(one) == 2
    assert replicated == pytest.approx(one, rel=1e-4)
    assert sharded == pytest.approx(one, rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "replicated", "sharded")]
    for name, weight in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_accelerate_launches_the_module(recipe: Callable[..., Path], tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "vmemory.train"]
    done = subprocess.run([*launch, str(recipe(max_steps=1))], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "world, train: 8 items" in done.stderr
    assert len(losses(tmp_path / "out")) == 1
