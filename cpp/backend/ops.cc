#include "based/ops.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "backend/cuda.h"
#include "based/error.h"

namespace based {

Tensor Tensor::copy_to(Device to) const {
  constexpr Device kHost;
  if (to != kHost && to != device_)
    throw InvalidArgument("a tensor of " + device_.str() + " cannot be copied to " + to.str());
  Tensor copy =
      to == kHost ? empty(dtype_, shape_) : Tensor(to, dtype_, shape_, cuda::allocate(to.index, nbytes(), nullptr));
  if (device_ != kHost)
    cuda::copy(device_.index, copy.data(), data(), nbytes());
  else if (nbytes() > 0)
    std::memcpy(copy.data(), data(), nbytes());
  return copy;
}

namespace ops {

namespace {

std::string name_str(DType dtype) { return std::string(name_of(dtype)); }

void check_shape(const char* name, const Array& array, const std::vector<std::int64_t>& expected) {
  if (array.shape != expected)
    throw InvalidArgument(std::string(name) + " has shape " + shape_str(array.shape) + ", expected " +
                          shape_str(expected));
}

void check_rank(const char* name, const Array& array, std::size_t rank, const char* axes) {
  if (array.shape.size() != rank)
    throw InvalidArgument(std::string(name) + " has shape " + shape_str(array.shape) + ", expected " + axes);
  for (const std::int64_t extent : array.shape)
    if (extent < 1 || extent > INT32_MAX)
      throw InvalidArgument(std::string(name) + " has shape " + shape_str(array.shape) + ", expected extents of 1 to " +
                            std::to_string(INT32_MAX));
}

void check_dtype(const char* name, const Array& array, DType expected) {
  if (array.dtype != expected)
    throw InvalidArgument(std::string(name) + " is " + name_str(array.dtype) + ", expected " + name_str(expected));
}

void check_element(const char* name, const Array& array) {
  if (array.dtype != DType::float32 && array.dtype != DType::bfloat16 && array.dtype != DType::float16)
    throw InvalidArgument(std::string(name) + " is " + name_str(array.dtype) +
                          ", expected float32, bfloat16 or float16");
}

// The last `axes` axes without gaps; an axis of one element, or an empty array, may have any strides.
void check_dense(const char* name, const Array& array, std::size_t axes) {
  if (std::ranges::count(array.shape, 0) > 0) return;
  std::int64_t expected = 1;
  for (std::size_t i = array.shape.size(); i-- > array.shape.size() - axes;) {
    if (array.shape[i] != 1 && array.strides[i] != expected)
      throw InvalidArgument(std::string(name) + " has strides " + shape_str(array.strides) + " for shape " +
                            shape_str(array.shape) + ", expected stride " + std::to_string(expected) + " on axis " +
                            std::to_string(i) + ": make it contiguous()");
    expected *= array.shape[i];
  }
}

void check_dense(const char* name, const Array& array) { check_dense(name, array, array.shape.size()); }

void check_aligned(const char* name, const Array& array) {
  if (reinterpret_cast<std::uintptr_t>(array.data) % 16 != 0)
    throw InvalidArgument(std::string(name) + " starts at an address that is no multiple of 16 bytes: clone() it");
}

void check_device(const char* name, const Array& array, Device expected) {
  if (array.device.type != Device::Type::cuda)
    throw InvalidArgument(std::string(name) + " is on " + array.device.str() + ", expected a CUDA device");
  if (array.device != expected)
    throw InvalidArgument(std::string(name) + " is on " + array.device.str() + ", expected " + expected.str() +
                          " as the others");
}

void check_tokens(const Array& array) {
  if (array.shape[0] * array.shape[1] > INT32_MAX)
    throw InvalidArgument("shape " + shape_str(array.shape) + " has " + std::to_string(array.shape[0]) + " · " +
                          std::to_string(array.shape[1]) + " tokens, expected at most " + std::to_string(INT32_MAX));
}

void check_state(const char* name, const std::optional<Array>& state, const std::vector<std::int64_t>& shape) {
  if (!state) return;
  check_shape(name, *state, shape);
  check_dtype(name, *state, DType::float32);
  check_dense(name, *state);
}

}  // namespace

void taylor_linear_attention(const Array& q, const Array& k, const Array& v, const std::optional<Array>& initial_state,
                             const Array& out, const std::optional<Array>& final_state, double eps,
                             StreamHandle stream) {
  check_rank("q", q, 4, "(B, T, H, f)");
  check_rank("v", v, 4, "(B, T, H, D)");
  const std::int64_t b = q.shape[0], t = q.shape[1], h = q.shape[2], f = q.shape[3], d = v.shape[3];
  check_shape("k", k, q.shape);
  check_shape("v", v, {b, t, h, d});
  check_shape("out", out, v.shape);
  check_tokens(q);
  if (f > 1024) throw InvalidArgument("q has shape " + shape_str(q.shape) + ", expected at most 1024 features a head");
  check_element("q", q);
  for (const auto& [name, array] : {std::pair{"k", &k}, {"v", &v}, {"out", &out}}) check_dtype(name, *array, q.dtype);
  for (const auto& [name, array] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}}) {
    check_dense(name, *array, 1);
    check_aligned(name, *array);
  }
  const LinearAttentionConfig config{h, f, d, eps};
  check_state("initial_state", initial_state, {b, h, config.num_features(), d + 1});
  check_state("final_state", final_state, {b, h, config.num_features(), d + 1});
  if (!(eps >= 0)) throw InvalidArgument("eps is " + std::to_string(eps) + ", expected ≥ 0");
  for (const auto& [name, array] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}})
    check_device(name, *array, q.device);
  if (initial_state) check_device("initial_state", *initial_state, q.device);
  if (final_state) check_device("final_state", *final_state, q.device);
  cuda::taylor_linear_attention(config, q, k, v, initial_state, out, final_state, stream);
}

void sliding_window_attention(const Array& q, const Array& k, const Array& v, const Array& out, std::int64_t window,
                              double scale, StreamHandle stream) {
  check_rank("q", q, 4, "(B, T, H, D)");
  check_rank("k", k, 4, "(B, T, H_kv, D)");
  const std::int64_t b = q.shape[0], t = q.shape[1], h = q.shape[2], d = q.shape[3], h_kv = k.shape[2];
  check_shape("k", k, {b, t, h_kv, d});
  check_shape("v", v, k.shape);
  check_shape("out", out, q.shape);
  check_tokens(q);
  if (h % h_kv != 0)
    throw InvalidArgument("k has " + std::to_string(h_kv) + " heads, expected a divisor of the " + std::to_string(h) +
                          " heads of q");
  if (window < 1) throw InvalidArgument("window is " + std::to_string(window) + ", expected ≥ 1");
  check_element("q", q);
  for (const auto& [name, array] : {std::pair{"k", &k}, {"v", &v}, {"out", &out}}) check_dtype(name, *array, q.dtype);
  for (const auto& [name, array] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) check_dense(name, *array, 1);
  check_dense("out", out, 2);
  for (const auto& [name, array] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}}) {
    check_aligned(name, *array);
    check_device(name, *array, q.device);
  }
  SlidingWindowConfig config;
  config.num_heads = h;
  config.num_kv_heads = h_kv;
  config.head_dim = d;
  config.window = std::min(window, t);  // the ring need not hold more than there is
  config.scale = scale;
  cuda::sliding_window_attention(config, q, k, v, out, stream);
}

void gated_short_conv(const Array& u, const Array& weight, const std::optional<Array>& initial_state, const Array& out,
                      const std::optional<Array>& final_state, StreamHandle stream) {
  check_rank("u", u, 3, "(B, T, 2e)");
  check_rank("weight", weight, 2, "(e, K)");
  const std::int64_t b = u.shape[0], t = u.shape[1], e = weight.shape[0], k = weight.shape[1];
  check_shape("u", u, {b, t, 2 * e});
  check_shape("out", out, {b, t, e});
  check_tokens(u);
  check_element("u", u);
  check_dtype("weight", weight, u.dtype);
  check_dtype("out", out, u.dtype);
  for (const auto& [name, array] : {std::pair{"u", &u}, {"weight", &weight}, {"out", &out}}) {
    check_dense(name, *array);
    check_aligned(name, *array);
  }
  check_state("initial_state", initial_state, {b, k - 1, e});
  check_state("final_state", final_state, {b, k - 1, e});
  for (const auto& [name, array] : {std::pair{"u", &u}, {"weight", &weight}, {"out", &out}})
    check_device(name, *array, u.device);
  if (initial_state) check_device("initial_state", *initial_state, u.device);
  if (final_state) check_device("final_state", *final_state, u.device);
  cuda::gated_short_conv(GatedConvConfig{e, k, false}, u, weight, initial_state, out, final_state, stream);
}

Tensor empty(Device device, DType dtype, std::vector<std::int64_t> shape, StreamHandle stream) {
  if (device.type != Device::Type::cuda)
    throw InvalidArgument("device is " + device.str() + ", expected a CUDA device");
  const auto nbytes = static_cast<std::size_t>(num_elements(shape)) * size_of(dtype);
  return {device, dtype, std::move(shape), cuda::allocate(device.index, nbytes, stream)};
}

}  // namespace ops
}  // namespace based
