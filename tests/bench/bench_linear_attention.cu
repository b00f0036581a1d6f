// Checks and times linear_attention() alone. Arguments: check, quick (check without the long sequences), time (default:
// check and time); anything else: the beginning of the names of the cases to check, at least one.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using based::DType;
using based::LinearAttentionConfig;
using based::cuda::DeviceBatch;
using based::cuda::kPendingTokens;
using based::cuda::kTileTokens;
using based::cuda::PendingLayout;
using based::cuda::PrefixView;
using based::cuda::QkvView;
using based::cuda::StateView;
using based::cuda::Tile;

constexpr double kBandwidth = 4.0e12;              // bytes/s, H200, read + write
constexpr std::size_t kRotatedBytes = 320u << 20;  // several times the L2

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(2);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t size) : size_(size) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<std::size_t>(size, 1) * sizeof(T)), "cudaMalloc");
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { upload(host); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }
  void upload(const std::vector<T>& host) {
    require(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  std::vector<T> download() const {
    std::vector<T> host(size_);
    require(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return host;
  }
  void fill(int byte) { require(cudaMemset(data_, byte, size_ * sizeof(T)), "cudaMemset"); }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

// ---- elements ------------------------------------------------------------------------------------------------------

std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
std::uint16_t to_fp16(float x) {  // of |x| in [2⁻¹⁴, 65504), else 0
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t sign = bits >> 31 << 15;
  if (std::fabs(x) < 6.103515625e-5f) return static_cast<std::uint16_t>(sign);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  return static_cast<std::uint16_t>(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}
float from_fp16(std::uint16_t x) {
  const int exponent = (x >> 10) & 31, mantissa = x & 1023;
  const float magnitude = exponent == 31  ? std::nanf("")
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return x >> 15 ? -magnitude : magnitude;
}

std::size_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
void write_element(std::byte* data, std::size_t i, float x, DType dtype) {
  if (dtype == DType::float32) {
    std::memcpy(data + 4 * i, &x, 4);
  } else {
    const std::uint16_t bits = dtype == DType::bfloat16 ? to_bf16(x) : to_fp16(x);
    std::memcpy(data + 2 * i, &bits, 2);
  }
}
float read_element(const std::byte* data, std::size_t i, DType dtype) {
  if (dtype == DType::float32) {
    float x;
    std::memcpy(&x, data + 4 * i, 4);
    return x;
  }
  std::uint16_t bits;
  std::memcpy(&bits, data + 2 * i, 2);
  return dtype == DType::bfloat16 ? from_bf16(bits) : from_fp16(bits);
}

// ---- batches -------------------------------------------------------------------------------------------------------

struct Batch {
  std::vector<std::int32_t> offsets{0}, slots, singles, longs, first_segments{0};
  std::vector<Tile> segments;
  std::vector<DeviceArray<std::int32_t>*> arrays;
  DeviceBatch device;

  Batch(const std::vector<int>& lengths, const std::vector<int>& slot_of, int segment_tokens)
      : slots(slot_of.begin(), slot_of.end()) {
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      const std::int32_t first = offsets.back();
      offsets.push_back(first + lengths[b]);
      if (lengths[b] == 1) {
        singles.push_back(static_cast<std::int32_t>(b));
        continue;
      }
      longs.push_back(static_cast<std::int32_t>(b));
      for (int begin = 0; begin < lengths[b]; begin += segment_tokens)
        segments.push_back({static_cast<std::int32_t>(b), first + begin, std::min(segment_tokens, lengths[b] - begin)});
      first_segments.push_back(static_cast<std::int32_t>(segments.size()));
    }
    const auto upload = [this](const std::vector<std::int32_t>& host) {
      arrays.push_back(new DeviceArray<std::int32_t>(host));
      return arrays.back()->data();
    };
    device.num_tokens = offsets.back();
    device.num_sequences = static_cast<int>(lengths.size());
    device.offsets = upload(offsets);
    device.slots = upload(slots);
    device.singles = singles.size() == lengths.size() ? nullptr : upload(singles);
    device.num_singles = static_cast<int>(singles.size());
    device.longs = upload(longs);
    device.num_longs = static_cast<int>(longs.size());
    device.first_segments = upload(first_segments);
    std::vector<std::int32_t> raw(segments.size() * 3);
    if (!raw.empty()) std::memcpy(raw.data(), segments.data(), raw.size() * 4);
    static_assert(sizeof(Tile) == 12);
    device.segments = reinterpret_cast<const Tile*>(upload(raw));
    device.num_segments = static_cast<int>(segments.size());
    device.positions = reinterpret_cast<const std::int64_t*>(upload(std::vector<std::int32_t>(2 * lengths.size())));
  }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;
  ~Batch() {
    for (auto* array : arrays) delete array;
  }
};

// ---- check ---------------------------------------------------------------------------------------------------------

struct Case {
  std::string name;
  DType dtype;
  int heads, f, head_dim;
  std::vector<int> lengths;
  int segment_tokens = 256;
  int padding = 0;                           // elements between the rows of qkv: unaligned views
  double output_limit = 0, state_limit = 0;  // relative, L2
  bool lazy = false;                         // with room for pending tokens
  int calls = 1;                             // one after another on the same states, each of these lengths
  int prefix = 0;                            // tokens of a prefix that every call reads
};

/// φ as docs/state-format.md has it.
void feature_map(const double* x, int f, double* phi) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(f));
  int p = 0;
  phi[p++] = 1.0;
  for (int i = 0; i < f; ++i) phi[p++] = x[i] * std::sqrt(scale);
  for (int i = 0; i < f; ++i)
    for (int j = i; j < f; ++j) phi[p++] = x[i] * x[j] * scale * (i == j ? std::sqrt(0.5) : 1.0);
}

struct Error {
  double difference = 0, size = 0;
  void add(double x, double y) {
    difference += (x - y) * (x - y);  // NaN when x is
    size += y * y;
  }
  double relative() const { return std::sqrt(difference / size); }
};

/// Of one head: sums += φ(k) [v | 1]ᵀ, (features, head_dim + 1).
void add_token(std::vector<double>& sums, const std::vector<double>& phi, const std::vector<double>& value) {
  const std::size_t head_dim = value.size();
  for (std::size_t p = 0; p < phi.size(); ++p) {
    double* s = sums.data() + p * (head_dim + 1);
    for (std::size_t n = 0; n < head_dim; ++n) s[n] += phi[p] * value[n];
    s[head_dim] += phi[p];
  }
}

bool run_case(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  LinearAttentionConfig config;
  config.num_heads = c.heads;
  config.feature_dim = c.f;
  config.head_dim = c.head_dim;
  config.eps = 1e-6;
  const int num_features = static_cast<int>(config.num_features()), num_sequences = static_cast<int>(c.lengths.size());
  const std::size_t heads = static_cast<std::size_t>(c.heads), features = static_cast<std::size_t>(num_features);
  const std::size_t head_dim = static_cast<std::size_t>(c.head_dim), f = static_cast<std::size_t>(c.f);

  const int num_slots = num_sequences + 2;
  std::vector<int> slots(static_cast<std::size_t>(num_slots));
  for (int i = 0; i < num_slots; ++i) slots[static_cast<std::size_t>(i)] = i;
  std::shuffle(slots.begin(), slots.end(), random);
  slots.resize(static_cast<std::size_t>(num_sequences));
  if (num_sequences > 3) slots[2] = -1;
  Batch batch(c.lengths, slots, c.segment_tokens);
  const std::size_t num_tokens = static_cast<std::size_t>(batch.device.num_tokens);

  const std::size_t row = heads * (2 * f + head_dim) + static_cast<std::size_t>(c.padding);
  std::vector<std::vector<std::byte>> qkv(static_cast<std::size_t>(c.calls));
  for (auto& call : qkv) {
    call.resize(num_tokens * row * element_bytes(c.dtype));
    for (std::size_t i = 0; i < num_tokens * row; ++i) write_element(call.data(), i, normal(random), c.dtype);
  }

  const std::size_t encoder_row = heads * (f + head_dim) + static_cast<std::size_t>(c.padding);
  std::vector<std::byte> encoder(c.prefix > 0 ? num_tokens * encoder_row * element_bytes(c.dtype) : 0);
  for (std::size_t i = 0; i < encoder.size() / element_bytes(c.dtype); ++i)
    write_element(encoder.data(), i, normal(random), c.dtype);

  // States of a random past, with guards behind each.
  const std::size_t state_floats = heads * features * (head_dim + 1);
  const std::size_t stride = (state_floats + 3) / 4 * 4 + 8;
  constexpr float kGuard = 12345.0f;
  std::vector<float> states(static_cast<std::size_t>(num_slots) * stride, kGuard);
  std::vector<double> x(f), phi(features), phi_k(features), value(head_dim);
  for (int slot = 0; slot < num_slots; ++slot)
    for (std::size_t h = 0; h < heads; ++h) {
      std::vector<double> s(features * (head_dim + 1), 0.0);
      for (int past = 0; past < 20; ++past) {
        for (double& e : x) e = normal(random);
        for (double& e : value) e = normal(random);
        feature_map(x.data(), c.f, phi.data());
        add_token(s, phi, value);
      }
      float* base = states.data() + static_cast<std::size_t>(slot) * stride;
      for (std::size_t p = 0; p < features; ++p) {
        for (std::size_t n = 0; n < head_dim; ++n)
          base[(h * features + p) * head_dim + n] = static_cast<float>(s[p * (head_dim + 1) + n]);
        base[heads * features * head_dim + h * features + p] = static_cast<float>(s[p * (head_dim + 1) + head_dim]);
      }
    }

  // Pending tokens, 0 to all but one; what lies in the places of those that are not there is not a number.
  const PendingLayout layout(config, c.dtype);
  const std::size_t width = element_bytes(c.dtype), pending_stride = layout.nbytes + 32;
  std::vector<std::byte> pending(c.lazy ? static_cast<std::size_t>(num_slots) * pending_stride : 0, std::byte{0xff});
  std::vector<int> counts(static_cast<std::size_t>(num_slots), 0);
  const auto pending_at = [&](std::vector<std::byte>& data, int slot) {
    return data.data() + static_cast<std::size_t>(slot) * pending_stride;
  };
  for (int slot = 0; c.lazy && slot < num_slots; ++slot) {
    std::byte* data = pending_at(pending, slot);
    const int count = (slot + static_cast<int>(seed)) % kPendingTokens;
    counts[static_cast<std::size_t>(slot)] = count;
    for (std::size_t h = 0; h < heads; ++h) {
      const std::size_t first = h * kPendingTokens, tokens = static_cast<std::size_t>(count);
      for (std::size_t i = 0; i < tokens * f; ++i) write_element(data, first * f + i, normal(random), c.dtype);
      for (std::size_t i = 0; i < tokens * head_dim; ++i)
        write_element(data + layout.values, first * head_dim + i, normal(random), c.dtype);
      std::memcpy(data + layout.counts + 4 * h, &count, 4);
    }
  }
  // Adds the pending tokens of a head to its sums.
  const auto add_pending = [&](std::vector<double>& sums, const std::byte* data, std::size_t h, int count) {
    for (std::size_t j = 0; j < static_cast<std::size_t>(count); ++j) {
      const std::size_t at = h * kPendingTokens + j;
      for (std::size_t i = 0; i < f; ++i) x[i] = read_element(data, at * f + i, c.dtype);
      for (std::size_t n = 0; n < head_dim; ++n)
        value[n] = read_element(data + layout.values, at * head_dim + n, c.dtype);
      feature_map(x.data(), c.f, phi_k.data());
      add_token(sums, phi_k, value);
    }
  };

  const std::size_t out_row = heads * head_dim + 8;
  DeviceArray<std::byte> device_qkv(qkv[0].size()), device_pending(pending),
      out(num_tokens * out_row * element_bytes(c.dtype));
  DeviceArray<float> device_states(states);
  const std::size_t scratch_bytes = based::cuda::linear_attention_scratch(config, c.dtype, batch.device, c.prefix > 0);
  DeviceArray<std::byte> device_encoder(encoder);
  PrefixView prefix;
  prefix.length = c.prefix;
  prefix.is_read = c.prefix > 0;
  prefix.keys_values.q = prefix.keys_values.k = device_encoder.data();
  prefix.keys_values.v = device_encoder.data() + heads * f * element_bytes(c.dtype);
  prefix.keys_values.q_token = prefix.keys_values.k_token = prefix.keys_values.v_token =
      static_cast<std::int64_t>(encoder_row);
  prefix.keys_values.q_head = prefix.keys_values.k_head = c.f;
  prefix.keys_values.v_head = c.head_dim;
  DeviceArray<std::byte> scratch(scratch_bytes + 16);
  QkvView view;
  view.q = device_qkv.data();
  view.k = device_qkv.data() + heads * f * element_bytes(c.dtype);
  view.v = device_qkv.data() + 2 * heads * f * element_bytes(c.dtype);
  view.q_token = view.k_token = view.v_token = static_cast<std::int64_t>(row);
  view.q_head = view.k_head = c.f;
  view.v_head = c.head_dim;
  std::vector<std::vector<std::byte>> outputs[2];  // of each call
  std::vector<float> after[2];
  std::vector<std::byte> pending_after[2];
  for (int run = 0; run < 2; ++run) {
    device_states.upload(states);
    device_pending.upload(pending);
    scratch.fill(0xff);
    for (const auto& call : qkv) {
      device_qkv.upload(call);
      out.fill(0xff);
      based::cuda::linear_attention(nullptr, config, c.dtype, batch.device, view,
                                    {reinterpret_cast<std::byte*>(device_states.data()), stride * sizeof(float)},
                                    c.lazy ? StateView{device_pending.data(), pending_stride} : StateView{}, out.data(),
                                    static_cast<std::int64_t>(out_row), c.head_dim, scratch.data(), prefix);
      require(cudaDeviceSynchronize(), c.name.c_str());
      outputs[run].push_back(out.download());
    }
    after[run] = device_states.download();
    pending_after[run] = device_pending.download();
    const std::vector<std::byte> tail = scratch.download();
    for (std::size_t i = scratch_bytes; i < tail.size(); ++i)
      if (tail[i] != std::byte{0xff}) return std::printf("%-52s wrote behind the scratch\n", c.name.c_str()), false;
  }
  bool good = true;
  if (outputs[0] != outputs[1] || pending_after[0] != pending_after[1] ||
      std::memcmp(after[0].data(), after[1].data(), after[0].size() * sizeof(float)) != 0) {
    std::printf("%-52s is not repeatable\n", c.name.c_str());
    good = false;
  }

  Error output_error, state_error, z_error;
  std::vector<bool> touched(static_cast<std::size_t>(num_slots), false);
  for (int b = 0; b < num_sequences; ++b) {
    const int slot = slots[static_cast<std::size_t>(b)];
    if (slot < 0) continue;
    touched[static_cast<std::size_t>(slot)] = true;
    const float* before = states.data() + static_cast<std::size_t>(slot) * stride;
    const float* now = after[0].data() + static_cast<std::size_t>(slot) * stride;
    const bool single = c.lengths[static_cast<std::size_t>(b)] == 1;
    const int count = counts[static_cast<std::size_t>(slot)];
    const int count_after = c.lazy && single ? (count + c.calls) % kPendingTokens : 0;
    for (std::size_t h = 0; h < heads; ++h) {
      const auto sums_of = [&](const float* data) {
        std::vector<double> sums(features * (head_dim + 1));
        for (std::size_t p = 0; p < features; ++p) {
          for (std::size_t n = 0; n < head_dim; ++n)
            sums[p * (head_dim + 1) + n] = data[(h * features + p) * head_dim + n];
          sums[p * (head_dim + 1) + head_dim] = data[heads * features * head_dim + h * features + p];
        }
        return sums;
      };
      std::vector<double> s = sums_of(before);
      if (c.lazy) add_pending(s, pending_at(pending, slot), h, count);
      std::vector<double> sum(head_dim + 1);
      for (std::size_t call = 0; call < qkv.size(); ++call) {
        for (int i = 0; i < std::min(c.prefix, c.lengths[static_cast<std::size_t>(b)]); ++i) {
          const std::size_t at = static_cast<std::size_t>(batch.offsets[static_cast<std::size_t>(b)] + i) * encoder_row;
          for (std::size_t j = 0; j < f; ++j) x[j] = read_element(encoder.data(), at + h * f + j, c.dtype);
          feature_map(x.data(), c.f, phi_k.data());
          for (std::size_t n = 0; n < head_dim; ++n)
            value[n] = read_element(encoder.data(), at + heads * f + h * head_dim + n, c.dtype);
          add_token(s, phi_k, value);
        }
        for (int token = batch.offsets[static_cast<std::size_t>(b)];
             token < batch.offsets[static_cast<std::size_t>(b) + 1]; ++token) {
          const std::byte* data = qkv[call].data();
          const std::size_t at = static_cast<std::size_t>(token) * row;
          for (std::size_t i = 0; i < f; ++i) x[i] = read_element(data, at + h * f + i, c.dtype);
          feature_map(x.data(), c.f, phi.data());
          for (std::size_t i = 0; i < f; ++i) x[i] = read_element(data, at + (heads + h) * f + i, c.dtype);
          feature_map(x.data(), c.f, phi_k.data());
          for (std::size_t n = 0; n < head_dim; ++n)
            value[n] = read_element(data, at + 2 * heads * f + h * head_dim + n, c.dtype);
          add_token(s, phi_k, value);
          std::fill(sum.begin(), sum.end(), 0.0);
          for (std::size_t p = 0; p < features; ++p)
            for (std::size_t n = 0; n <= head_dim; ++n) sum[n] += phi[p] * s[p * (head_dim + 1) + n];
          for (std::size_t n = 0; n < head_dim; ++n)
            output_error.add(read_element(outputs[0][call].data(),
                                          static_cast<std::size_t>(token) * out_row + h * head_dim + n, c.dtype),
                             sum[n] / (sum[head_dim] + config.eps));
        }
      }
      std::vector<double> found = sums_of(now);
      if (c.lazy) {
        const std::byte* data = pending_at(pending_after[0], slot);
        int found_count;
        std::memcpy(&found_count, data + layout.counts + 4 * h, 4);
        good = good && found_count == count_after;
        if (found_count == count_after) add_pending(found, data, h, count_after);
      }
      for (std::size_t p = 0; p < features; ++p) {
        for (std::size_t n = 0; n < head_dim; ++n)
          state_error.add(found[p * (head_dim + 1) + n], s[p * (head_dim + 1) + n]);
        z_error.add(found[p * (head_dim + 1) + head_dim], s[p * (head_dim + 1) + head_dim]);
      }
    }
    for (std::size_t i = state_floats; i < stride; ++i) good = good && now[i] == kGuard;
    for (std::size_t i = layout.nbytes; c.lazy && i < pending_stride; ++i)
      good = good && pending_at(pending_after[0], slot)[i] == std::byte{0xff};
    // While tokens only wait, no sum is written.
    if (c.lazy && single && c.prefix == 0 && count + c.calls < kPendingTokens)
      good = good && std::memcmp(before, now, state_floats * sizeof(float)) == 0;
  }
  for (int slot = 0; slot < num_slots; ++slot)
    if (!touched[static_cast<std::size_t>(slot)])
      good =
          good &&
          std::memcmp(states.data() + static_cast<std::size_t>(slot) * stride,
                      after[0].data() + static_cast<std::size_t>(slot) * stride, stride * sizeof(float)) == 0 &&
          (!c.lazy || std::memcmp(pending_at(pending, slot), pending_at(pending_after[0], slot), pending_stride) == 0);
  for (const auto& output : outputs[0])
    for (std::size_t token = 0; token < num_tokens; ++token)
      for (std::size_t i = heads * head_dim * width; i < out_row * width; ++i)
        good = good && output[token * out_row * width + i] == std::byte{0xff};
  if (!good) std::printf("%-52s touched what is not its own, or differs when repeated\n", c.name.c_str());
  good = good && output_error.relative() <= c.output_limit && state_error.relative() <= c.state_limit &&
         z_error.relative() <= c.state_limit;
  std::printf("%-52s output %.2e  state %.2e  z %.2e  %s\n", c.name.c_str(), output_error.relative(),
              state_error.relative(), z_error.relative(), good ? "ok" : "FAILED");
  std::fflush(stdout);
  return good;
}

/// quick: without the long sequences. name: only the cases whose names begin so.
int check_all(bool quick, const std::string& name) {
  const DType f32 = DType::float32, b16 = DType::bfloat16, h16 = DType::float16;
  const std::vector<int> ones(9, 1), many(400, 1), mixed{1, 70, 33, 1, 200, 2, 64, 300, 1, 129};
  std::vector<Case> cases{
      {"decode bf16 f16 d112", b16, 4, 16, 112, ones, 256, 0, 5e-3, 1e-5},
      {"decode f32 f16 d64", f32, 3, 16, 64, ones, 256, 0, 1e-5, 1e-5},
      {"decode fp16 f8 d20", h16, 2, 8, 20, ones, 256, 0, 1e-3, 1e-5},
      {"decode f32 f24 d64", f32, 2, 24, 64, ones, 256, 0, 1e-5, 1e-5},
      {"decode f32 f24 d112", f32, 2, 24, 112, ones, 256, 0, 1e-5, 1e-5},
      {"decode f32 f16 d128", f32, 2, 16, 128, ones, 256, 0, 1e-5, 1e-5},
      {"decode f32 f1 d4", f32, 3, 1, 4, ones, 256, 1, 1e-5, 1e-5},
      {"decode f32 f16 d112 among long ones, one skipped", f32, 3, 16, 112, {1, 5, 1, 1, 9, 1}, 256, 0, 1e-5, 1e-5},
      {"decode f32 f5 d7", f32, 3, 5, 7, ones, 256, 3, 1e-5, 1e-5},
      {"decode f32 f48 d6", f32, 1, 48, 6, {1, 1}, 256, 0, 1e-5, 1e-5},
      {"decode f32 f2 d1100", f32, 2, 2, 1100, ones, 256, 0, 1e-5, 1e-5},
      {"decode f32 f3 d257", f32, 1, 3, 257, ones, 256, 0, 1e-5, 1e-5},
      {"decode f32 f16 d112, 9 calls", f32, 2, 16, 112, ones, 256, 0, 1e-5, 1e-5, false, 9},
      {"lazy bf16 f16 d112, 19 calls", b16, 4, 16, 112, ones, 256, 0, 5e-3, 1e-5, true, 19},
      {"lazy f32 f16 d112, 1 call", f32, 2, 16, 112, ones, 256, 0, 1e-5, 1e-5, true, 1},
      {"lazy f32 f16 d64, 19 calls", f32, 3, 16, 64, ones, 256, 0, 1e-5, 1e-5, true, 19},
      {"lazy fp16 f8 d20, 19 calls, unaligned view", h16, 2, 8, 20, ones, 256, 1, 1e-3, 1e-5, true, 19},
      {"lazy f32 f24 d64, 9 calls", f32, 2, 24, 64, ones, 256, 0, 1e-5, 1e-5, true, 9},
      {"lazy f32 f24 d112, 9 calls", f32, 2, 24, 112, ones, 256, 0, 1e-5, 1e-5, true, 9},
      {"lazy bf16 f16 d128, 17 calls", b16, 2, 16, 128, ones, 256, 0, 5e-3, 1e-5, true, 17},
      {"lazy f32 f1 d4, 17 calls", f32, 3, 1, 4, ones, 256, 1, 1e-5, 1e-5, true, 17},
      {"lazy f32 f5 d7, 17 calls", f32, 3, 5, 7, ones, 256, 3, 1e-5, 1e-5, true, 17},
      {"lazy bf16 f5 d7, 17 calls", b16, 3, 5, 7, ones, 256, 3, 5e-3, 1e-5, true, 17},
      {"lazy f32 f48 d6, 9 calls", f32, 1, 48, 6, ones, 256, 0, 1e-5, 1e-5, true, 9},
      {"lazy f32 f2 d1100, 9 calls", f32, 2, 2, 1100, ones, 256, 0, 1e-5, 1e-5, true, 9},
      {"lazy f32 f3 d257, 9 calls", f32, 1, 3, 257, ones, 256, 0, 1e-5, 1e-5, true, 9},
      {"lazy f32 f16 d20 of 400 sequences, 9 calls", f32, 1, 16, 20, many, 256, 0, 1e-5, 1e-5, true, 9},
      {"lazy f32 f6 d9 of 400 sequences, 9 calls", f32, 1, 6, 9, many, 256, 0, 1e-5, 1e-5, true, 9},
      {"lazy among long ones f32 f16 d112, one skipped",
       f32,
       3,
       16,
       112,
       {1, 5, 1, 1, 9, 1},
       256,
       0,
       1e-5,
       1e-5,
       true,
       5},
      {"lazy mixed f32 f16 d112, 3 calls", f32, 2, 16, 112, mixed, 128, 0, 1e-5, 1e-5, true, 3},
      {"lazy mixed f32 f6 d9, 3 calls", f32, 2, 6, 9, mixed, 128, 1, 1e-5, 1e-5, true, 3},
      {"lazy mixed f32 f40 d12, 2 calls", f32, 1, 40, 12, {70, 1, 9}, 128, 0, 1e-5, 1e-5, true, 2},
      {"lazy mixed f32 f2 d300, 2 calls", f32, 2, 2, 300, {70, 1, 9}, 128, 0, 1e-5, 1e-5, true, 2},
      {"prefix of 100 f32 f16 d112, 3 calls", f32, 2, 16, 112, mixed, 128, 0, 1e-5, 1e-5, true, 3, 100},
      {"prefix of 5 f32 f6 d9, 3 calls", f32, 2, 6, 9, mixed, 128, 1, 1e-5, 1e-5, true, 3, 5},
      {"prefix of 1 f32 f16 d20 of 400 sequences", f32, 1, 16, 20, many, 256, 0, 1e-5, 1e-5, true, 1, 1},
      {"prefix of 150 fp16 f16 d64, 2 calls", h16, 2, 16, 64, mixed, 128, 0, 1e-3, 1e-5, true, 2, 150},
      {"prefix of 150 bf16 f16 d64, segments of 64, 2 calls", b16, 2, 16, 64, mixed, 64, 0, 5e-3, 2e-3, true, 2, 150},
      {"prefix of 64 bf16 f16 d112, 2 calls", b16, 2, 16, 112, mixed, 128, 0, 5e-3, 2e-3, true, 2, 64},
      {"prefix of 70 bf16 f24 d64, segments of 64", b16, 2, 24, 64, mixed, 64, 0, 5e-3, 2e-3, true, 1, 70},
      {"prefix of 70 bf16 f8 d40, segments of 64", b16, 2, 8, 40, mixed, 64, 0, 5e-3, 2e-3, true, 1, 70},
      {"prefix of 70 bf16 f16 d64, unaligned view", b16, 2, 16, 64, mixed, 128, 1, 5e-3, 1e-5, true, 1, 70},
      {"lazy chunked bf16 f16 d64, segments of 64, 2 calls", b16, 2, 16, 64, mixed, 64, 0, 5e-3, 2e-3, true, 2},
      {"lazy chunked bf16 f16 d112, segments of 128, 2 calls", b16, 2, 16, 112, mixed, 128, 0, 5e-3, 2e-3, true, 2},
      {"mixed f32 f16 d112", f32, 2, 16, 112, mixed, 128, 0, 1e-5, 1e-5},
      {"mixed fp16 f16 d64", h16, 2, 16, 64, mixed, 128, 0, 1e-3, 1e-5},
      {"mixed f32 f6 d9", f32, 2, 6, 9, mixed, 128, 1, 1e-5, 1e-5},
      {"mixed f32 f40 d12", f32, 1, 40, 12, {70, 1, 9}, 128, 0, 1e-5, 1e-5},
      {"mixed bf16 f16 d64, unaligned view", b16, 2, 16, 64, mixed, 128, 1, 5e-3, 1e-5},
      {"mixed bf16 f16 d20", b16, 2, 16, 20, mixed, 128, 0, 5e-3, 1e-5},
      {"chunked bf16 f16 d64, one segment each", b16, 2, 16, 64, mixed, 512, 0, 5e-3, 2e-3},
      {"chunked bf16 f16 d64, segments of 64", b16, 2, 16, 64, mixed, 64, 0, 5e-3, 2e-3},
      {"chunked bf16 f16 d112, segments of 128", b16, 2, 16, 112, mixed, 128, 0, 5e-3, 2e-3},
      {"chunked bf16 f16 d40", b16, 1, 16, 40, mixed, 128, 0, 5e-3, 2e-3},
      {"chunked bf16 f16 d8", b16, 1, 16, 8, mixed, 128, 0, 5e-3, 2e-3},
      {"chunked bf16 f8 d128", b16, 1, 8, 128, mixed, 128, 0, 5e-3, 2e-3},
      {"chunked bf16 f24 d64", b16, 1, 24, 64, mixed, 128, 0, 5e-3, 2e-3},
      {"chunked bf16 f24 d112, segments of 64", b16, 1, 24, 112, mixed, 64, 0, 5e-3, 2e-3},
      {"chunked bf16 f32 d64, one segment each", b16, 2, 32, 64, mixed, 512, 0, 5e-3, 2e-3},
      {"chunked bf16 f32 d64, segments of 64", b16, 2, 32, 64, mixed, 64, 0, 5e-3, 2e-3},
      {"chunked bf16 f32 d112", b16, 1, 32, 112, mixed, 128, 0, 5e-3, 2e-3},
      {"chunked bf16 f32 d8", b16, 2, 32, 8, mixed, 128, 0, 5e-3, 2e-3},
      {"chunked bf16 f32 d72", b16, 1, 32, 72, mixed, 512, 0, 5e-3, 2e-3},
      {"chunked bf16 f32 d128", b16, 1, 32, 128, mixed, 128, 0, 5e-3, 2e-3},
  };
  if (!quick) {
    cases.push_back({"recurrent f32 f16 d64, 4,096 tokens", f32, 2, 16, 64, {4096, 1000}, 1024, 0, 1e-5, 1e-5});
    cases.push_back({"recurrent f32 f80 d24 (state in device memory)", f32, 1, 80, 24, {40, 1}, 1024, 0, 1e-5, 1e-5});
    cases.push_back({"chunked bf16 f16 d64, 32,768 tokens", b16, 1, 16, 64, {32768}, 2048, 0, 5e-3, 2e-3});
    cases.push_back(
        {"chunked bf16 f16 d64, 32,768 tokens, one segment", b16, 1, 16, 64, {32768}, 32768, 0, 5e-3, 2e-3});
    cases.push_back(
        {"chunked bf16 f16 d112, 8 × 2,000", b16, 4, 16, 112, std::vector<int>(8, 2000), 2048, 0, 5e-3, 2e-3});
    cases.push_back({"chunked bf16 f24 d64, 16,384 tokens", b16, 1, 24, 64, {16384}, 2048, 0, 5e-3, 2e-3});
    cases.push_back({"chunked bf16 f32 d64, 16,384 tokens", b16, 1, 32, 64, {16384}, 2048, 0, 5e-3, 2e-3});
    cases.push_back(
        {"chunked bf16 f32 d64, 16,384 tokens, one segment", b16, 1, 32, 64, {16384}, 16384, 0, 5e-3, 2e-3});
    cases.push_back(
        {"chunked bf16 f32 d112, 8 × 2,000", b16, 1, 32, 112, std::vector<int>(8, 2000), 2048, 0, 5e-3, 2e-3});
  }
  int failures = 0, count = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    if (!cases[i].name.starts_with(name)) continue;
    failures += !run_case(cases[i], static_cast<unsigned>(1000 + i));
    ++count;
  }
  std::printf("%d of %d cases failed\n", failures, count);
  return count == 0 ? 1 : failures;
}

// ---- time ----------------------------------------------------------------------------------------------------------

/// lazy: with room for pending tokens, of which the sequences have different numbers: each call adds the tokens of one
/// sequence in kPendingTokens.
void time_shape(const char* kind, DType dtype, int sequences, int tokens, int heads, int f, int head_dim,
                int segment_tokens, bool lazy = false, int prefix_length = 0) {
  LinearAttentionConfig config;
  config.num_heads = heads;
  config.feature_dim = f;
  config.head_dim = head_dim;
  config.eps = 1e-6;
  std::vector<int> slots(static_cast<std::size_t>(sequences));
  for (int i = 0; i < sequences; ++i) slots[static_cast<std::size_t>(i)] = i;
  Batch batch(std::vector<int>(static_cast<std::size_t>(sequences), tokens), slots, segment_tokens);

  const std::size_t num_tokens = static_cast<std::size_t>(batch.device.num_tokens), bytes = element_bytes(dtype);
  const std::size_t row = static_cast<std::size_t>(heads) * static_cast<std::size_t>(2 * f + head_dim);
  const std::size_t out_row = static_cast<std::size_t>(heads) * static_cast<std::size_t>(head_dim);
  const std::size_t state_floats =
      (static_cast<std::size_t>(heads * (head_dim + 1)) * static_cast<std::size_t>(config.num_features()) + 3) / 4 * 4;
  const std::size_t io_bytes = num_tokens * (row + out_row) * bytes;
  const std::size_t state_bytes = static_cast<std::size_t>(sequences) * state_floats * sizeof(float);
  const PendingLayout layout(config, dtype);
  const double written = lazy ? 1.0 / kPendingTokens : 1;  // of the sums
  const double pending_tokens = lazy ? sequences * ((kPendingTokens - 1) / 2.0 + written * (kPendingTokens - 1)) : 0;
  const std::size_t encoder_row = static_cast<std::size_t>(heads) * static_cast<std::size_t>(f + head_dim);
  const double encoder_bytes =
      static_cast<double>(sequences) * std::min(prefix_length, tokens) * static_cast<double>(encoder_row * bytes);
  const double moved = encoder_bytes + static_cast<double>(io_bytes) +
                       static_cast<double>(state_bytes) * (1 + written) +
                       pending_tokens * heads * (f + head_dim) * static_cast<double>(bytes);
  const double floor_ms = moved / kBandwidth * 1e3;
  const std::size_t copies = std::clamp<std::size_t>(kRotatedBytes / (io_bytes + state_bytes) + 1, 2, 256);

  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<std::byte> host(num_tokens * row * bytes);
  const std::size_t pattern = std::min<std::size_t>(num_tokens * row, 1 << 20);
  for (std::size_t i = 0; i < pattern; ++i) write_element(host.data(), i, normal(random), dtype);
  for (std::size_t i = pattern * bytes; i < host.size(); ++i) host[i] = host[i - pattern * bytes];
  std::vector<DeviceArray<std::byte>*> qkv, out, encoder;
  std::vector<DeviceArray<float>*> states;
  std::vector<DeviceArray<std::byte>*> pending;
  for (std::size_t i = 0; i < copies; ++i) {
    qkv.push_back(new DeviceArray<std::byte>(host));
    encoder.push_back(new DeviceArray<std::byte>(std::vector<std::byte>(
        host.begin(), host.begin() + static_cast<std::ptrdiff_t>(num_tokens * encoder_row * bytes))));
    out.push_back(new DeviceArray<std::byte>(num_tokens * out_row * bytes));
    states.push_back(new DeviceArray<float>(static_cast<std::size_t>(sequences) * state_floats));
    states.back()->fill(0);
    std::vector<std::byte> tokens_of(lazy ? static_cast<std::size_t>(sequences) * layout.nbytes : 0);
    for (std::size_t b = 0; lazy && b < static_cast<std::size_t>(sequences); ++b)
      for (std::size_t h = 0; h < static_cast<std::size_t>(heads); ++h)
        tokens_of[b * layout.nbytes + layout.counts + 4 * h] = static_cast<std::byte>((b + i) % kPendingTokens);
    pending.push_back(new DeviceArray<std::byte>(tokens_of));
  }
  DeviceArray<std::byte> scratch(based::cuda::linear_attention_scratch(config, dtype, batch.device, prefix_length > 0));
  cudaStream_t stream;
  cudaEvent_t begin, end;
  require(cudaStreamCreate(&stream), "cudaStreamCreate");
  require(cudaEventCreate(&begin), "cudaEventCreate");
  require(cudaEventCreate(&end), "cudaEventCreate");
  std::size_t next = 0;
  const auto step = [&] {
    QkvView view;
    std::byte* base = qkv[next]->data();
    view.q = base;
    view.k = base + static_cast<std::size_t>(heads * f) * bytes;
    view.v = base + static_cast<std::size_t>(2 * heads * f) * bytes;
    view.q_token = view.k_token = view.v_token = static_cast<std::int64_t>(row);
    view.q_head = view.k_head = f;
    view.v_head = head_dim;
    PrefixView prefix;
    prefix.length = prefix_length;
    prefix.is_read = prefix_length > 0;
    const std::byte* keys = encoder[next]->data();
    const auto of_encoder = static_cast<std::int64_t>(encoder_row);
    prefix.keys_values = {keys,       keys,       keys + static_cast<std::size_t>(heads * f) * bytes,
                          of_encoder, f,          of_encoder,
                          f,          of_encoder, head_dim};
    based::cuda::linear_attention(stream, config, dtype, batch.device, view,
                                  {reinterpret_cast<std::byte*>(states[next]->data()), state_floats * sizeof(float)},
                                  lazy ? StateView{pending[next]->data(), layout.nbytes} : StateView{},
                                  out[next]->data(), static_cast<std::int64_t>(out_row), head_dim, scratch.data(),
                                  prefix);
    next = (next + 1) % copies;
  };
  for (int i = 0; i < 5; ++i) step();
  const int repeat = floor_ms < 0.02 ? 50 : 5;  // in a row, as in a graph: launches overlap
  std::vector<float> samples;
  for (int i = 0; i < 15; ++i) {
    require(cudaEventRecord(begin, stream), "cudaEventRecord");
    for (int j = 0; j < repeat; ++j) step();
    require(cudaEventRecord(end, stream), "cudaEventRecord");
    require(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    samples.push_back(ms / static_cast<float>(repeat));
  }
  std::sort(samples.begin(), samples.end());
  const double ms = samples[samples.size() / 2];
  std::printf(
      "%-9s %-8s %4d × %5d tokens, %2d heads, f %2d, head_dim %3d, segments of %5d: %8.4f ms, %5.1f %% of 4.0 TB/s\n",
      kind,
      std::string(dtype == DType::float32    ? "float32"
                  : dtype == DType::bfloat16 ? "bfloat16"
                                             : "float16")
          .c_str(),
      sequences, tokens, heads, f, head_dim, segment_tokens, ms, 100.0 * floor_ms / ms);
  std::fflush(stdout);
  for (std::size_t i = 0; i < copies; ++i)
    delete qkv[i], delete out[i], delete states[i], delete pending[i], delete encoder[i];
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
}

void time_all() {
  const DType b16 = DType::bfloat16, f32 = DType::float32;
  for (int sequences : {1, 4, 16, 32, 128, 512, 1024}) time_shape("decode", b16, sequences, 1, 16, 16, 112, 64);
  for (int sequences : {1, 4, 16, 32, 128, 512, 1024}) time_shape("lazy", b16, sequences, 1, 16, 16, 112, 64, true);
  time_shape("lazy", f32, 128, 1, 16, 16, 112, 64, true);
  time_shape("decode", f32, 128, 1, 16, 16, 64, 64);
  time_shape("decode", f32, 1, 1, 16, 16, 64, 64);
  time_shape("prefill", b16, 16, 1024, 16, 16, 64, 1024);
  time_shape("prefill", b16, 16, 4096, 16, 16, 64, 4096);
  time_shape("prefill", b16, 16, 16384, 16, 16, 64, 16384);
  for (int segment : {512, 1024, 2048}) time_shape("prefill", b16, 1, 16384, 16, 16, 64, segment);
  for (int segment : {128, 256, 512}) time_shape("prefill", b16, 1, 2048, 16, 16, 112, segment);
  for (int segment : {512, 1024, 2048}) time_shape("prefill", b16, 4, 8192, 16, 16, 112, segment);
  time_shape("prefill", b16, 8, 2048, 16, 16, 112, 2048);
  time_shape("prefill", b16, 128, 1024, 16, 16, 112, 1024);
  for (int sequences : {1, 16}) time_shape("prefix", b16, sequences, 2048, 16, 16, 64, 4096, true, 1024);
  time_shape("prefix", b16, 128, 1024, 16, 16, 64, 4096, true, 1024);
  time_shape("lazy", b16, 128, 1, 16, 16, 64, 64, true, 0);
  time_shape("prefill", b16, 16, 4096, 16, 8, 64, 4096);
  time_shape("prefill", b16, 16, 4096, 16, 24, 64, 4096);
  time_shape("prefill", b16, 16, 4096, 16, 32, 64, 4096);
  time_shape("prefill", b16, 1, 16384, 16, 32, 64, 1024);
  time_shape("prefill", b16, 8, 2048, 16, 32, 112, 2048);
  time_shape("prefill", f32, 16, 1024, 16, 16, 64, 1024);
  time_shape("prefill", f32, 1, 2048, 16, 16, 112, 2048);
}

}  // namespace

int main(int argc, char** argv) {
  bool check = argc < 2, time = argc < 2, quick = false;
  std::string name;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "check")
      check = true;
    else if (argument == "time")
      time = true;
    else if (argument == "quick")
      quick = true;
    else
      name = argument;
  }
  const int failures = check || quick || !name.empty() ? check_all(quick, name) : 0;
  if (time) time_all();
  return failures > 0;
}
