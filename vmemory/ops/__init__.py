"""Public ops: validated, differentiable, compile-safe, with an implementation picked from device, dtype and shape."""

from vmemory.ops.adjacent_merge import MergedBank, adjacent_merge
from vmemory.ops.adjacent_similarity import adjacent_similarity
from vmemory.ops.attention_column_sums import attention_column_sums
from vmemory.ops.bank import BankPlan, BankTokens, bank_gather, bank_plan, bank_push_
from vmemory.ops.gated_fusion import gated_fusion
from vmemory.ops.grid_pool import PooledGrid, grid_pool
from vmemory.ops.grid_pool_ragged import RaggedGrid, grid_pool_ragged
from vmemory.ops.memory_attention import memory_attention
from vmemory.ops.quantize_slots import QuantizedSlots, dequantize_slots, quantize_slots
from vmemory.ops.ring import RingFrames, ring_push_, ring_read, slot_replace_
from vmemory.ops.select_tokens import Compacted, Selection, compact, select_tokens
from vmemory.ops.similarity_topk import TopK, similarity_topk

__all__ = [
    "BankPlan",
    "BankTokens",
    "Compacted",
    "MergedBank",
    "PooledGrid",
    "QuantizedSlots",
    "RaggedGrid",
    "RingFrames",
    "Selection",
    "TopK",
    "adjacent_merge",
    "adjacent_similarity",
    "attention_column_sums",
    "bank_gather",
    "bank_plan",
    "bank_push_",
    "compact",
    "dequantize_slots",
    "gated_fusion",
    "grid_pool",
    "grid_pool_ragged",
    "memory_attention",
    "quantize_slots",
    "ring_push_",
    "ring_read",
    "select_tokens",
    "similarity_topk",
    "slot_replace_",
]
