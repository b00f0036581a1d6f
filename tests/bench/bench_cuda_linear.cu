// Linear layers on a CUDA device: correctness against float64, and times of the three ways that a product can go.
//   bench_cuda_linear [check] [time] [chain]        (all three without arguments)
// Times are of CUDA graph replays over rotated weights, so that no weight is read from L2. Exit status 1: a check
// failed.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cublas_lt.h"
#include "cuda_error.h"
#include "kernels.h"

namespace based::cuda {
namespace {

// ---- host side of the element types --------------------------------------------------------------------------------

std::uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bf16(std::uint16_t x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }

float from_fp16(std::uint16_t x) {
  const int exponent = (x >> 10) & 31, fraction = x & 1023;
  float value = 0;
  if (exponent == 31) {
    value = fraction != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return (x & 0x8000) != 0 ? -value : value;
}

/// For |x| in [2⁻¹⁴, 65504], which is all that is written here; smaller numbers become zero.
std::uint16_t to_fp16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000);
  if (std::fabs(x) < 6.2e-5f) return sign;
  const std::uint32_t magnitude = (bits & 0x7fffffff) - (112u << 23);
  return static_cast<std::uint16_t>(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

void put(std::byte* data, DType dtype, std::size_t i, float value) {
  if (dtype == DType::float32) {
    std::memcpy(data + 4 * i, &value, 4);
  } else {
    const std::uint16_t half = dtype == DType::bfloat16 ? to_bf16(value) : to_fp16(value);
    std::memcpy(data + 2 * i, &half, 2);
  }
}

float get(const std::byte* data, DType dtype, std::size_t i) {
  if (dtype == DType::float32) {
    float value = 0;
    std::memcpy(&value, data + 4 * i, 4);
    return value;
  }
  std::uint16_t half = 0;
  std::memcpy(&half, data + 2 * i, 2);
  return dtype == DType::bfloat16 ? from_bf16(half) : from_fp16(half);
}

double epsilon_of(DType dtype) {
  return dtype == DType::float32 ? 0x1p-24 : dtype == DType::bfloat16 ? 0x1p-8 : 0x1p-11;
}

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * (x + 0.044715 * x * x * x)));
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::relu:
      return std::max(x, 0.0);
    case Activation::relu_squared:
      return std::max(x, 0.0) * std::max(x, 0.0);
    case Activation::identity:
      break;
  }
  return x;
}

// ---- device side ---------------------------------------------------------------------------------------------------

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t nbytes) : nbytes_(nbytes) { check(cudaMalloc(&data_, nbytes), "cudaMalloc"); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  std::size_t nbytes() const { return nbytes_; }
  void upload(const std::byte* from, std::size_t nbytes, std::size_t at = 0) const {
    check(cudaMemcpy(data() + at, from, nbytes, cudaMemcpyHostToDevice), "upload");
  }

 private:
  void* data_ = nullptr;
  std::size_t nbytes_;
};

using Host = std::vector<std::byte>;

Host random_values(std::mt19937& random, DType dtype, std::size_t n, float scale) {
  std::uniform_real_distribution<float> uniform(-scale, scale);
  Host host(n * size_of(dtype));
  for (std::size_t i = 0; i < n; ++i) put(host.data(), dtype, i, uniform(random));
  return host;
}

enum class Way { skinny, library, general };
const char* name_of(Way way) { return way == Way::skinny ? "skinny" : way == Way::library ? "cuBLASLt" : "general"; }

struct Context {
  cudaStream_t stream = nullptr;
  CublasLt* library = nullptr;
  std::byte* scratch = nullptr;     // (M, rows) of W's dtype
  const void* bias_as_y = nullptr;  // of y's dtype
};

bool plain(const LinearArguments& a) { return !a.gated && a.activation == Activation::identity; }

Product product_of(const Context& context, const LinearArguments& a) {
  Product p;
  p.dtype = a.dtype;
  p.rows = a.rows;
  p.k = a.k;
  p.m = a.m;
  p.weight = a.weight;
  p.x = a.x;
  p.y_dtype = plain(a) ? a.y_dtype : a.dtype;
  p.y = plain(a) ? a.y : context.scratch;
  p.accumulate = plain(a) && a.accumulate;
  if (plain(a) && a.bias != nullptr) p.bias = a.y_dtype == DType::float32 ? a.bias : context.bias_as_y;
  return p;
}

bool takes(Way way, const Context& context, const LinearArguments& a) {
  if (way == Way::skinny) return skinny_linear_takes(a);
  return way == Way::general || (a.x_dtype == a.dtype && context.library->takes(product_of(context, a)));
}

void run(Way way, const Context& context, const LinearArguments& a) {
  if (way == Way::skinny) return skinny_linear(context.stream, a);
  if (way == Way::general) return general_linear(context.stream, a);
  const Product p = product_of(context, a);
  context.library->matmul(context.stream, p);
  if (!plain(a)) linear_epilogue(context.stream, a, p.y_dtype, p.y);
}

// ---- correctness ---------------------------------------------------------------------------------------------------

struct Case {
  std::int64_t rows, k, m;
  DType dtype, x_dtype, y_dtype;
  Activation activation;
  bool gated, bias, accumulate;
};

/// Largest error over its bound: a few roundings of y's and W's types, and of float32 sums.
bool check_case(Context& context, std::mt19937& random, const Case& c) {
  const auto rows = static_cast<std::size_t>(c.rows), k = static_cast<std::size_t>(c.k),
             m = static_cast<std::size_t>(c.m);
  const std::size_t outputs = c.gated ? rows / 2 : rows, guard = 64;
  const Host w = random_values(random, c.dtype, rows * k, 1), bias = random_values(random, DType::float32, rows, 1);
  Host x = random_values(random, c.dtype, m * k, 0.5f);
  if (c.x_dtype != c.dtype) {  // float32 numbers that W's type holds exactly
    Host wide(m * k * 4);
    for (std::size_t i = 0; i < m * k; ++i) put(wide.data(), DType::float32, i, get(x.data(), c.dtype, i));
    x = wide;
  }
  Host before = random_values(random, c.y_dtype, m * outputs, 1);
  if (!c.accumulate) std::fill(before.begin(), before.end(), std::byte{0xff});
  const std::size_t y_bytes = before.size();
  before.resize(y_bytes + guard, std::byte{0xff});
  Host bias_as_y(rows * size_of(c.y_dtype));
  for (std::size_t i = 0; i < rows; ++i) put(bias_as_y.data(), c.y_dtype, i, get(bias.data(), DType::float32, i));

  const DeviceMemory dw(w.size()), dx(x.size()), dbias(bias.size()), dbias_y(bias_as_y.size()), dy(before.size());
  const DeviceMemory scratch(m * rows * 4);
  dw.upload(w.data(), w.size());
  dx.upload(x.data(), x.size());
  dbias.upload(bias.data(), bias.size());
  dbias_y.upload(bias_as_y.data(), bias_as_y.size());
  context.scratch = scratch.data();
  context.bias_as_y = dbias_y.data();
  const LinearArguments a{.dtype = c.dtype,
                          .weight = dw.data(),
                          .bias = c.bias ? reinterpret_cast<const float*>(dbias.data()) : nullptr,
                          .rows = c.rows,
                          .k = c.k,
                          .activation = c.activation,
                          .gated = c.gated,
                          .x_dtype = c.x_dtype,
                          .x = dx.data(),
                          .m = c.m,
                          .y_dtype = c.y_dtype,
                          .y = dy.data(),
                          .accumulate = c.accumulate};

  std::vector<double> expected(m * outputs), bound(m * outputs);
  // Large products are sampled: every output of the first and last 40 columns, and one column in 37.
  const auto wanted = [&](std::size_t column) {
    return outputs < 600 || column < 40 || column + 40 >= outputs || column % 37 == 0;
  };
  const auto dot = [&](std::size_t token, std::size_t row, double& magnitude) {
    double sum = c.bias ? get(bias.data(), DType::float32, row) : 0;
    magnitude = std::fabs(sum);
    for (std::size_t i = 0; i < k; ++i) {
      const double term =
          static_cast<double>(get(w.data(), c.dtype, row * k + i)) * get(x.data(), c.x_dtype, token * k + i);
      sum += term;
      magnitude += std::fabs(term);
    }
    return sum;
  };
  const double eps_w = epsilon_of(c.dtype), eps_y = epsilon_of(c.y_dtype);
  for (std::size_t token = 0; token < m; ++token) {
    for (std::size_t column = 0; column < outputs; ++column) {
      if (!wanted(column)) continue;
      const std::size_t at = token * outputs + column;
      double size = 0, gate_size = 0;
      double value = dot(token, column, size);
      // Error of a sum: float32 accumulation, and the rounding of what cuBLASLt leaves in W's type.
      const double error = size * 2e-6 + 2 * eps_w * (plain(a) ? 0 : std::fabs(value) + 1);
      double tolerance = error;
      if (c.gated) {
        const double gate = dot(token, column + outputs, gate_size);
        const double gate_error = gate_size * 2e-6 + 2 * eps_w * (std::fabs(gate) + 1);
        const double factor = activate(c.activation, gate);
        const double slope = c.activation == Activation::relu_squared ? 2 * std::fabs(gate) + 1 : 1.2;
        tolerance = error * (std::fabs(factor) + 1) + gate_error * slope * (std::fabs(value) + 1);
        value *= factor;
      } else {
        if (c.activation == Activation::relu_squared) tolerance *= 2 * std::fabs(value) + 2;
        value = activate(c.activation, value);
        tolerance *= 1.2;
      }
      if (c.accumulate) value += get(before.data(), DType::float32, at);
      if (c.bias && plain(a)) tolerance += 2 * eps_y;  // the bias in y's type
      expected[at] = value;
      bound[at] = tolerance + 2 * eps_y * std::fabs(value) + 1e-6;
    }
  }

  bool good = true;
  for (const Way way : {Way::skinny, Way::library, Way::general}) {
    if (!takes(way, context, a)) continue;
    Host first;
    for (int repeat = 0; repeat < 2; ++repeat) {
      dy.upload(before.data(), before.size());
      run(way, context, a);
      check(cudaStreamSynchronize(context.stream), name_of(way));
      Host y(before.size());
      check(cudaMemcpy(y.data(), dy.data(), y.size(), cudaMemcpyDeviceToHost), "download");
      double worst = 0;
      for (std::size_t token = 0; token < m; ++token) {
        for (std::size_t column = 0; column < outputs; ++column) {
          if (!wanted(column)) continue;
          const std::size_t at = token * outputs + column;
          const double error = std::fabs(get(y.data(), c.y_dtype, at) - expected[at]) / bound[at];
          worst = error <= worst ? worst : error;  // a NaN stays
        }
      }
      const bool intact = std::equal(y.begin() + static_cast<std::ptrdiff_t>(y_bytes), y.end(),
                                     before.begin() + static_cast<std::ptrdiff_t>(y_bytes));
      const bool repeats = repeat == 0 || y == first;
      if (!(worst <= 1) || !intact || !repeats) {
        good = false;
        std::printf(
            "FAILED %s rows %lld k %lld m %lld %s x %s y %s activation %d gated %d bias %d accumulate %d: "
            "error/bound %.3g%s%s\n",
            name_of(way), static_cast<long long>(c.rows), static_cast<long long>(c.k), static_cast<long long>(c.m),
            std::string(based::name_of(c.dtype)).c_str(), std::string(based::name_of(c.x_dtype)).c_str(),
            std::string(based::name_of(c.y_dtype)).c_str(), static_cast<int>(c.activation), c.gated, c.bias,
            c.accumulate, worst, intact ? "" : ", wrote behind y", repeats ? "" : ", differs on repetition");
      }
      first = std::move(y);
    }
  }
  return good;
}

bool check_all(Context& context) {
  std::mt19937 random(1);
  int cases = 0, failed = 0;
  const auto one = [&](const Case& c) {
    ++cases;
    if (!check_case(context, random, c)) ++failed;
  };
  constexpr Activation kActivations[] = {Activation::identity,    Activation::silu,    Activation::gelu,
                                         Activation::gelu_tanh,   Activation::sigmoid, Activation::relu,
                                         Activation::relu_squared};
  const DType f32 = DType::float32;
  for (const DType dtype : {DType::bfloat16, DType::float16, f32}) {
    int turn = 0;
    for (const std::int64_t m : {1, 2, 5, 8, 9, 16, 17, 32, 33, 70}) {
      for (const auto& [rows, k] : {std::pair<std::int64_t, std::int64_t>{16, 8},
                                    {48, 40},
                                    {64, 64},
                                    {80, 1000},
                                    {112, 1792},
                                    {150, 24},
                                    {7, 13},
                                    {258, 96},
                                    {2, 32}}) {
        const bool gated = rows % 2 == 0 && turn % 3 == 1;
        const bool accumulate = turn % 4 == 2;
        const DType y_dtype = accumulate || turn % 2 == 1 ? f32 : dtype;
        const Activation activation = turn % 3 == 0 ? Activation::identity : kActivations[turn / 3 % 7];
        one({rows, k, m, dtype, turn % 5 == 4 ? f32 : dtype, y_dtype, activation, gated, turn % 3 != 2, accumulate});
        ++turn;
      }
    }
  }
  for (const std::int64_t m : {1, 8, 24}) {
    const DType t = DType::bfloat16;
    one({7168, 1792, m, t, t, t, Activation::identity, false, true, false});
    one({7168, 1792, m, t, t, t, Activation::silu, true, true, false});
    one({1792, 3584, m, t, t, f32, Activation::identity, false, false, true});
    one({50264, 1792, m, t, t, f32, Activation::identity, false, false, false});
    one({1792, 1792, std::min<std::int64_t>(m, 8), f32, f32, f32, Activation::identity, false, true, true});
  }
  std::printf("%d cases, %d failed\n", cases, failed);
  return failed == 0;
}

// ---- times ---------------------------------------------------------------------------------------------------------

/// Median µs of one replay of what `enqueue` puts on the stream.
double replay_time(cudaStream_t stream, const std::function<void()>& enqueue) {
  enqueue();  // what a library sets up at its first call stays out of the capture
  check(cudaStreamSynchronize(stream), "warm-up");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  enqueue();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  cudaEvent_t start = nullptr, stop = nullptr;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    check(cudaEventRecord(start, stream), "event");
    check(cudaGraphLaunch(executable, stream), "replay");
    check(cudaEventRecord(stop, stream), "event");
    check(cudaEventSynchronize(stop), "replay");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop), "event");
    if (i >= 3) times.push_back(ms);
  }
  check(cudaEventDestroy(start), "event");
  check(cudaEventDestroy(stop), "event");
  check(cudaGraphExecDestroy(executable), "graph");
  check(cudaGraphDestroy(graph), "graph");
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return 1000.0 * times[times.size() / 2];
}

/// Device memory full of small random bfloat16 numbers.
std::unique_ptr<DeviceMemory> random_memory(std::size_t nbytes) {
  static const Host pattern = [] {
    std::mt19937 random(2);
    return random_values(random, DType::bfloat16, std::size_t{1} << 22, 0.02f);
  }();
  auto memory = std::make_unique<DeviceMemory>(nbytes);
  for (std::size_t at = 0; at < nbytes; at += pattern.size())
    memory->upload(pattern.data(), std::min(pattern.size(), nbytes - at), at);
  return memory;
}

struct Shape {
  const char* name;
  std::int64_t rows, k;
  bool gated, accumulate, float32_out;
};
constexpr Shape kInProj = {"in_proj", 5376, 1792, false, false, false};
constexpr Shape kOutProj = {"out_proj, y +=", 1792, 1792, false, true, true};
constexpr Shape kFc1 = {"fc1, SiLU gate", 7168, 1792, true, false, false};
constexpr Shape kFc2 = {"fc2, y +=", 1792, 3584, false, true, true};

LinearArguments arguments_of(const Shape& shape, std::int64_t m, const void* weight, const void* x, void* y) {
  LinearArguments a;
  a.dtype = a.x_dtype = DType::bfloat16;
  a.weight = weight;
  a.rows = shape.rows;
  a.k = shape.k;
  a.gated = shape.gated;
  a.activation = shape.gated ? Activation::silu : Activation::identity;
  a.x = x;
  a.m = m;
  a.y_dtype = shape.float32_out ? DType::float32 : DType::bfloat16;
  a.y = y;
  a.accumulate = shape.accumulate;
  return a;
}

std::size_t weight_bytes(const Shape& shape) { return static_cast<std::size_t>(shape.rows * shape.k) * 2; }

void time_shapes(Context& context) {
  constexpr std::int64_t kMaxRows = 8192;
  constexpr std::size_t kRotated = std::size_t{512} << 20;
  const auto weights = random_memory(kRotated);
  const auto x = random_memory(kMaxRows * 3584 * 2);
  const DeviceMemory y(std::size_t{kMaxRows} * 7168 * 4), scratch(std::size_t{kMaxRows} * 7168 * 2);
  context.scratch = scratch.data();
  std::printf("\n%-26s %6s  %-9s %10s %8s %9s\n", "rows x k (bfloat16)", "M", "", "us", "TB/s", "TFLOP/s");
  for (const Shape& shape :
       {Shape{"plain", 7168, 1792, false, false, false}, kFc1, kFc2, kInProj,
        Shape{"plain", 2304, 1792, false, false, false}, kOutProj, Shape{"logits", 50264, 1792, false, false, true}}) {
    for (const std::int64_t m : {1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 1024, 8192}) {
      if (shape.rows > 10000 && m > 128) continue;
      for (const Way way : {Way::skinny, Way::library, Way::general}) {
        const std::size_t sets = kRotated / weight_bytes(shape);
        const LinearArguments probe = arguments_of(shape, m, weights->data(), x->data(), y.data());
        if (!takes(way, context, probe) || (way == Way::general && m != 8 && m != 1024)) continue;
        const double total = replay_time(context.stream, [&] {
          for (std::size_t i = 0; i < sets; ++i)
            run(way, context, arguments_of(shape, m, weights->data() + i * weight_bytes(shape), x->data(), y.data()));
        });
        const double us = total / static_cast<double>(sets);
        const double flop = 2.0 * static_cast<double>(m * shape.rows * shape.k);
        std::printf("%6lld x %-5lld%-14s %5lld  %-9s %10.2f %8.2f %9.1f\n", static_cast<long long>(shape.rows),
                    static_cast<long long>(shape.k), shape.name, static_cast<long long>(m), name_of(way), us,
                    static_cast<double>(weight_bytes(shape)) / us * 1e-6, flop / us * 1e-6);
      }
    }
  }
}

/// The products of 36 layers in a row, each waiting for the one before: what a decode step of 1.3 G parameters does.
void time_chain(Context& context) {
  constexpr int kLayers = 36;
  constexpr std::int64_t kMaxRows = 128;
  const Shape shapes[] = {kInProj, kOutProj, kFc1, kFc2};
  std::size_t layer_bytes = 0;
  for (const Shape& shape : shapes) layer_bytes += weight_bytes(shape);
  const auto weights = random_memory(layer_bytes * kLayers);
  const auto h = random_memory(kMaxRows * 1792 * 2);
  const DeviceMemory u(kMaxRows * 5376 * 2), inner(kMaxRows * 3584 * 2), r(kMaxRows * 1792 * 4);
  const DeviceMemory scratch(kMaxRows * 7168 * 2);
  context.scratch = scratch.data();
  std::printf("\n%d layers of in_proj, out_proj, fc1, fc2: %.2f GB of weights\n", kLayers,
              1e-9 * static_cast<double>(layer_bytes * kLayers));
  for (const std::int64_t m : {1, 2, 4, 8, 16, 24, 32, 64, 128}) {
    for (const Way way : {Way::skinny, Way::library}) {
      const void* inputs[] = {h->data(), u.data(), h->data(), inner.data()};
      void* results[] = {u.data(), r.data(), inner.data(), r.data()};
      int streamed = 0;
      check(cudaMemset(r.data(), 0, r.nbytes()), "memset");
      const double us = replay_time(context.stream, [&] {
        const std::byte* weight = weights->data();
        for (int layer = 0; layer < kLayers; ++layer) {
          for (int i = 0; i < 4; ++i) {
            const LinearArguments a = arguments_of(shapes[i], m, weight, inputs[i], results[i]);
            const bool stream = way == Way::skinny && takes(way, context, a);
            streamed += stream;
            run(stream ? Way::skinny : Way::library, context, a);
            weight += weight_bytes(shapes[i]);
          }
        }
      });
      if (way == Way::skinny && streamed == 0) continue;
      std::printf("M %4lld  %-9s %9.1f us  %6.2f TB/s%s\n", static_cast<long long>(m), name_of(way), us,
                  static_cast<double>(layer_bytes * kLayers) / us * 1e-6,
                  way == Way::skinny && streamed != 2 * 4 * kLayers ? "  (some by cuBLASLt)" : "");
    }
  }
}

int bench(int argc, char** argv) {
  const auto chosen = [&](const char* part) {
    return argc == 1 || std::any_of(argv + 1, argv + argc, [&](const char* a) { return std::strcmp(a, part) == 0; });
  };
  require_cublas_lt();
  const DeviceMemory workspace(CublasLt::kWorkspaceBytes);
  CublasLt library(workspace.data(), workspace.nbytes(), false);
  Context context;
  context.library = &library;
  check(cudaStreamCreateWithFlags(&context.stream, cudaStreamNonBlocking), "stream");
  std::printf("compute capability %d, %d SMs\n", device_info().compute_capability, device_info().num_sms);
  if (chosen("time")) time_shapes(context);
  if (chosen("chain")) time_chain(context);
  return chosen("check") && !check_all(context) ? 1 : 0;
}

}  // namespace
}  // namespace based::cuda

int main(int argc, char** argv) {
  try {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    return based::cuda::bench(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cuda_linear: %s\n", error.what());
    return 1;
  }
}
