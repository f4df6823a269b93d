// Tokens in 8 or 4 bits as a step moves them: rows come back to float32, are reduced or merged, and are rounded again.
#pragma once

#include "common/bank_host.h"
#include "common/quant.h"

namespace vmemory::bank {

// Q is int8_t or nibbles; rows of one stream
template <class Q>
struct QuantizedRows {
  static constexpr int64_t kBits = std::is_same_v<Q, int8_t> ? 8 : 4;
  Q* values;
  float* scale;
  int64_t D;

  void read(int64_t row, float* out) const { dequantize_row(values + row * stored_elements<Q>(D), D, scale[row], out); }
  template <class T>
  void write(int64_t row, const T* tokens) const {
    scale[row] = quantize_row(tokens, D, kBits, values + row * stored_elements<Q>(D));
  }
};

// `bank` holds no floating tokens; run(n, f) calls f(begin, end) over n rows, or channels in blocks of `kBlock`.
template <class T, class Q>
struct QuantizedMove {
  static constexpr int64_t kBlock = 64;
  const Bank<T>& bank;
  const QuantizedRows<Q>& rows;

  template <class Run>
  void operator()(const typename Bank<T>::Passage& p, const Run& run) const {
    const Geometry& g = bank.g;
    const Step& step = p.step;
    for (int i = step.length - 1; i >= 0; --i) {
      const int64_t from = g.row_of(step.slot[i]);
      if (step.merged >= 0) {
        merge(g.row_of(step.merged), from, g.cells(step.first + i), run);
      } else if (step.target[i] >= 0) {
        demote(*p.demote[i], from, g.row_of(step.target[i]), run);
      }
    }
    enter(p, run);
    std::vector<float> fresh(g.R * g.K);
    const Describe<T> describe{g, bank.maps, step.first, p.valid, fresh.data()};
    run((g.D + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
      const int64_t d0 = begin * kBlock, d1 = std::min(end * kBlock, g.D);
      describe.clear(d0, d1);
      describe.add(p.frame, 0, g.H, nullptr, d0, d1);
      describe.finish(d0, d1);
    });
    bank.move_descriptors(step, fresh.data());
  }

 private:
  template <class Run>
  void merge(int64_t a, int64_t b, int64_t cells, const Run& run) const {
    run(cells, [&](int64_t begin, int64_t end) {
      std::vector<float> x(rows.D), y(rows.D);
      for (int64_t c = begin; c < end; ++c) {
        const float ma = bank.mass[a + c], mb = bank.mass[b + c];
        if (mb == 0) continue;
        const float wa = ma / (ma + mb);
        rows.read(a + c, x.data());
        rows.read(b + c, y.data());
        for (int64_t d = 0; d < rows.D; ++d) x[d] = wa * x[d] + (1 - wa) * y[d];
        rows.write(a + c, x.data());
      }
    });
  }

  template <class Run>
  void demote(const Windows<float>& windows, int64_t from, int64_t to, const Run& run) const {
    run(windows.height * windows.width, [&](int64_t begin, int64_t end) {
      std::vector<float> source(rows.D), sum(rows.D);
      for (int64_t k = begin; k < end; ++k) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t c = windows.first[k]; c < windows.first[k + 1]; ++c) {
          rows.read(from + windows.cell[c], source.data());
          add_row(source.data(), windows.weight[c], sum.data(), rows.D);
        }
        rows.write(to + k, sum.data());
      }
    });
  }

  template <class Run>
  void enter(const typename Bank<T>::Passage& p, const Run& run) const {
    const Geometry& g = bank.g;
    const int64_t to = g.row_of(p.step.fresh);
    run(g.cells(p.step.first), [&](int64_t begin, int64_t end) {
      // reduced tokens are rounded to the frames' dtype first, as in a memory of floating tokens
      std::vector<T> token(rows.D);
      for (int64_t k = begin; k < end; ++k) {
        if (p.enter) pool_cell(*p.enter, k, p.frame, g.D, token.data(), 0, g.D);
        rows.write(to + k, p.enter ? token.data() : p.frame + k * g.D);
      }
    });
  }
};

}  // namespace vmemory::bank
