// Argument checks of the memories of fixed slots.
#pragma once

#include "torch/expect.h"

namespace vmemory::contract {

// `added`: what the counters grow by
inline void ring_state(const Argument& slots, const Argument& count, int64_t added) {
  slots.shape({kAny, kAny, kAny, kAny}).floating();
  count.shape({slots.size(0)}).of(dtype::int64).beside(slots);
  count.values(0, std::numeric_limits<int64_t>::max() - added);
}

inline int64_t ring_rows(const Argument& slots, const std::optional<Tensor>& streams_) {
  const Argument streams("streams", streams_);
  streams.shape({kAny}).of(dtype::int64).beside(slots);
  return streams.given() ? streams.size(0) : slots.size(0);
}

inline void ring_push_(const Tensor& slots_, const Tensor& count_, const Tensor& frames_,
                       const std::optional<Tensor>& streams) {
  const Argument slots("slots", slots_), count("count", count_), frames("frames", frames_);
  frames.shape({kAny, kAny, kAny, kAny});
  ring_state(slots.in_place(), count.in_place(), frames.size(1));
  frames.shape({ring_rows(slots, streams), kAny, slots.size(2), slots.size(3)}).like(slots);
}

inline void ring_read(const Tensor& slots, const Tensor& count) {
  ring_state(Argument("slots", slots), Argument("count", count), 0);
}

inline void slot_replace_(const Tensor& slots_, const Tensor& count_, const std::optional<Tensor>& means_,
                          const Tensor& frames, const std::optional<Tensor>& streams, const std::string& level) {
  const Argument slots("slots", slots_), count("count", count_), means("means", means_);
  ring_state(slots.in_place(), count.in_place(), 1);
  const int64_t S = slots.size(0), M = slots.size(1), N = slots.size(2), D = slots.size(3);
  Argument("frames", frames).shape({ring_rows(slots, streams), N, D}).like(slots);
  expect_choice("level", level, {"flat", "mean"});
  if (level == "mean") slots.at_least(1, 2);
  means.shape({S, M, D}).sums_of(slots).in_place();
  VMEMORY_CHECK(!means.given() || level == "mean", "means: expected with level mean only, got level ", level);
}

}  // namespace vmemory::contract
