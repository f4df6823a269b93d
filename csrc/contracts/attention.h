// Argument checks of the attention operators.
#pragma once

#include "contracts/stored.h"

namespace vmemory::contract {

inline void slots(const Argument& query, const Argument& keys, const Argument& values, const Tensor& count,
                  const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  query.shape({kAny, kAny, kAny, kAny}).floating().at_least(1, 3);
  const int64_t S = query.size(0), G = query.size(2), E = query.size(3);
  keys.shape({S, kAny, kAny, G, stored_channels(keys, E)});
  stored_beside(keys, query);
  values.shape({S, keys.size(1), keys.size(2), G, keys.size(4)}).like(keys);
  Argument("count", count).shape({S}).of(dtype::int64).beside(query);
  for (const Argument& scale : {Argument("key_scale", key_scale), Argument("value_scale", value_scale)})
    scale_of(keys, scale).shape({S, keys.size(1), keys.size(2), G});
}

inline void memory_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& count,
                             const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  slots(Argument("query", query), Argument("keys", keys), Argument("values", values), count, key_scale, value_scale);
}

inline void memory_attention_backward(const Tensor& grad, const Tensor& query_, const Tensor& keys_,
                                      const Tensor& values, const Tensor& count, const std::optional<Tensor>& key_scale,
                                      const std::optional<Tensor>& value_scale, const Tensor& out, const Tensor& stats,
                                      bool for_memory) {
  const Argument query("query", query_), keys("keys", keys_);
  slots(query, keys, Argument("values", values), count, key_scale, value_scale);
  const int64_t S = query.size(0), N = query.size(1), G = query.size(2), E = query.size(3);
  Argument("grad", grad).shape({S, N, G, E}).like(query);
  Argument("out", out).shape({S, N, G, E}).sums_of(query);
  Argument("stats", stats).shape({2, S, G, N}).sums_of(query);
  VMEMORY_CHECK(!for_memory || keys.type() == query.type(), "for_memory: expected no gradient of quantised slots");
}

inline void attention_column_sums(const Tensor& query_, const Tensor& key) {
  const Argument query("query", query_);
  query.shape({kAny, kAny, kAny, kAny}).floating().at_least(1, 3);
  Argument("key", key).shape({query.size(0), kAny, query.size(2), query.size(3)}).like(query);
}

inline void attention_column_sums_backward(const Tensor& grad, const Tensor& query_, const Tensor& key_,
                                           const Tensor& stats) {
  attention_column_sums(query_, key_);
  const Argument query("query", query_), key("key", key_);
  Argument("grad", grad).shape({query.size(0), query.size(2), key.size(1)}).sums_of(query);
  Argument("stats", stats).shape({2, query.size(0), query.size(2), query.size(1)}).sums_of(query);
}

}  // namespace vmemory::contract
