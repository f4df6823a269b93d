"""Public operators: validated, differentiable, safe under `torch.compile`, each with several implementations."""

from vmemory.ops.adjacent_merge import MergedBank, adjacent_merge
from vmemory.ops.adjacent_similarity import adjacent_similarity
from vmemory.ops.attention_column_sums import attention_column_sums
from vmemory.ops.bank import BankPlan, BankTokens, bank_decide, bank_gather, bank_plan, bank_push_
from vmemory.ops.bipartite_match import MergePlan, bipartite_match, merge_source
from vmemory.ops.gated_fusion import gated_fusion
from vmemory.ops.grid_pool import PooledGrid, grid_pool
from vmemory.ops.grid_pool_ragged import RaggedGrid, grid_pool_ragged
from vmemory.ops.memory_attention import memory_attention
from vmemory.ops.quantize_slots import QuantizedSlots, dequantize_slots, quantize_slots
from vmemory.ops.ring import RingFrames, ring_push_, ring_read, slot_replace_
from vmemory.ops.select_tokens import Compacted, Selection, compact, select_tokens
from vmemory.ops.similarity_topk import TopK, similarity_topk
from vmemory.ops.token_merge import MergedTokens, proportional_attention_bias, token_merge, token_unmerge

__all__ = [
    "BankPlan",
    "BankTokens",
    "Compacted",
    "MergePlan",
    "MergedBank",
    "MergedTokens",
    "PooledGrid",
    "QuantizedSlots",
    "RaggedGrid",
    "RingFrames",
    "Selection",
    "TopK",
    "adjacent_merge",
    "adjacent_similarity",
    "attention_column_sums",
    "bank_decide",
    "bank_gather",
    "bank_plan",
    "bank_push_",
    "bipartite_match",
    "compact",
    "dequantize_slots",
    "gated_fusion",
    "grid_pool",
    "grid_pool_ragged",
    "memory_attention",
    "merge_source",
    "proportional_attention_bias",
    "quantize_slots",
    "ring_push_",
    "ring_read",
    "select_tokens",
    "similarity_topk",
    "slot_replace_",
    "token_merge",
    "token_unmerge",
]
