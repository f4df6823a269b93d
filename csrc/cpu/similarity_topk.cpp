#include "contracts/similarity_topk.h"

#include <cmath>
#include <limits>
#include <memory>

#include "common/dot_tile.h"
#include "common/lines.h"
#include "common/searched_rows.h"
#include "common/topk.h"
#include "torch/stable.h"

namespace vmemory {
namespace {

constexpr int64_t kSmall = 1 << 17;       // products below which a second thread costs more than it saves
constexpr int64_t kQueryBytes = 1 << 18;  // queries that stay in the second-level cache
constexpr int64_t kRowBytes = 1 << 14;    // rows that stay in the first-level cache while all queries pass
constexpr int64_t kAheadBytes = 1 << 15;  // rows read ahead
constexpr int64_t kMostQueries = 96;

struct Sizes {
  int64_t S, Q, M, D, k;
  bool cosine;
};

struct Tile {
  int64_t first;
  int queries;
  bool squares;
  Ahead ahead;
};

// even tiles; the first also computes the rows' norms
std::vector<Tile> tiles_of(int64_t queries, bool squares, int64_t rows_ahead) {
  static_assert(kTileQueries >= 3, "an even tile has two places at least, so that the first has a query");
  const int64_t work = queries + squares, n = (work + kTileQueries - 1) / kTileQueries;
  const int64_t ahead = std::min<int64_t>(n, kTileRows);
  std::vector<Tile> tiles;
  for (int64_t t = 0, first = 0; t < n; ++t) {
    const bool takes_squares = squares && t == 0;
    const int count = static_cast<int>((t + 1) * work / n - t * work / n - takes_squares);
    Ahead lines{0, 0, 0};
    if (rows_ahead > 0 && t < ahead)
      lines = {rows_ahead, static_cast<int>(kTileRows * t / ahead), static_cast<int>(kTileRows * (t + 1) / ahead)};
    tiles.push_back({first, count, takes_squares, lines});
    first += count;
  }
  return tiles;
}

// a NaN stays one
template <class A>
A at_least_eps(A norm) {
  return norm < A(1e-8) ? A(1e-8) : norm;
}

template <class A>
A norm_of(A square, A scale = 1) {
  return at_least_eps(std::sqrt(square) * std::fabs(scale));
}

// queries of every stream in the accumulation type, interleaved for their tiles, and their norms
template <class A>
struct Queries {
  int64_t block, blocks, padded;
  Lines<A> packed;
  std::vector<A> norm;

  Queries(const Sizes& z)
      : padded((z.D + kLanes<A> - 1) / kLanes<A> * kLanes<A>), packed(z.S * z.Q * padded), norm(z.S * z.Q) {
    const int64_t most = std::clamp<int64_t>(kQueryBytes / (padded * sizeof(A) + 1), kTileQueries, kMostQueries);
    blocks = (z.Q + most - 1) / most;
    block = (z.Q + blocks - 1) / blocks;
    blocks = (z.Q + block - 1) / block;
  }

  template <class U>
  void pack(const U* query, const Sizes& z, bool squares) {
    constexpr int64_t L = kLanes<A>;
    parallel(z.S * blocks, kSmall / (block * z.D + 1), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item / blocks * z.Q + item % blocks * block;
        const int64_t count = std::min(block, z.Q - item % blocks * block);
        for (const Tile& tile : tiles_of(count, squares, 0)) {
          const U* from = query + (first + tile.first) * z.D;
          A* to = packed.get() + (first + tile.first) * padded;
          for (int64_t j = 0; j < tile.queries; ++j) {
            A* lanes = to + j * L;
            vec<A> square{};
            for (int64_t d = 0; d < z.D; d += L, lanes += tile.queries * L) {
              const vec<A> x = d + L <= z.D ? load(from + j * z.D + d) : load(from + j * z.D + d, z.D - d);
              square = multiply_add(x, x, square);
              store(lanes, x);
            }
            norm[first + tile.first + j] = norm_of(sum<A>(square));
          }
        }
      }
    });
  }
};

template <class T, class A>
struct Memory {
  const T* row;        // [S, M, stored_elements(D)]
  const float* scale;  // [S, M] or null
  const bool* where;   // [S, M] or null
  const A* norm;       // [S, M] or null
};

// rows of one stream that one thread searches
struct Segment {
  int64_t stream, begin, end, keep, found;  // `found`: position of its best results for each query
};

// best[q] over rows [begin, end) of a stream, for `count` queries from the first of a block
template <class A, class T>
void scan(const Sizes& z, const Memory<T, A>& memory, const Queries<A>& queries, const Segment& part, int64_t first,
          int64_t count, std::vector<TopK<A>>& best) {
  const int64_t stored = stored_elements<T>(z.D), row_bytes = stored * sizeof(T) + 1;
  const int64_t ahead = std::clamp<int64_t>(kAheadBytes / row_bytes, kTileRows, kMostAhead), padded = queries.padded;
  const int64_t near =
      std::clamp<int64_t>(kRowBytes / (padded * sizeof(A) + 1) / kTileRows * kTileRows, kTileRows, kBlockRows);
  const bool squares = z.cosine && memory.norm == nullptr;
  const std::vector<Tile> tiles = tiles_of(count, squares, ahead);
  // rows that several tiles read are brought into the accumulation type once
  const bool widened = !std::is_same_v<T, A> && tiles.size() > 1;
  const int64_t at = part.stream * z.Q + first;
  const A* packed = queries.packed.get() + at * padded;
  std::vector<A> score(count * kBlockRows), norm(kBlockRows);
  Lines<A> wide(widened ? near * padded : 0);
  const A* wide_row[kBlockRows];
  for (int64_t i = 0; widened && i < near; ++i) wide_row[i] = wide.get() + i * padded;
  const float* scale = memory.scale ? memory.scale + part.stream * z.M : nullptr;
  const A* norms = memory.norm ? memory.norm + part.stream * z.M : nullptr;
  SearchedRows<T> rows(memory.row + part.stream * z.M * stored, stored,
                       memory.where ? memory.where + part.stream * z.M : nullptr, part.begin, part.end, ahead);
  for (int64_t n; (n = rows.next()) > 0;) {
    for (int64_t b = 0; b < n; b += near) {
      // the last tile is completed with rows whose products are not used
      const int64_t end = std::min(near, (n - b + kTileRows - 1) / kTileRows * kTileRows);
      const auto run = [&](auto from, const auto* const* row, bool reads_ahead) {
        using F = typename decltype(from)::type;
        for (const Tile& tile : tiles) {
          const DotTile<A, F> dots = dot_tile_of<A, F>(tile.queries, tile.squares);
          for (int64_t i = 0; i < end; i += kTileRows)
            dots(row + i, packed + tile.first * padded, z.D, reads_ahead ? tile.ahead : Ahead{0, 0, 0},
                 score.data() + tile.first * kBlockRows + b + i, kBlockRows, norm.data() + b + i);
        }
      };
      if (widened) {
        for (int64_t i = 0; i < end; ++i)
          widen_row(rows.row[b + i], rows.row[b + i + ahead], z.D, wide.get() + i * padded);
        run(tag<A>{}, wide_row, false);
      } else {
        run(tag<T>{}, rows.row + b, true);
      }
    }
    if (z.cosine && norms)
      for (int64_t i = 0; i < n; ++i) norm[i] = at_least_eps(norms[rows.slot[i]]);
    else if (z.cosine)
      for (int64_t i = 0; i < n; ++i) norm[i] = norm_of(norm[i], scale ? A(scale[rows.slot[i]]) : A(1));
    for (int64_t q = 0; q < count; ++q) {
      A* to = score.data() + q * kBlockRows;
      if (scale)
        for (int64_t i = 0; i < n; ++i) to[i] *= scale[rows.slot[i]];
      if (z.cosine) {
        const A query_norm = queries.norm[at + q];
        for (int64_t i = 0; i < n; ++i) to[i] /= query_norm * norm[i];
      }
      best[q].add(to, rows.slot, n);
    }
  }
}

template <class A>
struct Output {
  A* value;
  int64_t* index;
  int64_t k;

  void write(int64_t place, const std::vector<Scored<A>>& found) const {
    A* v = value + place * k;
    int64_t* i = index + place * k;
    const int64_t n = std::min<int64_t>(k, found.size());
    for (int64_t j = 0; j < n; ++j) v[j] = found[j].score, i[j] = found[j].slot;
    std::fill(v + n, v + k, -std::numeric_limits<A>::infinity());
    std::fill(i + n, i + k, int64_t(-1));
  }
};

// The searchable rows of all streams, laid end to end and cut into `pieces` of one size.
struct Split {
  int64_t pieces;
  std::vector<int64_t> first_of_piece, first_of_stream;
  std::vector<Segment> segments;
  int64_t kept = 0;  // places for the best of all segments

  Split(const Sizes& z, const int64_t* count) {
    std::vector<int64_t> rows(z.S);
    int64_t total = 0;
    for (int64_t s = 0; s < z.S; ++s) total += rows[s] = count ? std::clamp<int64_t>(count[s], 0, z.M) : z.M;
    const int64_t threads = torch::stable::get_num_threads();
    const bool small = total * (z.D + 1) * (z.Q + 1) < kSmall;
    pieces = small ? 1 : std::clamp<int64_t>(total / 64, 1, threads);
    int64_t stream = 0, row = 0;
    first_of_stream.assign(z.S + 1, 0);
    for (int64_t p = 0; p < pieces; ++p) {
      first_of_piece.push_back(segments.size());
      for (int64_t left = (p + 1) * total / pieces - p * total / pieces; left > 0;) {
        while (row == rows[stream]) {
          ++stream, row = 0;
          first_of_stream[stream] = segments.size();
        }
        const int64_t n = std::min(left, rows[stream] - row), keep = std::min(z.k, n);
        segments.push_back({stream, row, row + n, keep, kept});
        kept += z.Q * keep;
        row += n, left -= n;
      }
    }
    for (int64_t s = stream + 1; s <= z.S; ++s) first_of_stream[s] = segments.size();
    first_of_piece.push_back(segments.size());
  }

  int64_t parts(int64_t stream) const { return first_of_stream[stream + 1] - first_of_stream[stream]; }
};

template <class A, class T>
void search(const Sizes& z, const Memory<T, A>& memory, const Queries<A>& queries, const int64_t* count,
            const Output<A>& out) {
  const Split split(z, count);
  std::unique_ptr<Scored<A>[]> kept(new Scored<A>[split.kept]);
  std::vector<int64_t> sizes(split.segments.size() * z.Q);
  parallel(split.pieces * queries.blocks, split.pieces == 1 ? queries.blocks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t piece = job / queries.blocks, first = job % queries.blocks * queries.block;
      const int64_t n = std::min(queries.block, z.Q - first);
      for (int64_t g = split.first_of_piece[piece]; g < split.first_of_piece[piece + 1]; ++g) {
        const Segment& part = split.segments[g];
        std::vector<TopK<A>> best;
        for (int64_t q = 0; q < n; ++q) best.emplace_back(part.keep);
        scan(z, memory, queries, part, first, n, best);
        for (int64_t q = 0; q < n; ++q) {
          const std::vector<Scored<A>>& found = best[q].finish();
          if (split.parts(part.stream) == 1) {
            out.write(part.stream * z.Q + first + q, found);
          } else {
            std::copy(found.begin(), found.end(), kept.get() + part.found + (first + q) * part.keep);
            sizes[g * z.Q + first + q] = found.size();
          }
        }
      }
    }
  });
  parallel(z.S * z.Q, 64, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t stream = place / z.Q, q = place % z.Q;
      if (split.parts(stream) == 1) continue;
      TopK<A> best(z.k);
      for (int64_t g = split.first_of_stream[stream]; g < split.first_of_stream[stream + 1]; ++g) {
        const Scored<A>* from = kept.get() + split.segments[g].found + q * split.segments[g].keep;
        for (int64_t j = 0; j < sizes[g * z.Q + q]; ++j) best.add(from[j]);
      }
      out.write(place, best.finish());
    }
  });
}

std::tuple<Tensor, Tensor> similarity_topk(const Tensor& query_, const Tensor& memory_, std::optional<Tensor> count_,
                                           std::optional<Tensor> where_, std::optional<Tensor> scale_,
                                           std::optional<Tensor> norm_, int64_t k, std::string metric) {
  contract::similarity_topk(query_, memory_, count_, where_, scale_, norm_, k, metric);
  const Tensor query = dense(query_), memory = dense(memory_);
  const Tensor count = count_ ? dense(*count_) : query, where = where_ ? dense(*where_) : query;
  const Tensor scale = scale_ ? dense(*scale_) : query, norm = norm_ ? dense(*norm_) : query;
  const Sizes z{query.size(0), query.size(1), memory.size(1), query.size(2), k, metric == "cosine"};
  const ScalarType wide = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor value = make(query, {z.S, z.Q, k}, wide), index = make(query, {z.S, z.Q, k}, ScalarType::Long);
  if (z.S == 0 || z.Q == 0) return {value, index};
  dispatch_floating(query.scalar_type(), [&](auto u) {
    using U = typename decltype(u)::type;
    using A = acc_t<U>;
    Queries<A> queries(z);
    queries.pack(data<U>(query), z, z.cosine && !norm_);
    const auto run = [&](auto t) {
      using T = typename decltype(t)::type;
      const Memory<T, A> slots{data<T>(memory), scale_ ? data<float>(scale) : nullptr,
                               where_ ? data<bool>(where) : nullptr, norm_ ? data<A>(norm) : nullptr};
      search(z, slots, queries, count_ ? data<int64_t>(count) : nullptr,
             Output<A>{mutable_data<A>(value), mutable_data<int64_t>(index), k});
    };
    dispatch_stored<U>(memory.scalar_type(), run);
  });
  return {value, index};
}

}  // namespace
}  // namespace vmemory

STABLE_TORCH_LIBRARY_IMPL(vmemory, CPU, m) { m.impl("similarity_topk", TORCH_BOX(&vmemory::similarity_topk)); }
