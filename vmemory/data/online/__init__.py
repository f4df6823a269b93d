"""Online video datasets: conversations about videos, whose turns have times."""

from vmemory.data.online.benchmarks import BENCHMARKS, BenchmarkQuestion, read_benchmark
from vmemory.data.online.collate import Collator
from vmemory.data.online.dataset import OnlineVideoDataset, create_dataset
from vmemory.data.online.item import Item, ItemError
from vmemory.data.online.prompt import PromptWriter
from vmemory.data.online.reading import Skipped, read_annotations
from vmemory.data.online.sampling import frame_indices

__all__ = [
    "BENCHMARKS",
    "BenchmarkQuestion",
    "Collator",
    "Item",
    "ItemError",
    "OnlineVideoDataset",
    "PromptWriter",
    "Skipped",
    "create_dataset",
    "frame_indices",
    "read_annotations",
    "read_benchmark",
]
