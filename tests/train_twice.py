"""Trains by a recipe in two processes, replicated and then sharded; `test_train.py` runs it."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState

from vmemory.train import read_recipe, train


def main() -> None:
    recipe, out = sys.argv[1:]
    sharded = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    sharded["transformer_layer_cls_to_wrap"] = ["Qwen2DecoderLayer"]
    for name, more in (("replicated", []), ("sharded", ["--fsdp", "--fsdp_config", json.dumps(sharded)])):
        read = read_recipe([recipe, "--output_dir", f"{out}/{name}", *more])
        if more:
            with pytest.raises(ValueError, match="fsdp: expected several processes with a GPU each"):
                train(read)
            AcceleratorState._reset_state()
            # accelerate shards over devices only, and takes processors for them if told so; torch shards over both
            PartialState().distributed_type = DistributedType.MULTI_XPU
        trainer = train(read)
        found = trainer.args.world_size, trainer.is_fsdp_enabled
        assert found == (2, name == "sharded"), found
        AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
