#include "contracts/token_merge.h"
#include "cuda/device.h"
#include "token_merge.cuh"

namespace vmemory::merging {
namespace {

template <class T>
bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

// a block an item and a slice of its channels, of whole packs where the rows lie so
template <class T, class Args, class Wide, class Single>
void launch(const Device& device, Args& args, int64_t items, Wide wide, Single single) {
  constexpr int64_t V = sizeof(uint4) / sizeof(T);
  const bool packed = args.D % V == 0 && aligned(args.x) && aligned(args.out);
  const int64_t step = kThreads * (packed ? V : 1);
  args.slices = std::max<int64_t>(1, (args.D + step - 1) / step);
  VMEMORY_CHECK(items * args.slices <= INT32_MAX, "x: too large for one launch");
  const dim3 blocks(static_cast<unsigned>(items * args.slices));
  device.launch("token_merge", packed ? wide : single, blocks, kThreads, 0, args);
}

template <class T>
void launch_sum(const Device& device, SumArgs<T>& args, int64_t streams) {
  if (streams * args.N == 0) return;
  launch<T>(device, args, streams * args.N, &token_sum_kernel<T, sizeof(uint4) / sizeof(T)>, &token_sum_kernel<T, 1>);
}

template <class T>
void launch_spread(const Device& device, SpreadArgs<T>& args, int64_t streams) {
  if (streams * args.M * args.D == 0) return;
  launch<T>(device, args, streams * args.M, &token_spread_kernel<T, sizeof(uint4) / sizeof(T)>,
            &token_spread_kernel<T, 1>);
}

std::tuple<Tensor, Tensor> token_merge(const Tensor& x_, std::optional<Tensor> size_, const Tensor& order_,
                                       const Tensor& start_) {
  contract::token_merge(x_, size_, order_, start_);
  const Device device(x_);
  const Tensor x = dense(x_), size = size_ ? dense(*size_) : x, order = dense(order_), start = dense(start_);
  const int64_t B = start.size(0), N = start.size(1) - 1, M = x.size(1), D = x.size(2);
  const bool is_double = x.scalar_type() == ScalarType::Double;
  Tensor out = make(x, {B, N, D}), total = make(x, {B, N}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_floating(x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    SumArgs<T> args{data<T>(x),
                    size_ ? data<A>(size) : nullptr,
                    data<int64_t>(order),
                    data<int64_t>(start),
                    mutable_data<T>(out),
                    mutable_data<A>(total),
                    M,
                    N,
                    D,
                    1};
    launch_sum(device, args, B);
  });
  return {out, total};
}

Tensor token_unmerge_backward(const Tensor& grad_, const Tensor& order_, const Tensor& start_) {
  contract::token_unmerge_backward(grad_, order_, start_);
  const Device device(grad_);
  const Tensor grad = dense(grad_), order = dense(order_), start = dense(start_);
  const int64_t B = start.size(0), N = start.size(1) - 1, M = grad.size(1), D = grad.size(2);
  Tensor out = make(grad, {B, N, D});
  dispatch_floating(grad.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    SumArgs<T> args{
        data<T>(grad), nullptr, data<int64_t>(order), data<int64_t>(start), mutable_data<T>(out), nullptr, M, N, D, 1};
    launch_sum(device, args, B);
  });
  return out;
}

Tensor token_merge_backward(const Tensor& grad_, std::optional<Tensor> size_, const Tensor& total_,
                            const Tensor& place_, const Tensor& start_) {
  contract::token_merge_backward(grad_, size_, total_, place_, start_);
  const Device device(grad_);
  const Tensor grad = dense(grad_), total = dense(total_), place = dense(place_), start = dense(start_);
  const Tensor size = size_ ? dense(*size_) : grad;
  const int64_t B = place.size(0), N = start.size(1) - 1, M = place.size(1), D = grad.size(2);
  Tensor out = make(grad, {B, M, D});
  dispatch_floating(grad.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    SpreadArgs<T> args{data<T>(grad),
                       size_ ? data<A>(size) : nullptr,
                       data<A>(total),
                       data<int64_t>(place),
                       data<int64_t>(start),
                       mutable_data<T>(out),
                       M,
                       N,
                       D,
                       1};
    launch_spread(device, args, B);
  });
  return out;
}

Tensor token_unmerge(const Tensor& x_, const Tensor& place_) {
  contract::token_unmerge(x_, place_);
  const Device device(x_);
  const Tensor x = dense(x_), place = dense(place_);
  const int64_t B = place.size(0), N = x.size(1), M = place.size(1), D = x.size(2);
  Tensor out = make(x, {B, M, D});
  dispatch_floating(x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    SpreadArgs<T> args{data<T>(x), nullptr, nullptr, data<int64_t>(place), nullptr, mutable_data<T>(out), M, N, D, 1};
    launch_spread(device, args, B);
  });
  return out;
}

}  // namespace
}  // namespace vmemory::merging

VMEMORY_CUDA_IMPL(m) {
  m.impl("token_merge", TORCH_BOX(&vmemory::merging::token_merge));
  m.impl("token_merge_backward", TORCH_BOX(&vmemory::merging::token_merge_backward));
  m.impl("token_unmerge", TORCH_BOX(&vmemory::merging::token_unmerge));
  m.impl("token_unmerge_backward", TORCH_BOX(&vmemory::merging::token_unmerge_backward));
}
