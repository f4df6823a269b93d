from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from vmemory.banks import POLICIES, MemoryConfig


def test_the_names_of_the_port_mean_what_they_did():
    config = MemoryConfig.from_dict(
        {"use_memory_bank": True, "memory_capacities": [8, 4, 1], "memory_reduced_sizes": [144, 64, 36]}
    )
    bank = config.build(32, (16, 16))
    assert bank.policy == "hierarchical"
    assert bank.layout.rule == "paper"
    assert bank.layout.capacities == (8, 4, 1)
    assert bank.layout.grids == ((12, 12), (8, 8), (6, 6))


def test_sizes_above_the_grid_mean_the_grid():
    bank = MemoryConfig.from_dict({"memory_capacities": (2, 2), "memory_reduced_sizes": (256, 16)}).build(8, (5, 9))
    assert bank.layout.grids == ((5, 9), (4, 4))


def test_a_hierarchical_memory_has_a_native_first_tier_and_halves():
    bank = MemoryConfig(memory_policy="hierarchical").build(8, (9, 16))
    assert bank.layout.capacities == (24, 24, 144)
    assert bank.layout.grids == ((9, 16), (4, 8), (2, 4))


@pytest.mark.parametrize(("grid", "kept"), [((2, 2), (2, 2)), ((4, 5), (2, 2)), ((1, 9), (1, 3)), ((14, 16), (4, 5))])
def test_an_entry_of_the_default_memory_tells_the_sides_of_a_frame_apart(grid, kept):
    assert MemoryConfig().build(8, grid).tiers[0].grid == kept
    # a ratio that is asked for is taken as it is
    assert MemoryConfig(memory_downsample_ratios=(3,)).build(8, grid).tiers[0].grid == tuple(
        max(1, n // 3) for n in grid
    )


def test_the_default_memory_merges_a_third_of_each_side_and_leaves_short_videos_alone():
    default = MemoryConfig()
    bank = default.build(8, (9, 16))
    assert (bank.policy, bank.capacity, bank.layout.grids) == ("merging", 192, ((3, 5),))
    assert default.short_video() == 24
    assert default.short_video(given=True) == 0
    assert MemoryConfig(max_frames_before_compression=7).short_video(given=True) == 7
    for settings in ({"memory_capacities": 9}, {"memory_budget": "1MiB"}):
        sized = MemoryConfig.from_dict(settings)
        assert (sized.policy, sized.short_video()) == ("merging", 0)
        assert sized.build(8, (9, 16)).layout.grids == ((3, 5),)
    sized = MemoryConfig.from_dict({"memory_capacities": 9, "memory_reduced_sizes": 16})
    assert sized.build(8, (9, 16)).layout.grids == ((4, 4),)
    named = MemoryConfig.from_dict(None, memory_policy="merging")
    assert (named.short_video(), named.build(8, (9, 16)).layout.grids) == (0, ((9, 16),))


@pytest.mark.parametrize(
    "settings",
    [
        {"memory_capacities": [3, 2]},
        {"memory_downsample_ratios": [1, 2, 4]},
        {"memory_reduced_sizes": [None, 4, 1]},
        {"memory_rule": "all-pairs"},
    ],
)
def test_tiers_and_rules_are_those_of_the_hierarchical_memory(settings):
    config = MemoryConfig.from_dict(settings)
    assert (config.policy, config.short_video()) == ("hierarchical", 0)
    assert config.build(8, (9, 16)).policy == "hierarchical"
    assert MemoryConfig.from_dict(config, memory_policy="recent").policy == "recent"


def test_ratios_and_intervals():
    config = MemoryConfig.from_dict(
        {"memory_intervals": [8, 4, 1], "memory_downsample_ratios": [1, 2, 4], "memory_capacities": [2, 2, 2]}
    )
    bank = config.build(8, (16, 16))
    assert bank.layout.grids == ((16, 16), (8, 8), (4, 4))
    assert bank.layout.intervals == (8, 4, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_by_name(policy):
    capacities = {"hierarchical": (2, 1), "dual": (2, 1)}.get(policy, 3)
    options = {"heads": 2} if policy == "dual" else {}
    sizes = {"memory_reduced_sizes": (16, 4)} if policy == "hierarchical" else {}
    config = MemoryConfig.from_dict(
        {"memory_policy": policy, "memory_capacities": capacities, "memory_options": options, **sizes}
    )
    bank = config.build(8, (4, 4), dtype=torch.float64 if policy == "dual" else torch.float32)
    assert bank.policy == policy
    assert bank.capacity == 3
    budget = MemoryConfig(memory_policy=policy, memory_budget="64KiB", memory_options=options)
    assert budget.build(8, (4, 4)).nbytes <= 65536 + (policy == "dual") * 65536


@pytest.mark.parametrize(
    ("strategy", "policy"), [("similarity", "hierarchical"), ("uniform", "uniform"), ("random", "reservoir")]
)
def test_strategies_of_the_port(strategy, policy):
    assert MemoryConfig.from_dict({"compression_strategy": strategy}).memory_policy == policy
    chosen = MemoryConfig.from_dict({"compression_strategy": strategy, "memory_policy": "merging"})
    assert chosen.memory_policy == "merging"


def test_what_is_written_can_be_read_from_any_object():
    config = MemoryConfig.from_dict(
        {"memory_capacities": [3, 2], "memory_reduced_sizes": [None, 4], "memory_chunk_frames": 8}
    )
    written = json.loads(json.dumps(config.to_dict()))
    assert MemoryConfig.from_dict(SimpleNamespace(**written, hidden_size=64)) == config
    assert MemoryConfig().to_dict() == {"enable_memory_bank": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_capacity": 3}, "got 'memory_capacity'; did you mean 'memory_capacities'"),
        ({"memory_policy": "elastic"}, "memory_policy: expected one of 'dual'"),
        ({"memory_reduced_sizes": [15]}, "memory_reduced_sizes: expected square numbers of tokens, got 15"),
        ({"memory_similarity_threshold": 2.0}, "memory_similarity_threshold: expected a cosine"),
        ({"max_frames_before_compression": -1}, "max_frames_before_compression"),
        ({"memory_chunk_frames": 0}, "memory_chunk_frames"),
        ({"memory_capacities": [2], "memory_budget": "1MiB"}, "memory_budget: expected either"),
        ({"memory_reduced_sizes": [4], "memory_downsample_ratios": [2]}, "memory_downsample_ratios: expected either"),
        ({"compression_strategy": "magic"}, "compression_strategy: expected one of"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig.from_dict(settings)


def test_settings_that_do_not_fit_the_policy():
    config = MemoryConfig.from_dict({"memory_capacities": [2, 2], "memory_reduced_sizes": [16]})
    with pytest.raises(ValueError, match="grid_size: expected one per capacity"):
        config.build(8, (4, 4))
