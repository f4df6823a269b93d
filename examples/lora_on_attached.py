"""Train LoRA adapters on a model with an attached memory, and a learned memory together with them.

python examples/lora_on_attached.py [--model Qwen/Qwen2.5-VL-3B-Instruct --video film.mp4]
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from shared import arguments, film, load, prompt

import vmemory


def main(given: list[str] | None = None) -> dict[str, list[float]]:
    """Return the loss of each step, for a memory without weights and for the dual memory."""
    args = arguments(__doc__.splitlines()[0], given)
    frames, losses = film(args.video, 16), {}
    for policy, capacities in (("merging", [4]), ("dual", [2, 4])):
        model, processor = load(args.model)
        inputs = prompt(processor, frames, "What happened?")
        labels = inputs["input_ids"].clone()
        # only the text after the video is learned; a real data set would also mask the question
        labels[:, : int((labels[0] == model.config.video_token_id).nonzero()[-1]) + 1] = -100
        # adapters first, because PEFT freezes existing weights, and the memory must be trained
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        settings = {"memory_policy": policy, "memory_capacities": capacities}
        with vmemory.attach(tuned, config=settings) as handle:
            learning = [p for p in tuned.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(learning, lr=1e-2)
            losses[policy] = []
            for _ in range(6):
                loss = tuned(**inputs, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[policy].append(loss.item())
            print(f"{policy}: {sum(p.numel() for p in learning)} weights, loss", *(f"{x:.3f}" for x in losses[policy]))
            if policy == "dual":
                print("share of the memory in the tokens:", round(handle.memory.alpha.item(), 4))
                # tuned.save_pretrained writes the adapters; the memory is saved separately
                weights = handle.memory.state_dict()
                print("memory:", len(weights), "tensors to save")
    return losses


if __name__ == "__main__":
    main()
