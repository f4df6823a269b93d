#include "contracts/ring.h"

#include <cstring>

#include "common/choice.h"
#include "common/descriptor.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kGrainBytes = 1 << 17;  // below this a second thread costs more than it saves
constexpr int64_t kCopyBytes = 1 << 18;   // copied at a time
constexpr int64_t kChunk = 1 << 14;       // values of a frame compared at a time; the same whatever the threads

struct Shape {
  int64_t S, M, N, D;
};

Shape shape_of(const Tensor& slots) { return {slots.size(0), slots.size(1), slots.size(2), slots.size(3)}; }

// the stream a row of frames goes to, negative for none
struct Targets {
  const int64_t* streams;
  int64_t S;

  int64_t of(int64_t row) const {
    const int64_t stream = streams ? streams[row] : row;
    return stream < S ? stream : -1;
  }
};

// f(item, first byte, bytes) for pieces of `items` copies
template <class F>
void copy_pieces(int64_t items, int64_t bytes, const F& f) {
  const int64_t pieces = (bytes + kCopyBytes - 1) / kCopyBytes;
  parallel(items * pieces, kGrainBytes / (std::min(bytes, kCopyBytes) + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kCopyBytes;
      f(i / pieces, first, std::min(kCopyBytes, bytes - first));
    }
  });
}

void ring_push_(const Tensor& slots, const Tensor& count, const Tensor& frames_, std::optional<Tensor> streams_) {
  contract::ring_push_(slots, count, frames_, streams_);
  const Tensor frames = dense(frames_), streams = streams_ ? dense(*streams_) : count;
  const Shape s = shape_of(slots);
  const int64_t rows = frames.size(0), T = frames.size(1),
                bytes = s.N * s.D * static_cast<int64_t>(slots.element_size());
  const Targets targets{streams_ ? data<int64_t>(streams) : nullptr, s.S};
  int64_t* counts = mutable_data<int64_t>(count);
  char* to = mutable_data<char>(slots);
  const char* from = data<char>(frames);
  const int64_t last = std::min(T, s.M);
  copy_pieces(rows * last, bytes, [&](int64_t item, int64_t first, int64_t n) {
    const int64_t row = item / last, t = T - last + item % last, stream = targets.of(row);
    if (stream < 0) return;
    const int64_t slot = (counts[stream] + t) % s.M;
    std::memcpy(to + (stream * s.M + slot) * bytes + first, from + (row * T + t) * bytes + first, n);
  });
  for (int64_t row = 0; row < rows; ++row)
    if (targets.of(row) >= 0) counts[targets.of(row)] += T;
}

std::tuple<Tensor, Tensor> ring_read(const Tensor& slots_, const Tensor& count_) {
  contract::ring_read(slots_, count_);
  const Tensor slots = dense(slots_), count = dense(count_);
  const Shape s = shape_of(slots);
  const int64_t bytes = s.N * s.D * static_cast<int64_t>(slots.element_size());
  Tensor out = make(slots, {s.S, s.M, s.N, s.D}), held = make(count, {s.S});
  const int64_t* counts = data<int64_t>(count);
  int64_t* valid = mutable_data<int64_t>(held);
  for (int64_t stream = 0; stream < s.S; ++stream) valid[stream] = std::clamp<int64_t>(counts[stream], 0, s.M);
  char* to = mutable_data<char>(out);
  const char* from = data<char>(slots);
  copy_pieces(s.S * s.M, bytes, [&](int64_t item, int64_t first, int64_t n) {
    const int64_t stream = item / s.M, k = item % s.M;
    char* row = to + item * bytes + first;
    if (k < valid[stream]) {
      const int64_t slot = (counts[stream] - valid[stream] + k) % s.M;
      std::memcpy(row, from + (stream * s.M + slot) * bytes + first, n);
    } else {
      std::memset(row, 0, n);
    }
  });
  return {out, held};
}

template <class T>
class Replace {
  using A = acc_t<T>;

 public:
  Replace(const Shape& s, const Targets& targets, int64_t rows, T* slots, int64_t* count, A* means, const T* frames)
      : s_(s),
        targets_(targets),
        rows_(rows),
        slots_(slots),
        count_(count),
        means_(means),
        frames_(frames),
        frame_(s.N * s.D),
        value_(rows * s.M) {}

  void run(bool whole, int64_t* replaced) {
    std::vector<A> mean;
    if (whole) {
      compare_frames();
    } else {
      mean.resize(rows_ * s_.D);
      compare_means(mean.data());
    }
    std::vector<int64_t> slot(rows_, -1);
    for (int64_t row = 0; row < rows_; ++row) {
      replaced[row] = -1;
      const int64_t stream = targets_.of(row);
      if (stream < 0) continue;
      slot[row] = count_[stream]++;
      if (slot[row] < s_.M) continue;
      slot[row] = s_.M ? first_largest(value_.data() + row * s_.M, s_.M, 1) : -1;
      replaced[row] = slot[row];
    }
    copy_pieces(rows_, frame_ * sizeof(T), [&](int64_t row, int64_t first, int64_t n) {
      if (slot[row] < 0) return;
      char* to = reinterpret_cast<char*>(slots_ + (targets_.of(row) * s_.M + slot[row]) * frame_);
      std::memcpy(to + first, reinterpret_cast<const char*>(frames_ + row * frame_) + first, n);
    });
    if (!means_) return;
    for (int64_t row = 0; row < rows_; ++row)
      if (slot[row] >= 0)
        std::copy_n(mean.data() + row * s_.D, s_.D, means_ + (targets_.of(row) * s_.M + slot[row]) * s_.D);
  }

 private:
  bool full(int64_t row) const {
    const int64_t stream = targets_.of(row);
    return stream >= 0 && s_.M > 0 && count_[stream] >= s_.M;
  }

  // by chunks of the frames, summed in a fixed order; item M of a row is the frame's own norm
  void compare_frames() {
    const int64_t chunks = std::max<int64_t>(1, (frame_ + kChunk - 1) / kChunk), items = rows_ * (s_.M + 1) * chunks;
    std::vector<Products<A>> part(items);
    parallel(items, kGrainBytes / (std::min(frame_, kChunk) * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % chunks * kChunk, m = i / chunks % (s_.M + 1), row = i / chunks / (s_.M + 1);
        if (!full(row)) continue;
        const T* own = frames_ + row * frame_ + first;
        const T* slot = m < s_.M ? slots_ + (targets_.of(row) * s_.M + m) * frame_ + first : own;
        const int64_t n = std::min(kChunk, frame_ - first);
        part[i] = dot_and_square(own, slot, n, slot + n);
      }
    });
    const auto total = [&](int64_t row, int64_t m) {
      const Products<A>* p = part.data() + (row * (s_.M + 1) + m) * chunks;
      Products<A> sum = p[0];
      for (int64_t c = 1; c < chunks; ++c) sum.ab += p[c].ab, sum.bb += p[c].bb;
      return sum;
    };
    for (int64_t row = 0; row < rows_; ++row) {
      if (!full(row)) continue;
      const A own = std::sqrt(total(row, s_.M).bb);
      for (int64_t m = 0; m < s_.M; ++m) {
        const Products<A> sum = total(row, m);
        value_[row * s_.M + m] = cosine(sum.ab, own, std::sqrt(sum.bb));
      }
    }
  }

  // by the means over the tokens; the means of the slots are given or computed
  void compare_means(A* mean) {
    const int64_t each = means_ ? 1 : s_.M + 1, items = rows_ * each;
    std::vector<A> made(means_ ? 0 : rows_ * s_.M * s_.D);
    parallel(items, kGrainBytes / (frame_ * sizeof(T) + 1), [&](int64_t begin, int64_t end) {
      CellSum<T> sum(s_.D);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / each, m = i % each;
        const bool own = m == each - 1;
        if (targets_.of(row) < 0 || (!own && !full(row))) continue;
        const T* from = own ? frames_ + row * frame_ : slots_ + (targets_.of(row) * s_.M + m) * frame_;
        frame_mean(from, s_.D, s_.N, own ? mean + row * s_.D : made.data() + (row * s_.M + m) * s_.D, sum);
      }
    });
    for (int64_t row = 0; row < rows_; ++row) {
      if (!full(row)) continue;
      const A *a = mean + row * s_.D,
              *b = means_ ? means_ + targets_.of(row) * s_.M * s_.D : made.data() + row * s_.M * s_.D;
      const A own = norm(a, s_.D);
      for (int64_t m = 0; m < s_.M; ++m, b += s_.D) {
        const auto products = dot_and_square(a, b, s_.D, b);
        value_[row * s_.M + m] = cosine(products.ab, own, std::sqrt(products.bb));
      }
    }
  }

  const Shape& s_;
  const Targets& targets_;
  int64_t rows_;
  T* slots_;
  int64_t* count_;
  A* means_;
  const T* frames_;
  int64_t frame_;
  std::vector<A> value_;
};

Tensor slot_replace_(const Tensor& slots, const Tensor& count, std::optional<Tensor> means, const Tensor& frames_,
                     std::optional<Tensor> streams_, std::string level) {
  contract::slot_replace_(slots, count, means, frames_, streams_, level);
  const Tensor frames = dense(frames_), streams = streams_ ? dense(*streams_) : count;
  const Shape s = shape_of(slots);
  const int64_t rows = frames.size(0);
  const Targets targets{streams_ ? data<int64_t>(streams) : nullptr, s.S};
  Tensor replaced = make(count, {rows});
  dispatch_floating(slots.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    Replace<T>(s, targets, rows, mutable_data<T>(slots), mutable_data<int64_t>(count),
               means ? mutable_data<A>(*means) : nullptr, data<T>(frames))
        .run(level == "flat", mutable_data<int64_t>(replaced));
  });
  return replaced;
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) {
  m.impl("ring_push_", TORCH_BOX(&vmemory::ring_push_));
  m.impl("ring_read", TORCH_BOX(&vmemory::ring_read));
  m.impl("slot_replace_", TORCH_BOX(&vmemory::slot_replace_));
}
