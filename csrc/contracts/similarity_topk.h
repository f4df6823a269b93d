// Argument checks of the similarity search.
#pragma once

#include "contracts/stored.h"

namespace vmemory::contract {

constexpr int64_t kMostFound = 1024;

inline void search(const Argument& query, const Argument& memory, const std::optional<Tensor>& scale,
                   const std::string& metric) {
  query.shape({kAny, kAny, kAny}).floating();
  memory.shape({query.size(0), kAny, stored_channels(memory, query.size(2))}).at_most(kMostRows, 1);
  stored_beside(memory, query);
  scale_of(memory, Argument("scale", scale)).shape({query.size(0), memory.size(1)});
  expect_choice("metric", metric, {"cosine", "dot"});
}

inline void similarity_topk(const Tensor& query_, const Tensor& memory_, const std::optional<Tensor>& count,
                            const std::optional<Tensor>& where, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& norm, int64_t k, const std::string& metric) {
  const Argument query("query", query_), memory("memory", memory_);
  search(query, memory, scale, metric);
  Argument("count", count).shape({query.size(0)}).of(dtype::int64).beside(query);
  Argument("where", where).shape({query.size(0), memory.size(1)}).of(dtype::boolean).beside(query);
  Argument("norm", norm).shape({query.size(0), memory.size(1)}).sums_of(query);
  expect_int("k", k, 1, kMostFound);
}

inline void similarity_topk_backward(const Tensor& grad, const Tensor& values, const Tensor& indices_,
                                     const Tensor& query_, const Tensor& memory_, const std::optional<Tensor>& scale,
                                     const std::string& metric, bool for_memory) {
  const Argument query("query", query_), memory("memory", memory_), indices("indices", indices_);
  search(query, memory, scale, metric);
  indices.shape({query.size(0), query.size(1), kAny}).of(dtype::int64).beside(query);
  indices.values(std::numeric_limits<int64_t>::min(), memory.size(1) - 1);
  Argument("grad", grad).shape({query.size(0), query.size(1), indices.size(2)}).sums_of(query);
  Argument("values", values).shape({query.size(0), query.size(1), indices.size(2)}).sums_of(query);
  VMEMORY_CHECK(!for_memory || memory.type() == query.type(), "for_memory: expected no gradient of quantised slots");
}

}  // namespace vmemory::contract
