"""Tiles of 16-bit products, which a processor with AMX leaves to torch's library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.usefixtures("native")
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="without AMX every other test runs the tiles")
def test_tiles_where_onednn_is_held_to_avx512():
    tests = [f"tests/test_{name}.py" for name in ("gated_fusion", "memory_attention")]
    chosen = "native_matches_reference and (dtype2 or dtype3)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
