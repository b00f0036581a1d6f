// Linear layers of the 360M shape on the CPU: the stream over all weights of a decode step, against the read
// bandwidth measured by the same threads in the same run, and the matrix products of a 512-token prompt.
//   bench_linear [threads]     0 or none: the CPUs that this process may use

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "backend/cpu/cpu_backend.h"

namespace {

using based::DType;
using based::backend::LinearSource;
using based::backend::LinearWeight;
using based::backend::Matrix;
using based::backend::MemoryKind;
using based::cpu::CpuBackend;
using Clock = std::chrono::steady_clock;

struct Shape {
  const char* name;
  std::int64_t n;  // rows of W
  std::int64_t k;
  bool gated;
  int count;  // layers
};

// based-360m: hidden 1024, 27 layers (17 gated convolution, 5 linear attention, 5 window), inner size 2048.
constexpr Shape kShapes[] = {
    {"conv in", 4096, 1024, false, 17},   {"conv out", 1024, 2048, false, 17},  {"taylor qkv", 1536, 1024, false, 5},
    {"taylor out", 1024, 1024, false, 5}, {"window qkv", 3072, 1024, false, 5}, {"window out", 1024, 1024, false, 5},
    {"fc1", 4096, 1024, true, 27},        {"fc2", 1024, 2048, false, 27},       {"logits", 50264, 1024, false, 1},
};

double seconds(Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); }

template <typename F>
double median_time(int repeats, F&& f) {
  f();
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    f();
    times.push_back(seconds(start));
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[static_cast<std::size_t>(repeats / 2)];
}

// GB/s of summing 1 GiB, 1 MiB a task.
double read_bandwidth(CpuBackend& backend) {
  using Lanes = std::uint64_t __attribute__((vector_size(64)));
  constexpr std::int64_t kTask = std::int64_t{1} << 20, kTasks = 1024;
  const auto buffer = backend.allocate(static_cast<std::size_t>(kTask * kTasks), MemoryKind::workspace);
  std::memset(buffer.data.get(), 1, buffer.nbytes);
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(kTasks));
  const double time = median_time(15, [&] {
    backend.pool()->run(kTasks, [&](std::int64_t task, int) {
      const auto* p = static_cast<const Lanes*>(buffer.data.get()) + task * kTask / 64;
      Lanes a{}, b{}, c{}, d{};
      for (std::int64_t i = 0; i < kTask / 64; i += 4) a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
      a += b + c + d;
      sums[static_cast<std::size_t>(task)] = a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
    });
  });
  if (sums[0] != sums[1]) std::printf("the sums differ\n");
  return static_cast<double>(kTask * kTasks) / time * 1e-9;
}

struct Layer {
  const Shape* shape;
  std::shared_ptr<const LinearWeight> weight;
};

void report(CpuBackend& backend, DType dtype, double bandwidth) {
  std::mt19937 random(1);
  std::vector<std::uint16_t> values(std::size_t{50264} * 1024);
  for (auto& v : values) {
    const float f = (static_cast<float>(random() >> 8) / 8388608.0f - 1.0f) * 0.05f;
    std::uint32_t u;
    std::memcpy(&u, &f, 4);
    v = static_cast<std::uint16_t>(u >> 16);
  }
  std::vector<Layer> layers;
  double nbytes = 0;
  const auto start = Clock::now();
  for (const Shape& shape : kShapes)
    for (int i = 0; i < shape.count; ++i) {
      LinearSource source;
      source.weights = {{DType::bfloat16, {shape.n, shape.k}, reinterpret_cast<const std::byte*>(values.data())}};
      source.gated = shape.gated;
      if (shape.gated) source.activation = based::Activation::silu;
      layers.push_back({&shape, backend.pack_linear(source, dtype)});
      nbytes += static_cast<double>(layers.back().weight->nbytes());
    }
  std::printf("%s weights, %.0f MB, packed in %.3f s\n", std::string(based::name_of(dtype)).c_str(), nbytes * 1e-6,
              seconds(start));

  const DType activation = backend.activation_dtype(dtype);
  const auto x = backend.allocate(std::size_t{512} * 2048 * 4, MemoryKind::workspace);
  const auto y = backend.allocate(std::size_t{512} * 50264 * 4, MemoryKind::workspace);
  std::memset(x.data.get(), 0x3c, x.nbytes);
  std::memset(y.data.get(), 0, y.nbytes);
  const auto apply = [&](const Layer& layer, std::int64_t rows) {
    const LinearWeight& w = *layer.weight;
    backend.linear(w, {x.data.get(), activation, rows, w.in_features()},
                   {y.data.get(), DType::float32, rows, w.out_features()}, false);
  };

  double first = 0;
  for (const std::int64_t rows : {1, 2, 4, 8, 12, 16, 32}) {
    const double time = median_time(21, [&] {
      for (const Layer& layer : layers) apply(layer, rows);
    });
    if (rows == 1) first = time;
    std::printf("  all layers, %2d rows: %6.2f ms  %5.1f GB/s  %3.0f %% of the read bandwidth  %.2f x one row\n",
                static_cast<int>(rows), time * 1e3, nbytes / time * 1e-9, nbytes / time * 1e-7 / bandwidth,
                time / first);
  }
  for (const std::int64_t rows : {1, 512})
    for (const Shape& shape : kShapes) {
      std::vector<const Layer*> same;
      for (const Layer& layer : layers)
        if (layer.shape == &shape) same.push_back(&layer);
      const double time = median_time(rows == 1 ? 21 : 5,
                                      [&] {
                                        for (const Layer* layer : same) apply(*layer, rows);
                                      }) /
                          static_cast<double>(same.size());
      const double flops = 2.0 * static_cast<double>(rows * shape.n * shape.k);
      std::printf("  %-10s %5d x %4d, %3d rows: %9.1f us  %7.1f GFLOP/s  %5.1f GB/s\n", shape.name,
                  static_cast<int>(shape.n), static_cast<int>(shape.k), static_cast<int>(rows), time * 1e6,
                  flops / time * 1e-9, static_cast<double>(same[0]->weight->nbytes()) / time * 1e-9);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  CpuBackend backend(std::make_shared<based::cpu::ThreadPool>(threads > 0 ? threads : based::cpu::available_cpus()),
                     based::cpu::choose_isa());
  const double bandwidth = read_bandwidth(backend);
  std::printf("%d threads, %s, read bandwidth %.1f GB/s\n", backend.num_threads(), backend.kernel_isa().c_str(),
              bandwidth);
  report(backend, DType::bfloat16, bandwidth);
  report(backend, DType::float32, bandwidth);
}
