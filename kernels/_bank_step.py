"""The step of one frame in a tiered memory, one program per stream: decide first, then update lists, links and norms.

`decide` reads the stream and writes scratch only; `commit` reads scratch and writes the stream. In two kernels they
need no barrier; within one kernel there is a barrier between them.
"""

from __future__ import annotations

import triton.language as tl

from vmemory.kernels._launch import jit

# columns of entry, clock and counter
FRAME, FIRST, LAST, FRAMES = (tl.constexpr(i) for i in range(4))
TIME, START, STOP, MASS = (tl.constexpr(i) for i in range(4))
SEEN, SKIPPED, DROPPED, LENGTH = (tl.constexpr(i) for i in range(4))
# scratch of a step: a head, then for each tier the places of `TIER_*`
STEP_FIRST, STEP_MERGED, STEP_FRESH, STEP_DROPS, HEAD = (tl.constexpr(i) for i in range(5))
# removed: list place given up; slot: its slot; target: where that goes; inserted: place of `incoming` in the new list
REMOVED, SLOT, TARGET, INSERTED, INCOMING, BEFORE, TIER = (tl.constexpr(i) for i in range(7))


@jit
def entry_tier(frame, g: tl.constexpr):
    """Return the tier that a frame number enters, -1 = none."""
    tier = frame * 0 - 1
    open_ = frame >= 0
    if len(g.intervals) == 0 and g.tiers > 0:
        tier += 1
    for i in tl.static_range(len(g.intervals)):
        hit = open_ & (frame % g.intervals[i] == 0)
        tier = tl.where(hit, g.entries[i], tier)
        open_ = open_ & (frame % g.intervals[i] != 0)
    return tier


@jit
def first_largest(value, inside, k, none: tl.constexpr):
    """Return the lowest k with the largest value (NaN is the largest of all), the value, and whether it is NaN."""
    nan = inside & (value != value)
    is_nan = tl.max(nan.to(tl.int32), 0) > 0
    largest = tl.max(tl.where(inside & (value == value), value, float("-inf")), 0)
    at = tl.min(tl.where(tl.where(is_nan, nan, inside & (value == largest)), k, none), 0)
    return at, largest, is_nan


@jit
def listed(order, place, inside, tier: tl.constexpr, g: tl.constexpr):
    """Load the slots at places of a tier's list, clamped to the tier, since a given state may contain any number."""
    slot0: tl.constexpr = g.slot0[tier]
    last: tl.constexpr = slot0 + g.capacity[tier] - 1
    return tl.minimum(tl.maximum(tl.load(order + slot0 + place, inside, other=slot0), slot0), last)


@jit
def closest_of_all(order, link, n, k, tier: tl.constexpr, g: tl.constexpr):
    older, newer = n * 0, n * 0 + 1
    best = tl.zeros((), tl.float32) - float("inf")
    nan = n < 0
    slot0: tl.constexpr = g.slot0[tier]
    capacity: tl.constexpr = g.capacity[tier]
    for i in range(0, n - 1):
        inside = (k > i) & (k < n)
        a = listed(order, i, i >= 0, tier, g) - slot0
        b = listed(order, k, inside, tier, g) - slot0
        value = tl.load(link + g.link0[tier] + a * capacity + b, inside, other=0.0)
        at, largest, is_nan = first_largest(value, inside, k, g.block[tier])
        better = (nan == 0) & (is_nan | (largest > best))
        older, newer = tl.where(better, i, older), tl.where(better, at, newer)
        best = tl.where(better, largest, best)
        nan = nan | is_nan
    return older, newer, nan


@jit
def choose(order, link, entry, norm, n, frame, tier: tl.constexpr, g: tl.constexpr):
    """Return the list place that a full tier gives up, and the slot it is merged into, -1 = none."""
    k = tl.arange(0, g.block[tier]).to(tl.int64)
    place, merged = n * 0, n * 0 - 1
    inside = (k >= 1) & (k < n)
    if g.capacity[tier] == 1 or g.rule.choose == "oldest":
        return place, merged
    elif g.rule.choose == "gap":
        before = tl.load(entry + listed(order, k - 1, inside, tier, g) * 4, inside, other=0)
        inner = inside & (k + 1 < n)
        after = tl.load(entry + listed(order, k + 1, inner, tier, g) * 4, inner, other=0)
        gap = tl.where(inner, after, frame) - before
        smallest = tl.min(tl.where(inside, gap, 0x7FFFFFFFFFFFFFFF), 0)
        place = tl.min(tl.where(inside & (gap == smallest), k, g.block[tier]), 0)
        return place, merged
    else:
        if g.rule.choose == "all":
            older, newer, nan = closest_of_all(order, link, n, k, tier, g)
        else:
            value = tl.load(link + g.link0[tier] + k, inside, other=0.0)
            newer, _, nan = first_largest(value, inside, k, g.block[tier])
            older = newer - 1
        known = n == g.capacity[tier]
        victim = older
        if g.rule.newer or g.rule.merge:
            victim = newer
        if g.rule.merge:
            merged = tl.where(known, listed(order, older, known, tier, g), -1)
        place = victim
        if g.rule.nan_first:
            r: tl.constexpr = tier if g.R > 1 else 0
            length = tl.load(norm + listed(order, older, known, tier, g) * g.R + r, known, other=0.0)
            place = tl.where(nan, tl.where(length - length == 0, newer, older), victim)
            merged = tl.where(nan, -1, merged)
        return place, merged


@jit
def named(order, norm, wanted, n, place, merged, tier: tl.constexpr, g: tl.constexpr):
    """Replace the rule's `place` and `merged` by the caller's slot `wanted`, if the tier holds it."""
    k = tl.arange(0, g.block[tier]).to(tl.int64)
    inside = k < n
    at = tl.min(tl.where((listed(order, k, inside, tier, g) == wanted) & inside, k, g.block[tier]), 0)
    held = (wanted >= 0) & (at < n)
    partner = n * 0 - 1
    if g.rule.merge and g.capacity[tier] > 1:
        # the first of a list has no older neighbour, so the next one is merged into it
        newer = tl.maximum(at, 1)
        a, b = listed(order, newer - 1, held, tier, g), listed(order, newer, held, tier, g)
        merges = held
        if g.rule.nan_first:
            r: tl.constexpr = tier if g.R > 1 else 0
            x, y = tl.load(norm + a * g.R + r, held, other=0.0), tl.load(norm + b * g.R + r, held, other=0.0)
            merges = held & (x - x == 0) & (y - y == 0)
        at = tl.where(merges, newer, at)
        partner = tl.where(merges, a, partner)
    return tl.where(held, at, place), tl.where(held, partner, merged)


@jit
def decide(order, counter, link, entry, norm, victim, step, lists, shifted, g: tl.constexpr):
    """Write the next frame's decision to `step`, the new lists to `lists [M]` and the kept links to `shifted [P]`."""
    frame = tl.load(counter + SEEN)
    first = entry_tier(frame, g)
    merged, fresh, drops, above = frame * 0 - 1, frame * 0 - 1, frame * 0, frame * 0
    going = first >= 0
    depth = frame * 0
    for tier in tl.static_range(tl.constexpr(g.tiers)):
        slot0, capacity = g.slot0[tier], g.capacity[tier]
        at = step + HEAD + tier * TIER
        # clamped to the tier, since a given state may contain any number
        n = tl.minimum(tl.maximum(tl.load(counter + LENGTH + tier), 0), capacity)
        here = going & (first <= tier)
        taken = here & (n == capacity)
        place, partner = choose(order, link, entry, norm, n, frame, tier, g)
        if victim is not None:
            place, partner = named(order, norm, tl.load(victim + tier), n, place, partner, tier, g)
        slot = tl.where(taken, listed(order, place, taken, tier, g), -1)
        offered = tl.where(taken, slot, tl.where(here, slot0 + n, -1))
        # an entry from above keeps its number; the new frame has the highest
        number = tl.where(depth > 0, above, frame)
        above = tl.load(entry + slot * 4 + FRAME, taken, other=0)
        fresh = tl.where(here & (depth == 0), offered, fresh)
        merged = tl.where(taken, partner, merged)
        if tier > 0:
            tl.store(at - TIER + TARGET, tl.where(depth > 0, offered, -1))
        tl.store(at + TARGET, frame * 0 - 1)
        depth += taken.to(tl.int64)
        last = taken & (merged >= 0)
        if tier + 1 == g.tiers:
            last = taken
        elif not g.rule.cascade:
            last = last | (taken & (depth == 2))
        drops = tl.where(last & (merged < 0), 1, drops)
        going = going & (here == 0) | (taken & (last == 0))

        k = tl.arange(0, g.block[tier]).to(tl.int64)
        gone = tl.where(taken, place, capacity)
        kept = tl.where(taken, n - 1, n)
        inserted = kept
        if g.rule.by_time:
            stays = (k < n) & (k != gone)
            numbers = tl.load(entry + listed(order, k, stays, tier, g) * 4 + FRAME, stays, other=0)
            place_of = tl.where(k > gone, k - 1, k)
            inserted = tl.max(tl.where(stays & (numbers <= number), place_of + 1, 0), 0)
        inserted = tl.where(here, inserted, capacity)
        after = tl.where(here, kept + 1, n)
        source = tl.where(k > inserted, k - 1, k)
        source = tl.where(source >= gone, source + 1, source)
        old = (k < after) & (k != inserted)
        kept_slots = tl.where(old, listed(order, source, old, tier, g), -1)
        tl.store(lists + slot0 + k, tl.where(k == inserted, offered, kept_slots), k < capacity)
        if g.rule.choose == "adjacent":
            links = tl.load(link + g.link0[tier] + source, old, other=0.0)
            tl.store(shifted + g.link0[tier] + k, links, k < capacity)
        tl.store(at + REMOVED, tl.where(taken, place, -1))
        tl.store(at + SLOT, slot)
        tl.store(at + INSERTED, tl.where(here, inserted, -1))
        tl.store(at + INCOMING, offered)
        tl.store(at + BEFORE, n)
    tl.store(step + STEP_FIRST, first)
    tl.store(step + STEP_MERGED, merged)
    tl.store(step + STEP_FRESH, fresh)
    tl.store(step + STEP_DROPS, drops)


@jit
def move_entry(entry, clock, norm, source, target, g: tl.constexpr):
    k = tl.arange(0, 4)
    r = tl.arange(0, g.block_r)
    tl.store(entry + target * 4 + k, tl.load(entry + source * 4 + k))
    tl.store(clock + target * 4 + k, tl.load(clock + source * 4 + k))
    tl.store(norm + target * g.R + r, tl.load(norm + source * g.R + r, r < g.R), r < g.R)


@jit
def row_of(descriptor, entry, slot, r, g: tl.constexpr, BY_FRAME: tl.constexpr):
    """Return a slot's r-th descriptor: its own row or, in the replay of a video, its first frame's."""
    at = tl.load(entry + slot * 4 + FRAME) if BY_FRAME else slot
    return descriptor + (at * g.R + r) * g.K


@jit
def dot(x, y, g: tl.constexpr):
    block: tl.constexpr = g.block_k
    d = tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, g.K, block):
        inside = start + d < g.K
        total += tl.load(x + start + d, inside, other=0.0) * tl.load(y + start + d, inside, other=0.0)
    return tl.sum(total, 0)


@jit
def merged_share(clock, step):
    """Return the weight of the remaining slot in a merge of two, by their masses."""
    a = tl.load(clock + tl.load(step + STEP_MERGED) * 4 + MASS)
    b = tl.load(clock + tl.load(step + HEAD + SLOT) * 4 + MASS)
    return tl.where(a + b > 0, a / tl.where(a + b > 0, a + b, 1.0), 0.5).to(tl.float32)


@jit
def merge_entry(entry, clock, a, b):
    na = tl.load(entry + a * 4 + FRAMES)
    nb = tl.load(entry + b * 4 + FRAMES)
    time_a, time_b = tl.load(clock + a * 4 + TIME), tl.load(clock + b * 4 + TIME)
    tl.store(clock + a * 4 + TIME, (time_a * na.to(tl.float64) + time_b * nb.to(tl.float64)) / (na + nb).to(tl.float64))
    tl.store(clock + a * 4 + STOP, tl.load(clock + b * 4 + STOP))
    tl.store(clock + a * 4 + MASS, tl.load(clock + a * 4 + MASS) + tl.load(clock + b * 4 + MASS))
    tl.store(entry + a * 4 + LAST, tl.load(entry + b * 4 + LAST))
    tl.store(entry + a * 4 + FRAMES, na + nb)


@jit
def cosine(
    a, b, fresh, fresh_norm, merged, merged_norm, descriptor, norm, entry, r, g: tl.constexpr, BY_FRAME: tl.constexpr
):  # fmt: skip
    na, nb = tl.load(norm + a * g.R + r), tl.load(norm + b * g.R + r)
    na = tl.where(a == fresh, fresh_norm, tl.where(a == merged, merged_norm, na))
    nb = tl.where(b == fresh, fresh_norm, tl.where(b == merged, merged_norm, nb))
    product = dot(row_of(descriptor, entry, a, r, g, BY_FRAME), row_of(descriptor, entry, b, r, g, BY_FRAME), g)
    # in this form a NaN norm stays NaN
    return product / (tl.where(na < 1e-8, 1e-8, na) * tl.where(nb < 1e-8, 1e-8, nb))


@jit
def enter_entry(entry, clock, step, frame, time, mass, g: tl.constexpr):
    """Write the new frame's entry, and update the entry that two merge into."""
    fresh, merged = tl.load(step + STEP_FRESH), tl.load(step + STEP_MERGED)
    if g.rule.merge:  # noqa: SIM102  the outer one is decided while compiling
        if merged >= 0:
            merge_entry(entry, clock, merged, fresh)
            tl.debug_barrier()
    k = tl.arange(0, 4)
    tl.store(entry + fresh * 4 + k, tl.where(k == FRAMES, 1, frame))
    tl.store(clock + fresh * 4 + k, tl.where(k == MASS, mass, time))


@jit
def commit(
    descriptor, norm, link, entry, order, counter, step, lists, shifted, g: tl.constexpr, BY_FRAME: tl.constexpr
):  # fmt: skip
    """Update lists, links, norms and counters, after entries have moved and the new descriptor is written."""
    first, fresh, merged = tl.load(step + STEP_FIRST), tl.load(step + STEP_FRESH), tl.load(step + STEP_MERGED)
    seen, skipped, dropped = tl.load(counter + SEEN), tl.load(counter + SKIPPED), tl.load(counter + DROPPED)
    drops = tl.load(step + STEP_DROPS)
    if first >= 0:
        fresh_norm, merged_norm = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
        if g.rule.merge:  # noqa: SIM102  the outer one is decided while compiling
            if merged >= 0:
                row = row_of(descriptor, entry, merged, 0, g, BY_FRAME)
                merged_norm = tl.sqrt_rn(dot(row, row, g))
                tl.store(norm + merged, merged_norm)
        for tier in tl.static_range(tl.constexpr(g.tiers)):
            r = tier if g.R > 1 else 0
            if g.R > 1 or tier == 0:
                row = row_of(descriptor, entry, fresh, r, g, BY_FRAME)
                fresh_norm = tl.sqrt_rn(dot(row, row, g))
                tl.store(norm + fresh * g.R + r, fresh_norm)
            at = step + HEAD + tier * TIER
            removed, inserted, n = tl.load(at + REMOVED), tl.load(at + INSERTED), tl.load(at + BEFORE)
            after = n - (removed >= 0).to(tl.int64) + (inserted >= 0).to(tl.int64)
            k = tl.arange(0, g.block[tier]).to(tl.int64)
            if g.rule.choose == "adjacent":
                links = tl.load(shifted + g.link0[tier] + k, k < g.capacity[tier], other=0.0)
                for which in tl.static_range(4 if g.rule.merge else 3):
                    # links beside the new entry, at the removed entry's place, and before the merged entry
                    place = inserted + which
                    if which >= 2:
                        place = removed + 2 - which
                        place = tl.where((inserted >= 0) & (place >= inserted) & (place > 0), place + 1, place)
                        place = tl.where(removed >= 0, place, -1)
                    elif which == 1:
                        place = tl.where(inserted >= 0, place, -1)
                    if which == 3:
                        place = tl.where(merged >= 0, place, -1)
                    if (place > 0) & (place < after):
                        a = tl.load(lists + g.slot0[tier] + place - 1)
                        b = tl.load(lists + g.slot0[tier] + place)
                        value = cosine(
                            a, b, fresh, fresh_norm, merged, merged_norm, descriptor, norm, entry, r, g, BY_FRAME
                        )
                        links = tl.where(k == place, value, links)
                tl.store(link + g.link0[tier] + k, links, k < g.capacity[tier])
            if g.rule.choose == "all":
                # the entry is appended, so every other entry precedes it
                a = tl.load(at + INCOMING)
                for i in range(0, inserted):
                    b = tl.load(lists + g.slot0[tier] + i)
                    value = cosine(
                        a, b, fresh, fresh_norm, merged, merged_norm, descriptor, norm, entry, r, g, BY_FRAME
                    )
                    x, y = a - g.slot0[tier], b - g.slot0[tier]
                    tl.store(link + g.link0[tier] + x * g.capacity[tier] + y, value)
                    tl.store(link + g.link0[tier] + y * g.capacity[tier] + x, value)
            new_list = tl.load(lists + g.slot0[tier] + k, k < g.capacity[tier])
            tl.store(order + g.slot0[tier] + k, new_list, k < g.capacity[tier])
            tl.store(counter + LENGTH + tier, after)
        tl.store(counter + DROPPED, dropped + drops)
    else:
        tl.store(counter + SKIPPED, skipped + 1)
    tl.store(counter + SEEN, seen + 1)
