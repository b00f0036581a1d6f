// Checks embed, norm, convert, gated_conv, scan_conv, selective_scan, gated_delta_net, sliding_window and
// full_attention against float64 on the host, and times them at the shapes of the 1.3B models. Arguments: check, time,
// or none for both; behind check, the one part to check: small (embed, convert, norm), conv, scan, delta, window,
// attention. Ends with 1 when a check fails.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_error.h"
#include "kernels.h"

namespace {

using namespace based;
using namespace based::cuda;

using Floats = std::vector<float>;

int failures = 0;
std::mt19937 generator(1);

// In order with the copies on the legacy stream.
cudaStream_t main_stream() {
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    check(cudaStreamCreate(&made), "stream");
    return made;
  }();
  return stream;
}

float random_float() { return std::uniform_real_distribution<float>(-1.5f, 1.5f)(generator); }

std::size_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
const char* name(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::bfloat16 ? "bfloat16" : "float16";
}

template <typename T>
void store(void* to, std::size_t i, T x) {
  std::memcpy(static_cast<char*>(to) + i * sizeof(T), &x, sizeof(T));
}
template <typename T>
T fetch(const void* from, std::size_t i) {
  T x;
  std::memcpy(&x, static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  return x;
}
void store(DType dtype, void* to, std::size_t i, float x) {
  if (dtype == DType::float32) store(to, i, x);
  if (dtype == DType::bfloat16) store(to, i, __float2bfloat16_rn(x));
  if (dtype == DType::float16) store(to, i, __float2half_rn(x));
}
float fetch(DType dtype, const void* from, std::size_t i) {
  if (dtype == DType::bfloat16) return __bfloat162float(fetch<__nv_bfloat16>(from, i));
  if (dtype == DType::float16) return __half2float(fetch<__half>(from, i));
  return fetch<float>(from, i);
}
float rounded(DType dtype, double x) {
  char place[4]{};
  store(dtype, place, 0, static_cast<float>(x));
  return fetch(dtype, place, 0);
}
// Half a unit in the last place, relative to the smallest value of a binade: 2^-p for p significant bits.
double unit(DType dtype) { return std::ldexp(1, dtype == DType::float32 ? -24 : dtype == DType::bfloat16 ? -8 : -11); }

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t nbytes) : nbytes_(nbytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, std::max<std::size_t>(nbytes, 16)), "cudaMalloc");
    data_ = std::shared_ptr<void>(data, [](void* p) { cudaFree(p); });
    check(cudaMemset(data, 0xff, nbytes), "cudaMemset");  // NaN in every dtype
  }
  template <typename T>
  explicit DeviceMemory(const std::vector<T>& host) : DeviceMemory(host.size() * sizeof(T)) {
    check(cudaMemcpy(data_.get(), host.data(), nbytes_, cudaMemcpyHostToDevice), "upload");
  }
  DeviceMemory(DType dtype, const Floats& host) : DeviceMemory(packed(dtype, host)) {}
  Floats download(DType dtype) const {
    std::vector<char> bytes(nbytes_);
    check(cudaMemcpy(bytes.data(), data_.get(), nbytes_, cudaMemcpyDeviceToHost), "download");
    Floats host(nbytes_ / bytes_of(dtype));
    for (std::size_t i = 0; i < host.size(); ++i) host[i] = fetch(dtype, bytes.data(), i);
    return host;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }

 private:
  static std::vector<char> packed(DType dtype, const Floats& host) {
    std::vector<char> bytes(host.size() * bytes_of(dtype));
    for (std::size_t i = 0; i < host.size(); ++i) store(dtype, bytes.data(), i, host[i]);
    return bytes;
  }
  std::size_t nbytes_;
  std::shared_ptr<void> data_;
};

Floats random_floats(std::size_t n, DType dtype = DType::float32) {
  Floats x(n);
  for (float& value : x) value = rounded(dtype, random_float());
  return x;
}

struct Sequence {
  int length;
  std::int64_t position;
  bool filler = false;  // slot −1
};

// Sequence b has slot first_slot + B − 1 − b.
class Batch {
 public:
  Batch(const std::vector<Sequence>& sequences, int first_slot) : offsets_{0} {
    std::vector<std::int64_t> positions;
    std::vector<std::int32_t> singles, longs;
    std::vector<Tile> tiles;
    const int size = static_cast<int>(sequences.size());
    for (int b = 0; b < size; ++b) {
      const Sequence& s = sequences[static_cast<std::size_t>(b)];
      slots_.push_back(s.filler ? -1 : first_slot + size - 1 - b);
      positions.push_back(s.position);
      (s.length == 1 ? singles : longs).push_back(b);
      for (int t = 0; s.length > 1 && t < s.length; t += kTileTokens)
        tiles.push_back({b, offsets_.back() + t, std::min(kTileTokens, s.length - t)});
      offsets_.push_back(offsets_.back() + s.length);
    }
    view.offsets = keep(offsets_);
    view.slots = keep(slots_);
    view.positions = keep(positions);
    view.num_tokens = offsets_.back();
    view.num_sequences = size;
    if (!longs.empty()) view.singles = keep(singles);
    view.num_singles = static_cast<int>(singles.size());
    view.tiles = keep(tiles);
    view.num_tiles = static_cast<int>(tiles.size());
    view.longs = keep(longs);
    view.num_longs = static_cast<int>(longs.size());
  }
  DeviceBatch view;
  std::int64_t offset(std::size_t b) const { return offsets_[b]; }
  std::int64_t slot(std::size_t b) const { return slots_[b]; }

 private:
  template <typename T>
  T* keep(const std::vector<T>& host) {
    memory_.emplace_back(host);
    return memory_.back().as<T>();
  }
  std::vector<std::int32_t> offsets_, slots_;
  std::vector<DeviceMemory> memory_;
};

// The largest |got − want| / (absolute + relative · |want|); > 1 fails.
class Comparison {
 public:
  explicit Comparison(std::string what) : what_(std::move(what)) {}
  void add(double got, double want, double absolute, double relative) {
    const double allowed = absolute + relative * std::abs(want), error = std::abs(got - want);
    if (got == want || (std::isnan(got) && std::isnan(want))) return;
    worst_ = std::max(worst_, std::isnan(error) ? std::numeric_limits<double>::infinity() : error / allowed);
  }
  ~Comparison() {
    check(cudaDeviceSynchronize(), what_.c_str());
    if (worst_ > 1) ++failures;
    std::printf("%s %-100s worst error / allowed %.3f\n", worst_ > 1 ? "FAIL" : "ok  ", what_.c_str(), worst_);
  }

 private:
  std::string what_;
  double worst_ = 0;
};

const std::vector<DType> kDTypes{DType::float32, DType::bfloat16, DType::float16};

const std::vector<std::vector<Sequence>> kMixes{
    {{1, 0}, {1, 5}, {1, 1000, true}, {1, 128}, {1, 129}, {1, 130}, {1, 1000003}},
    {{300, 0}},
    {{2, 1}, {1, 7}, {64, 40}, {65, 0}, {1, 0}, {3, 500}, {130, 77}, {1, 100000}, {200, 3000000}},
};

// ---- softmax attention ---------------------------------------------------------------------------------------------

std::int64_t rows_of(const SlidingWindowConfig& c, const std::vector<Sequence>&) { return c.window; }

std::int64_t rows_of(const FullAttentionConfig&, const std::vector<Sequence>& sequences) {
  std::int64_t most = 0;
  for (const Sequence& s : sequences) most = std::max(most, s.position + s.length);
  return most;
}

void attend(const SlidingWindowConfig& c, DType dtype, const Batch& batch, const QkvView& qkv, const KeyValueView& ring,
            void* out, std::int64_t out_row, std::int64_t) {
  sliding_window(main_stream(), c, dtype, batch.view, qkv, ring, out, out_row);
}

void attend(const FullAttentionConfig& c, DType dtype, const Batch& batch, const QkvView& qkv, const KeyValueView& ring,
            void* out, std::int64_t out_row, std::int64_t max_keys) {
  const DeviceMemory scratch(full_attention_scratch(c, batch.view, max_keys));
  full_attention(main_stream(), c, dtype, batch.view, qkv, ring, out, out_row, scratch.as<void>(), max_keys);
  check(cudaDeviceSynchronize(), "full_attention");
}

// `piece_shift`: of the keys' and values' memory; 31: they are in one piece.
template <class Config>
void check_attention(const Config& c, DType dtype, const std::vector<Sequence>& sequences, bool aligned,
                     int piece_shift) {
  const Batch batch(sequences, 1);
  const auto size = sequences.size();
  const std::int64_t hd = c.head_dim, kv = c.num_kv_heads, row = (c.num_heads + 2 * kv) * hd + (aligned ? 0 : 1);
  const std::int64_t window = rows_of(c, sequences), n = (c.rotary_dim + 1) / 2;
  const bool in_pieces = piece_shift < 31;
  const std::int64_t piece_rows = in_pieces ? std::int64_t{1} << piece_shift : window;
  const std::int64_t key_size = in_pieces ? (hd + 7) / 8 * 8 : hd;
  const std::int64_t ring_row = kv * key_size + (in_pieces ? 16 : 0), ring = piece_rows * ring_row;
  const std::int64_t piece = in_pieces ? 2 * ring + 32 : 0, num_pieces = (window + piece_rows - 1) / piece_rows;
  const auto key_at = [&](std::int64_t r) { return r / piece_rows * piece + r % piece_rows * ring_row; };
  const std::int64_t slot_elements = in_pieces ? num_pieces * piece : 2 * ring;
  const std::size_t slot_stride = (static_cast<std::size_t>(slot_elements) * bytes_of(dtype) + 31) / 16 * 16;
  const std::int64_t slot_size = static_cast<std::int64_t>(slot_stride / bytes_of(dtype));
  const Floats qkv = random_floats(static_cast<std::size_t>(batch.view.num_tokens * row), dtype);
  Floats states(static_cast<std::size_t>(slot_size) * (size + 1), std::nanf(""));
  for (std::size_t b = 0; b < size; ++b) {
    if (batch.slot(b) < 0) continue;
    for (std::int64_t p = std::max<std::int64_t>(0, sequences[b].position - window); p < sequences[b].position; ++p)
      for (std::int64_t i = 0; i < kv * key_size; ++i)
        for (std::int64_t part : {std::int64_t{0}, ring})
          states[static_cast<std::size_t>(batch.slot(b) * slot_size + part + key_at(p % window) + i)] =
              i % key_size < hd ? rounded(dtype, random_float()) : 0.0f;
  }
  const DeviceMemory device_qkv(dtype, qkv), device_states(dtype, states);
  const std::int64_t out_row = c.num_heads * hd + (aligned ? 8 : 1);
  const DeviceMemory out(static_cast<std::size_t>(batch.view.num_tokens * out_row) * bytes_of(dtype));
  const auto at = [&](std::int64_t element) {
    return device_qkv.as<char>() + static_cast<std::size_t>(element) * bytes_of(dtype);
  };
  const QkvView view{at(0), at(c.num_heads * hd), at((c.num_heads + kv) * hd), row, hd, row, hd, row, hd};
  const KeyValueView keys{{device_states.as<std::byte>(), slot_stride}, key_size, ring_row, ring, piece, piece_shift};
  attend(c, dtype, batch, view, keys, out.as<void>(), out_row, window);
  check(cudaDeviceSynchronize(), "attention");

  const Floats got = out.download(dtype), got_states = device_states.download(dtype);
  const auto rotated = [&](std::int64_t token, std::int64_t element, std::int64_t position) {
    std::vector<double> x(static_cast<std::size_t>(hd));
    const auto in = [&](std::int64_t d) {
      return static_cast<double>(qkv[static_cast<std::size_t>(token * row + element + d)]);
    };
    for (std::int64_t d = 0; d < hd; ++d) x[static_cast<std::size_t>(d)] = in(d);
    for (std::int64_t i = 0; i < n; ++i) {
      const double angle = static_cast<double>(position) *
                           std::pow(c.rotary_base, -2.0 * static_cast<double>(i) / static_cast<double>(c.rotary_dim));
      const std::int64_t one = c.rotary_interleaved ? 2 * i : i, two = c.rotary_interleaved ? 2 * i + 1 : i + n;
      x[static_cast<std::size_t>(one)] = rounded(dtype, in(one) * std::cos(angle) - in(two) * std::sin(angle));
      x[static_cast<std::size_t>(two)] = rounded(dtype, in(one) * std::sin(angle) + in(two) * std::cos(angle));
    }
    return x;
  };
  char what[200];
  std::snprintf(what, sizeof what, "%s %s heads %d/%d dim %d, %d keys, rotary %d%s%s%s, %d sequences",
                Config::kName.data(), name(dtype), static_cast<int>(c.num_heads), static_cast<int>(kv),
                static_cast<int>(hd), static_cast<int>(window), static_cast<int>(c.rotary_dim),
                c.rotary_interleaved ? " interleaved" : "", aligned ? "" : " unaligned", in_pieces ? " in pieces" : "",
                static_cast<int>(size));
  Comparison comparison(what);
  Floats want_states = states;
  for (std::size_t b = 0; b < size; ++b) {
    if (batch.slot(b) < 0) continue;
    const std::int64_t start = sequences[b].position, offset = batch.offset(b);
    const float* state = states.data() + batch.slot(b) * slot_size;
    float* want_state = want_states.data() + batch.slot(b) * slot_size;
    for (std::int64_t h = 0; h < kv; ++h) {
      // Keys and values of positions from `begin` on.
      const std::int64_t begin = std::max<std::int64_t>(0, start - window), end = start + sequences[b].length;
      std::vector<std::vector<double>> keys, values;
      for (std::int64_t p = begin; p < end; ++p) {
        if (p < start) {
          const float* from = state + key_at(p % window) + h * key_size;
          keys.emplace_back(from, from + hd);
          values.emplace_back(from + ring, from + ring + hd);
          continue;
        }
        const std::int64_t token = offset + p - start;
        keys.push_back(rotated(token, (c.num_heads + h) * hd, p));
        const float* from = qkv.data() + token * row + (c.num_heads + kv + h) * hd;
        values.emplace_back(from, from + hd);
        for (std::int64_t d = 0; d < hd; ++d) {
          want_state[key_at(p % window) + h * key_size + d] =
              static_cast<float>(keys.back()[static_cast<std::size_t>(d)]);
          want_state[ring + key_at(p % window) + h * key_size + d] = from[d];
        }
        for (std::int64_t d = hd; d < key_size; ++d)
          want_state[key_at(p % window) + h * key_size + d] = want_state[ring + key_at(p % window) + h * key_size + d] =
              0;
      }
      const std::int64_t group = c.num_heads / kv;
      for (std::int64_t head = h * group; head < (h + 1) * group; ++head) {
        for (std::int64_t p = start; p < end; ++p) {
          const std::int64_t token = offset + p - start;
          const std::vector<double> q = rotated(token, head * hd, p);
          std::vector<double> score, sum(static_cast<std::size_t>(hd)), magnitude(static_cast<std::size_t>(hd));
          double total = 0, greatest = -std::numeric_limits<double>::infinity();
          const std::int64_t first = std::max<std::int64_t>(0, p - window + 1);
          for (std::int64_t j = first; j <= p; ++j) {
            double dot = 0;
            for (std::size_t d = 0; d < q.size(); ++d) dot += q[d] * keys[static_cast<std::size_t>(j - begin)][d];
            score.push_back(dot * c.scale);
            greatest = std::max(greatest, score.back());
          }
          for (std::int64_t j = first; j <= p; ++j) {
            const double weight = std::exp(score[static_cast<std::size_t>(j - first)] - greatest);
            total += weight;
            for (std::size_t d = 0; d < q.size(); ++d) {
              const double value = values[static_cast<std::size_t>(j - begin)][d];
              sum[d] += weight * value;
              magnitude[d] += weight * std::abs(value);
            }
          }
          // Weights in T, the result in T, and a rotated element of q or k that fell to the other side of a tie.
          for (std::size_t d = 0; d < q.size(); ++d)
            comparison.add(got[static_cast<std::size_t>(token * out_row + head * hd) + d], sum[d] / total,
                           (dtype == DType::float32 ? 32 : 2) * unit(dtype) * magnitude[d] / total + 1e-6,
                           1.1 * unit(dtype));
        }
      }
    }
  }
  for (std::size_t i = 0; i < want_states.size(); ++i)
    comparison.add(got_states[i], want_states[i], 8 * unit(DType::float32), 2.1 * unit(dtype));
}

template <class Config>
Config attention_config(int heads, int kv_heads, int head_dim, int rotary, bool interleaved = false) {
  Config c;
  c.num_heads = heads;
  c.num_kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.scale = 1 / std::sqrt(static_cast<double>(head_dim));
  c.rotary_dim = rotary;
  c.rotary_interleaved = interleaved;
  return c;
}

void check_sliding_windows() {
  const auto config = [](int heads, int kv_heads, int head_dim, int window, int rotary, bool interleaved = false) {
    auto c = attention_config<SlidingWindowConfig>(heads, kv_heads, head_dim, rotary, interleaved);
    c.window = window;
    return c;
  };
  for (DType dtype : kDTypes) {
    for (const auto& mix : kMixes) {
      for (const SlidingWindowConfig& c :
           {config(2, 2, 112, 129, 112), config(4, 2, 64, 129, 64, true), config(2, 1, 128, 64, 32),
            config(1, 1, 72, 1, 48), config(2, 2, 8, 17, 0), config(3, 1, 31, 10, 15), config(2, 1, 33, 129, 13, true),
            config(1, 1, 256, 70, 128), config(1, 1, 40, 300, 11, true)})
        check_attention(c, dtype, mix, true, 31);
      check_attention(config(2, 1, 64, 100, 64), dtype, mix, false, 31);
      check_attention(config(2, 1, 64, 300, 64), dtype, mix, true, 6);
      check_attention(config(3, 1, 31, 300, 15), dtype, mix, true, 7);
    }
  }
}

void check_full_attention() {
  const std::vector<std::vector<Sequence>> mixes{
      {{1, 0}, {1, 5}, {1, 1000, true}, {1, 254}, {1, 255}, {1, 256}, {1, 257}, {1, 2000}},
      {{300, 0}},
      {{2, 1}, {1, 7}, {64, 40}, {65, 0}, {1, 0}, {3, 500}, {130, 77}, {1, 1023}, {200, 300}},
      {{129, 127}, {1000, 0}, {128, 128}, {300, 900, true}, {256, 1}, {70, 1913}},
  };
  const auto config = attention_config<FullAttentionConfig>;
  for (DType dtype : kDTypes) {
    for (const auto& mix : mixes) {
      for (const FullAttentionConfig& c :
           {config(2, 2, 112, 112, false), config(4, 2, 64, 64, true), config(16, 4, 128, 32, false),
            config(2, 2, 8, 0, false), config(3, 1, 31, 15, false), config(2, 1, 70, 35, false),
            config(3, 3, 80, 40, false), config(1, 1, 256, 128, false), config(1, 1, 24, 11, true)})
        check_attention(c, dtype, mix, true, 7);
      check_attention(config(2, 1, 64, 64, false), dtype, mix, false, 8);
      check_attention(config(2, 2, 128, 64, false), dtype, mix, true, 31);
    }
  }
  std::vector<Sequence> many(150, Sequence{1, 700});  // several heads of a block, few blocks of a sequence
  many[7].position = 3;
  check_attention(config(16, 16, 64, 64, false), DType::bfloat16, many, true, 7);
}

// ---- convolutions --------------------------------------------------------------------------------------------------

// The gated one, or with `scan` that of a scan, whose biases are null when `num_taps` is odd.
void check_conv(bool scan, std::int64_t e, std::int64_t num_taps, DType dtype, const std::vector<Sequence>& sequences) {
  const Batch batch(sequences, 1);
  const std::int64_t kept = num_taps - 1, tokens = batch.view.num_tokens;
  const std::size_t slot_stride = (static_cast<std::size_t>(kept * e) * bytes_of(dtype) + 31) / 16 * 16;
  const std::int64_t slot_size = static_cast<std::int64_t>(slot_stride / bytes_of(dtype));
  const Floats u = random_floats(static_cast<std::size_t>(tokens * 2 * e), dtype);
  const Floats taps = random_floats(static_cast<std::size_t>(e * num_taps));
  Floats states = random_floats(static_cast<std::size_t>(slot_size) * (sequences.size() + 1), dtype);
  const DeviceMemory device_u(dtype, u), device_taps(taps), device_states(dtype, states);
  const DeviceMemory out(static_cast<std::size_t>(tokens * e) * bytes_of(dtype));
  const bool with_bias = scan && num_taps % 2 == 0;
  const Floats bias = with_bias ? random_floats(static_cast<std::size_t>(e)) : Floats(static_cast<std::size_t>(e));
  const DeviceMemory device_bias(bias);
  const StateView view{device_states.as<std::byte>(), slot_stride};
  if (scan) {
    SelectiveScanConfig config;
    config.inner_size = e;
    config.kernel_size = num_taps;
    scan_conv(main_stream(), config, dtype, device_taps.as<float>(), with_bias ? device_bias.as<float>() : nullptr,
              batch.view, device_u.as<void>(), view, out.as<void>());
  } else {
    GatedConvConfig config;
    config.inner_size = e;
    config.kernel_size = num_taps;
    gated_conv(main_stream(), config, dtype, device_taps.as<float>(), batch.view, device_u.as<void>(), view,
               out.as<void>());
  }
  check(cudaDeviceSynchronize(), "conv");
  const Floats got = out.download(dtype), got_states = device_states.download(dtype);
  char what[100];
  std::snprintf(what, sizeof what, "%s %s channels %d taps %d, %d sequences", scan ? "scan_conv" : "gated_conv",
                name(dtype), static_cast<int>(e), static_cast<int>(num_taps), static_cast<int>(sequences.size()));
  Comparison comparison(what);
  Floats want_states = states;
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    if (batch.slot(b) < 0) continue;
    const float* state = states.data() + batch.slot(b) * slot_size;
    for (std::int64_t channel = 0; channel < e; ++channel) {
      const auto past = [&](std::int64_t index) {
        return index >= 0 ? u[static_cast<std::size_t>((batch.offset(b) + index) * 2 * e + channel)]
                          : state[(kept + index) * e + channel];
      };
      for (std::int64_t t = 0; t < sequences[b].length; ++t) {
        double sum = bias[static_cast<std::size_t>(channel)], magnitude = std::abs(sum);
        for (std::int64_t j = 0; j < num_taps; ++j) {
          const double term = static_cast<double>(taps[static_cast<std::size_t>(channel * num_taps + j)]) *
                              static_cast<double>(past(t - kept + j));
          sum += term;
          magnitude += std::abs(term);
        }
        const std::int64_t token = batch.offset(b) + t;
        const double gate = scan ? 1.0 : static_cast<double>(u[static_cast<std::size_t>(token * 2 * e + e + channel)]);
        comparison.add(got[static_cast<std::size_t>(token * e + channel)], sum / (1 + std::exp(-sum)) * gate,
                       8 * unit(DType::float32) * magnitude * std::abs(gate) + 1e-7,
                       (dtype == DType::float32 ? 16 : 1.1) * unit(dtype));
      }
      for (std::int64_t i = 0; i < kept; ++i)
        want_states[static_cast<std::size_t>(batch.slot(b) * slot_size + i * e + channel)] =
            past(sequences[b].length - kept + i);
    }
  }
  for (std::size_t i = 0; i < want_states.size(); ++i) comparison.add(got_states[i], want_states[i], 0, 0);
}

// ---- selective scan ------------------------------------------------------------------------------------------------

// `slow`: states that last for thousands of tokens. Some channels of many are compared, all of few.
void check_selective_scan(std::int64_t n, std::int64_t e, DType dtype, const std::vector<Sequence>& sequences,
                          bool slow = false, bool aligned = true) {
  const Batch batch(sequences, 1);
  const std::int64_t tokens = batch.view.num_tokens;
  const std::size_t slot_stride = (static_cast<std::size_t>(n * e) * 4 + 31) / 16 * 16, skip = aligned ? 0 : 1;
  const auto slot_size = static_cast<std::int64_t>(slot_stride / 4);
  const auto random = [&](std::int64_t size) { return random_floats(static_cast<std::size_t>(size) + skip, dtype); };
  const Floats xz = random(tokens * 2 * e), x = random(tokens * e), bc = random(tokens * 2 * n);
  Floats dt = random(tokens * e), a = random_floats(static_cast<std::size_t>(n * e));
  for (float& v : dt) v = rounded(dtype, slow ? v - 6 : 3 * v);
  for (std::size_t i = skip; i < std::min<std::size_t>(dt.size(), 2); ++i) dt[i] = i == 0 ? 100.0f : -100.0f;
  for (float& v : a) v = -std::exp(slow ? v - 2 : 2 * v);
  const Floats d = random_floats(static_cast<std::size_t>(e));
  const Floats states = random_floats(static_cast<std::size_t>(slot_size) * (sequences.size() + 1));
  const DeviceMemory device_xz(dtype, xz), device_x(dtype, x), device_bc(dtype, bc), device_dt(dtype, dt);
  const DeviceMemory device_a(a), device_d(d), device_states(states);
  const std::size_t size = bytes_of(dtype);
  const DeviceMemory out((static_cast<std::size_t>(tokens * e) + skip) * size);
  SelectiveScanConfig config;
  config.inner_size = e;
  config.state_size = n;
  const auto at = [&](const DeviceMemory& memory) { return memory.as<char>() + skip * size; };
  selective_scan(
      main_stream(), config, dtype,
      {device_a.as<float>(), device_d.as<float>(), at(device_xz), at(device_x), at(device_bc), at(device_dt)},
      batch.view, {device_states.as<std::byte>(), slot_stride}, at(out));
  check(cudaDeviceSynchronize(), "selective_scan");
  const Floats got = out.download(dtype), got_states = device_states.download(DType::float32);
  char what[120];
  std::snprintf(what, sizeof what, "selective_scan %s N %d channels %d%s%s, %d sequences, %d tokens", name(dtype),
                static_cast<int>(n), static_cast<int>(e), slow ? " slow" : "", aligned ? "" : " unaligned",
                static_cast<int>(sequences.size()), static_cast<int>(tokens));
  Comparison comparison(what);
  // Relative to the magnitude of what is summed: of all tokens that a state holds.
  const double roundings = slow && dtype != DType::float32 ? 5e-4 : 2e-5;
  const std::int64_t stride = std::max<std::int64_t>(1, tokens * e * n / 20'000'000);
  double difference = 0, norm = 0;
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    for (std::int64_t c = 0; c < e; c += stride) {
      std::vector<double> h(static_cast<std::size_t>(n)), sizes(static_cast<std::size_t>(n));
      const auto state_at = [&](std::int64_t i) {
        return static_cast<std::size_t>(batch.slot(b) * slot_size + i * e + c);
      };
      for (std::int64_t t = 0; t < sequences[b].length; ++t) {
        const std::int64_t token = batch.offset(b) + t;
        const auto of = [&](const Floats& matrix, std::int64_t cols, std::int64_t col) {
          return static_cast<double>(matrix[static_cast<std::size_t>(token * cols + col) + skip]);
        };
        const double found = got[static_cast<std::size_t>(token * e + c) + skip];
        if (batch.slot(b) < 0) {
          comparison.add(found, std::nan(""), 0, 0);
          continue;
        }
        const double v = of(dt, e, c), delta = std::max(v, 0.0) + std::log1p(std::exp(-std::abs(v)));
        const double in = of(x, e, c), z = of(xz, 2 * e, e + c), gate = z / (1 + std::exp(-z));
        double y = d[static_cast<std::size_t>(c)] * in, magnitude = std::abs(y);
        for (std::int64_t i = 0; i < n; ++i) {
          const auto k = static_cast<std::size_t>(i);
          if (t == 0) h[k] = states[state_at(i)], sizes[k] = std::abs(h[k]);
          const double decay = std::exp(delta * a[static_cast<std::size_t>(i * e + c)]);
          h[k] = decay * h[k] + delta * of(bc, 2 * n, i) * in;
          sizes[k] = decay * sizes[k] + std::abs(delta * of(bc, 2 * n, i) * in);
          y += of(bc, 2 * n, n + i) * h[k];
          magnitude += std::abs(of(bc, 2 * n, n + i)) * sizes[k];
        }
        comparison.add(found, y * gate, roundings * magnitude * std::abs(gate) + 1e-7,
                       (dtype == DType::float32 ? 16 : 1.1) * unit(dtype));
        difference += std::pow(found - y * gate, 2);
        norm += std::pow(y * gate, 2);
      }
      for (std::int64_t i = 0; batch.slot(b) >= 0 && i < n; ++i)
        comparison.add(got_states[state_at(i)], h[static_cast<std::size_t>(i)],
                       roundings * sizes[static_cast<std::size_t>(i)], 16 * unit(DType::float32));
    }
  }
  for (std::int64_t i = 0; i < slot_size; ++i)  // the slot that belongs to nobody
    comparison.add(got_states[static_cast<std::size_t>(i)], states[static_cast<std::size_t>(i)], 0, 0);
  if (norm > 0) comparison.add(std::sqrt(difference / norm), 0, dtype == DType::float32 ? 2e-5 : unit(dtype), 0);
}

void check_selective_scans() {
  for (DType dtype : kDTypes) {
    for (const auto& mix : kMixes) {
      for (std::int64_t n : {1, 8, 16, 24, 33, 100, 200}) {
        for (std::int64_t e : {1, 33, 64, 1028}) {
          if (n <= 24 || e <= 33) check_selective_scan(n, e, dtype, mix);
        }
      }
      check_selective_scan(16, 64, dtype, mix, false, false);
    }
    for (int length : {1, 2, 63, 64, 65, 1000}) check_selective_scan(16, 4096, dtype, {{length, 0}});
    check_selective_scan(16, 4096, dtype, {{8192, 0}}, false);
    check_selective_scan(16, 4096, dtype, {{8192, 0}}, true);
    check_selective_scan(16, 4096, dtype, {{500, 0}, {1, 4}, {700, 0}, {64, 9, true}, {65, 0}, {1, 1}, {900, 7}}, true);
  }
}

// ---- gated delta net -----------------------------------------------------------------------------------------------

// The convolution, too: qkv is what it made, rounded to T, and the rest is compared with float64 on that.
void check_delta(const GatedDeltaNetConfig& c, DType dtype, const std::vector<Sequence>& sequences, std::int64_t skip) {
  const Batch batch(sequences, 1);
  const std::int64_t heads = c.num_heads, dk = c.key_dim, dv = c.head_dim, channels = c.channels();
  const std::int64_t tokens = batch.view.num_tokens, kept = c.kernel_size - 1;
  const std::int64_t beta_at = channels, decay_at = beta_at + heads, gate_at = c.decay ? decay_at + heads : decay_at;
  const std::int64_t row = gate_at + (c.output_gate ? heads * dv : 0) + skip;
  const std::size_t conv_stride = (static_cast<std::size_t>(kept * channels) * bytes_of(dtype) + 31) / 16 * 16;
  const std::size_t state_stride = (static_cast<std::size_t>(heads * dk * dv) * 4 + 31) / 16 * 16;
  const auto slot_size = static_cast<std::int64_t>(state_stride / 4);
  const Floats u = random_floats(static_cast<std::size_t>(tokens * row), dtype);
  const Floats taps = random_floats(static_cast<std::size_t>(channels * c.kernel_size));
  const Floats norm = random_floats(static_cast<std::size_t>(dv)),
               rates = random_floats(static_cast<std::size_t>(heads)),
               dt_bias = random_floats(static_cast<std::size_t>(heads));
  const Floats past = random_floats(conv_stride / bytes_of(dtype) * (sequences.size() + 1), dtype);
  const Floats states = random_floats(static_cast<std::size_t>(slot_size) * (sequences.size() + 1));
  const DeviceMemory device_u(dtype, u), device_taps(taps), device_norm(norm), device_rates(rates),
      device_dt_bias(dt_bias), device_past(dtype, past), device_states(states);
  const DeviceMemory qkv(static_cast<std::size_t>(tokens * channels) * bytes_of(dtype)),
      out(static_cast<std::size_t>(tokens * heads * dv) * bytes_of(dtype)),
      scratch(gated_delta_net_scratch(c, dtype, batch.view));
  delta_conv(main_stream(), c, dtype, device_taps.as<float>(), batch.view, device_u.as<void>(), row,
             {device_past.as<std::byte>(), conv_stride}, qkv.as<void>());
  gated_delta_net(
      main_stream(), c, dtype,
      {device_norm.as<float>(), device_rates.as<float>(), device_dt_bias.as<float>(), device_u.as<void>(), row},
      qkv.as<void>(), batch.view, {device_states.as<std::byte>(), state_stride}, out.as<void>(), scratch.as<void>());
  check(cudaDeviceSynchronize(), "gated_delta_net");
  const Floats got = out.download(dtype), got_states = device_states.download(DType::float32),
               made = qkv.download(dtype);
  char what[150];
  std::snprintf(what, sizeof what, "gated_delta_net %s %d heads of %d x %d, K %d%s%s%s, %d sequences, %d tokens",
                name(dtype), static_cast<int>(heads), static_cast<int>(dk), static_cast<int>(dv),
                static_cast<int>(c.kernel_size), c.decay ? ", decay" : "", c.output_gate ? ", gate" : "",
                skip > 0 ? ", unaligned" : "", static_cast<int>(sequences.size()), static_cast<int>(tokens));
  Comparison comparison(what);
  // Relative to the root mean square of all: TF32 operands (2⁻¹¹) of 16-bit types, float32's of float32. Of a
  // state, to what it was in all tokens: at the end one of a few numbers may be near 0.
  double difference = 0, size = 0, state_difference = 0, state_size = 0;
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    if (batch.slot(b) < 0) continue;
    for (std::int64_t channel = 0; channel < channels; ++channel)
      for (std::int64_t t = 0; t < sequences[b].length; ++t) {
        double sum = 0, magnitude = 0;
        for (std::int64_t j = 0; j <= kept; ++j) {
          const std::int64_t at = t - kept + j;
          const double x = at >= 0 ? u[static_cast<std::size_t>((batch.offset(b) + at) * row + channel)]
                                   : past[static_cast<std::size_t>(batch.slot(b)) * (conv_stride / bytes_of(dtype)) +
                                          static_cast<std::size_t>((kept + at) * channels + channel)];
          const double term = static_cast<double>(taps[static_cast<std::size_t>(channel * c.kernel_size + j)]) * x;
          sum += term;
          magnitude += std::abs(term);
        }
        comparison.add(made[static_cast<std::size_t>((batch.offset(b) + t) * channels + channel)],
                       sum / (1 + std::exp(-sum)), 8 * unit(DType::float32) * magnitude + 1e-7,
                       (dtype == DType::float32 ? 16 : 1.1) * unit(dtype));
      }
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto state_at = [&](std::int64_t i, std::int64_t j) {
        return static_cast<std::size_t>(batch.slot(b) * slot_size + (h * dk + i) * dv + j);
      };
      std::vector<double> s(static_cast<std::size_t>(dk * dv)), y(static_cast<std::size_t>(dv));
      for (std::int64_t i = 0; i < dk; ++i)
        for (std::int64_t j = 0; j < dv; ++j) s[static_cast<std::size_t>(i * dv + j)] = states[state_at(i, j)];
      for (std::int64_t t = 0; t < sequences[b].length; ++t) {
        const std::int64_t token = batch.offset(b) + t;
        const float* from = made.data() + token * channels;
        const float* in = u.data() + token * row;
        double qq = 1e-6, kk = 1e-6;
        for (std::int64_t i = 0; i < dk; ++i) {
          qq += static_cast<double>(from[h * dk + i]) * from[h * dk + i];
          kk += static_cast<double>(from[(heads + h) * dk + i]) * from[(heads + h) * dk + i];
        }
        const double rq = 1 / std::sqrt(qq * static_cast<double>(dk)), rk = 1 / std::sqrt(kk);
        const double beta = 1 / (1 + std::exp(-static_cast<double>(in[beta_at + h])));
        double alpha = 1;
        if (c.decay) {
          const double x = static_cast<double>(in[decay_at + h]) + dt_bias[static_cast<std::size_t>(h)];
          alpha = std::exp(-std::exp(static_cast<double>(rates[static_cast<std::size_t>(h)])) *
                           (std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)))));
        }
        double mean = 0;
        for (std::int64_t j = 0; j < dv; ++j) {
          double sk = 0, sq = 0;
          for (std::int64_t i = 0; i < dk; ++i)
            sk += alpha * s[static_cast<std::size_t>(i * dv + j)] * from[(heads + h) * dk + i] * rk;
          const double change = beta * (from[2 * heads * dk + h * dv + j] - sk);
          for (std::int64_t i = 0; i < dk; ++i) {
            double& x = s[static_cast<std::size_t>(i * dv + j)];
            x = alpha * x + from[(heads + h) * dk + i] * rk * change;
            sq += x * from[h * dk + i] * rq;
          }
          y[static_cast<std::size_t>(j)] = sq;
          mean += sq * sq / static_cast<double>(dv);
        }
        for (std::int64_t j = 0; j < dv; ++j) {
          double want = y[static_cast<std::size_t>(j)] / std::sqrt(mean + c.eps) * norm[static_cast<std::size_t>(j)];
          if (c.output_gate) {
            const double z = in[gate_at + h * dv + j];
            want *= z / (1 + std::exp(-z));
          }
          difference += std::pow(got[static_cast<std::size_t>((token * heads + h) * dv + j)] - want, 2);
          size += want * want;
        }
        for (const double x : s) state_size += x * x / static_cast<double>(sequences[b].length);
      }
      for (std::int64_t i = 0; i < dk; ++i)
        for (std::int64_t j = 0; j < dv; ++j) {
          const double want = s[static_cast<std::size_t>(i * dv + j)];
          state_difference += std::pow(got_states[state_at(i, j)] - want, 2);
        }
    }
  }
  for (std::int64_t i = 0; i < slot_size; ++i)  // the slot that belongs to nobody
    comparison.add(got_states[static_cast<std::size_t>(i)], states[static_cast<std::size_t>(i)], 0, 0);
  // Keys of one number are all parallel: what a chunk's products lose to rounding adds up instead of averaging out.
  const double parallel = dk == 1 && dtype != DType::float32 ? 4 : 1;
  comparison.add(std::sqrt(difference / size), 0, dtype == DType::float32 ? 2e-5 : 2e-3 * parallel + unit(dtype), 0);
  comparison.add(std::sqrt(state_difference / state_size), 0, dtype == DType::float32 ? 5e-6 : 1e-3 * parallel, 0);
}

void check_deltas() {
  const double eps = 1e-3;
  for (DType dtype : kDTypes) {
    for (const auto& mix : kMixes) {
      for (const GatedDeltaNetConfig& c :
           {GatedDeltaNetConfig{2, 128, 128, 4, eps, true, true}, GatedDeltaNetConfig{3, 64, 32, 3, eps, false, true},
            GatedDeltaNetConfig{2, 21, 19, 1, eps, true, false}, GatedDeltaNetConfig{1, 5, 70, 6, eps, true, true},
            GatedDeltaNetConfig{1, 1, 1, 2, 1.0, false, false}})  // the norm of one number is its sign, but for eps
        check_delta(c, dtype, mix, 0);
      check_delta({2, 32, 48, 4, eps, true, true}, dtype, mix, 1);
    }
    check_delta({1, 256, 512, 4, eps, true, true}, dtype, {{130, 0}, {1, 5}}, 0);
    check_delta({1, 1100, 8, 2, eps, true, true}, dtype, {{70, 0}, {1, 5}}, 0);   // no room for keys: token by token
    check_delta({1, 16, 1100, 2, eps, true, true}, dtype, {{70, 0}, {1, 5}}, 0);  // more columns than threads
    check_delta({1, 16, 1101, 2, eps, true, true}, dtype, {{70, 0}, {1, 5}}, 0);
    check_delta({16, 64, 64, 4, eps, true, true}, dtype, std::vector<Sequence>(20, {100, 0}), 0);  // wide blocks
    check_delta({1, 64, 64, 4, eps, true, true}, dtype, {{8192, 0}}, 0);
  }
}

// ---- norm, embed, convert ------------------------------------------------------------------------------------------

void check_norm(NormKind kind, std::int64_t d, bool with_bias, bool with_rows, DType dtype) {
  const std::int64_t num_rows = 7;
  const std::vector<std::int32_t> rows{6, 0, -1, 3, 3, 5, 1};
  Floats r = random_floats(static_cast<std::size_t>(num_rows * d));
  for (float& x : r) x += 3;  // LayerNorm: a mean to take off
  const Floats weight = random_floats(static_cast<std::size_t>(d)), bias = random_floats(static_cast<std::size_t>(d));
  const DeviceMemory device_r(r), device_weight(weight), device_bias(bias), device_rows(rows);
  const DeviceMemory out(static_cast<std::size_t>(num_rows * d) * bytes_of(dtype));
  const double eps = 1e-5;
  norm(main_stream(), kind, static_cast<float>(eps), device_weight.as<float>(),
       with_bias ? device_bias.as<float>() : nullptr, device_r.as<float>(), d,
       with_rows ? device_rows.as<std::int32_t>() : nullptr, num_rows, dtype, out.as<void>());
  const Floats got = out.download(dtype);
  char what[100];
  std::snprintf(what, sizeof what, "norm %s %s d %d%s%s", kind == NormKind::rms_norm ? "rms" : "layer", name(dtype),
                static_cast<int>(d), with_bias ? " bias" : "", with_rows ? " rows" : "");
  Comparison comparison(what);
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const std::int64_t row = with_rows ? rows[static_cast<std::size_t>(i)] : i;
    const float* x = r.data() + std::max<std::int64_t>(row, 0) * d;
    double mean = 0, squares = 0;
    for (std::int64_t j = 0; kind == NormKind::layer_norm && j < d; ++j) mean += x[j] / static_cast<double>(d);
    for (std::int64_t j = 0; j < d; ++j) squares += (x[j] - mean) * (x[j] - mean) / static_cast<double>(d);
    for (std::int64_t j = 0; j < d; ++j) {
      const auto at = static_cast<std::size_t>(j);
      const double y = (x[j] - mean) / std::sqrt(squares + eps) * weight[at] + (with_bias ? bias[at] : 0.0f);
      comparison.add(got[static_cast<std::size_t>(i * d + j)], row < 0 ? std::nan("") : y, 4e-6, 1.1 * unit(dtype));
    }
  }
}

void check_embed(DType dtype, std::int64_t d) {
  const std::int64_t vocabulary = 50;
  const Floats table = random_floats(static_cast<std::size_t>(vocabulary * d), dtype);
  const DeviceMemory device_table(dtype, table);
  Batch batch({{1, 0}, {1, 0, true}, {1, 0}}, 4);  // slots 6, −1, 4
  const std::vector<std::int32_t> tokens{49, 3, 17}, chosen{9, 9, 9, 9, 31, 9, 44};
  const DeviceMemory device_tokens(tokens), device_chosen(chosen);
  batch.view.tokens = device_tokens.as<std::int32_t>();
  for (bool from_chosen : {false, true}) {
    const DeviceMemory r(static_cast<std::size_t>(3 * d) * sizeof(float));
    embed(main_stream(), dtype, device_table.as<void>(), d, batch.view,
          from_chosen ? device_chosen.as<std::int32_t>() : nullptr, r.as<float>());
    const Floats got = r.download(DType::float32);
    Comparison comparison(std::string("embed ") + name(dtype) + " d " + std::to_string(d));
    const std::vector<std::int32_t> want = from_chosen ? std::vector<std::int32_t>{44, 0, 31} : tokens;
    for (std::int64_t i = 0; i < 3 * d; ++i)
      comparison.add(got[static_cast<std::size_t>(i)],
                     table[static_cast<std::size_t>(want[static_cast<std::size_t>(i / d)] * d + i % d)], 0, 0);
  }
}

void check_convert(DType from, DType to, std::size_t n, std::size_t skip) {
  const Floats x = random_floats(n + skip, from);
  const DeviceMemory source(from, x), target((n + skip + 1) * bytes_of(to));
  convert(main_stream(), from, source.as<char>() + skip * bytes_of(from), to, target.as<char>() + skip * bytes_of(to),
          static_cast<std::int64_t>(n));
  const Floats got = target.download(to);
  Comparison comparison(std::string("convert ") + name(from) + " to " + name(to) + " n " + std::to_string(n));
  for (std::size_t i = 0; i < n; ++i) comparison.add(got[skip + i], rounded(to, x[skip + i]), 0, 0);
  comparison.add(got[skip + n], std::nan(""), 0, 0);
}

void check_small() {
  for (DType dtype : kDTypes) {
    for (std::int64_t d : {1, 31, 64, 1792}) check_embed(dtype, d);
    for (DType to : kDTypes) {
      for (std::size_t n : {1, 1023, 5000}) check_convert(dtype, to, n, n % 2);
    }
    for (NormKind kind : {NormKind::rms_norm, NormKind::layer_norm}) {
      for (std::int64_t d : {1, 33, 64, 1792, 8192, 20000}) {
        check_norm(kind, d, false, true, dtype);
        check_norm(kind, d, true, false, dtype);
      }
    }
  }
}

void check_convs() {
  for (DType dtype : kDTypes) {
    for (const auto& mix : kMixes) {
      for (std::int64_t num_taps : {1, 2, 3, 4, 5, 70}) {
        for (std::int64_t e : {33, 64, 1028}) {
          check_conv(false, e, num_taps, dtype, mix);
          check_conv(true, e, num_taps, dtype, mix);
        }
      }
    }
  }
}

// Parts of the check, by the names that the command line takes.
constexpr std::pair<const char*, void (*)()> kParts[] = {{"small", check_small},
                                                         {"conv", check_convs},
                                                         {"scan", check_selective_scans},
                                                         {"delta", check_deltas},
                                                         {"window", check_sliding_windows},
                                                         {"attention", check_full_attention}};

// ---- times ---------------------------------------------------------------------------------------------------------

constexpr DType kT = DType::bfloat16;
constexpr double kBandwidth = 4250;                            // GB/s that copies reach on an H200
constexpr std::size_t kRotatedBytes = std::size_t{256} << 20;  // several times the L2

// Median time of one call, from a graph of calls on different inputs: call(i, stream).
void report(const std::string& what, double nbytes, int inputs, const std::function<void(int, cudaStream_t)>& call) {
  const cudaStream_t stream = main_stream();
  check(cudaDeviceSynchronize(), "inputs");
  const int calls = std::max(inputs, 16);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < calls; ++i) call(i % inputs, stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  std::vector<float> times;
  for (int repetition = 0; repetition < 15; ++repetition) {
    check(cudaEventRecord(start, stream), "event");
    check(cudaGraphLaunch(executable, stream), "graph");
    check(cudaEventRecord(stop, stream), "event");
    check(cudaEventSynchronize(stop), what.c_str());
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, stop), "event");
    if (repetition >= 3) times.push_back(1000 * milliseconds / static_cast<float>(calls));
  }
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  const double median = times[times.size() / 2];
  std::printf("%-40s %9.2f us %8.0f GB/s; at %.0f GB/s %9.2f us\n", what.c_str(), median, nbytes / median / 1000,
              kBandwidth, nbytes / kBandwidth / 1000);
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

int inputs_for(double nbytes) {
  return std::clamp(static_cast<int>(static_cast<double>(kRotatedBytes) / nbytes), 2, 300);
}

// Small numbers of T without a host copy of gigabytes: one random piece, repeated.
void fill(const DeviceMemory& memory, std::size_t nbytes, DType dtype) {
  const std::size_t piece = std::min<std::size_t>(nbytes, std::size_t{4} << 20);
  const DeviceMemory random(dtype, random_floats(piece / bytes_of(dtype), dtype));
  for (std::size_t at = 0; at < nbytes; at += piece)
    check(cudaMemcpy(memory.as<char>() + at, random.as<char>(), std::min(piece, nbytes - at), cudaMemcpyDeviceToDevice),
          "fill");
}

struct Inputs {
  DeviceMemory memory;
  std::size_t each;
  Inputs(int count, double nbytes, DType dtype)
      : memory((static_cast<std::size_t>(nbytes) + 255) / 256 * 256 * static_cast<std::size_t>(count)),
        each((static_cast<std::size_t>(nbytes) + 255) / 256 * 256) {
    fill(memory, each * static_cast<std::size_t>(count), dtype);
  }
  template <typename T = char>
  T* operator[](int i) const {
    return reinterpret_cast<T*>(memory.as<char>() + static_cast<std::size_t>(i) * each);
  }
};

// `inputs` times as many sequences, each with a slot of its own.
std::vector<Batch> batches_of(int size, int length, int inputs) {
  std::vector<Batch> all;
  for (int i = 0; i < inputs; ++i) {
    std::vector<Sequence> sequences;
    for (int b = 0; b < size; ++b) sequences.push_back({length, 1000 + 7 * b});
    all.emplace_back(sequences, i * size);
  }
  return all;
}

// Of a Mamba: 1.3B has e = 4,096, 360M 2,048; N = 16, K = 4.
void time_scan(int channels, int size, int length) {
  const std::string suffix =
      " " + std::to_string(size) + " x " + std::to_string(length) + " e " + std::to_string(channels);
  const double tokens = static_cast<double>(size) * length, e = channels, n = 16;
  const auto floats = [&](int per_channel) { return random_floats(static_cast<std::size_t>(channels * per_channel)); };
  SelectiveScanConfig config;
  config.inner_size = channels;
  config.state_size = 16;
  config.kernel_size = 4;
  {
    const double state = 3 * e * 2, nbytes = tokens * 2 * e * 2 + 2 * state * size;
    const int inputs = inputs_for(nbytes);
    const Inputs xz(inputs, tokens * 2 * e * 2, kT), x(inputs, tokens * e * 2, kT), states(inputs * size, state, kT);
    const DeviceMemory taps(floats(4)), bias(floats(1));
    const std::vector<Batch> all = batches_of(size, length, inputs);
    report("scan_conv" + suffix, nbytes, inputs, [&](int i, cudaStream_t stream) {
      scan_conv(stream, config, kT, taps.as<float>(), bias.as<float>(), all[static_cast<std::size_t>(i)].view, xz[i],
                {states.memory.as<std::byte>(), states.each}, x[i]);
    });
  }
  {
    const double state = n * e * 4, nbytes = tokens * (4 * e + 2 * n) * 2 + 2 * state * size + (n + 1) * e * 4;
    const int inputs = inputs_for(nbytes);
    const Inputs xz(inputs, tokens * 2 * e * 2, kT), x(inputs, tokens * e * 2, kT), dt(inputs, tokens * e * 2, kT),
        bc(inputs, tokens * 2 * n * 2, kT), out(inputs, tokens * e * 2, kT),
        states(inputs * size, state, DType::float32);
    Floats rates = floats(16);
    for (float& a : rates) a = -std::exp(a);
    const DeviceMemory a(rates), d(floats(1));
    const std::vector<Batch> all = batches_of(size, length, inputs);
    report("selective_scan" + suffix, nbytes, inputs, [&](int i, cudaStream_t stream) {
      selective_scan(stream, config, kT, {a.as<float>(), d.as<float>(), xz[i], x[i], bc[i], dt[i]},
                     all[static_cast<std::size_t>(i)].view, {states.memory.as<std::byte>(), states.each}, out[i]);
    });
    std::printf("%-40s %9.2f us for its exponentials, 16 a clock and SM at 1.75 GHz\n", "",
                tokens * e * (n + 4) / (16 * 1750.0 * device_info().num_sms));
  }
}

// Gated DeltaNet 1.3B of flash-linear-attention has 6 heads of 256 x 512, DeltaNet 16 of 128 x 128, Qwen3-Next 32 of
// those.
void time_delta(int heads, int key_dim, int head_dim, int size, int length) {
  const GatedDeltaNetConfig c{heads, key_dim, head_dim, 4, 1e-5, true, true};
  const double tokens = static_cast<double>(size) * length, channels = static_cast<double>(c.channels());
  const std::int64_t row = c.channels() + 2 * heads + heads * head_dim;
  const double u_bytes = tokens * static_cast<double>(row) * 2, out_bytes = tokens * heads * head_dim * 2;
  const double state = static_cast<double>(heads) * key_dim * head_dim * 4, past = 3 * channels * 2;
  const double nbytes = u_bytes + out_bytes + 2 * (state + past) * size;
  const int inputs = inputs_for(nbytes);
  const Inputs u(inputs, u_bytes, kT), out(inputs, out_bytes, kT), pasts(inputs * size, past, kT),
      states(inputs * size, state, DType::float32);
  const DeviceMemory taps(random_floats(static_cast<std::size_t>(c.channels() * 4))),
      norm(random_floats(static_cast<std::size_t>(head_dim))), rates(random_floats(static_cast<std::size_t>(heads)));
  const std::vector<Batch> all = batches_of(size, length, inputs);
  const DeviceMemory qkv(static_cast<std::size_t>(tokens * channels) * 2),
      scratch(gated_delta_net_scratch(c, kT, all[0].view));
  const std::string what = std::to_string(heads) + " of " + std::to_string(key_dim) + "/" + std::to_string(head_dim) +
                           " " + std::to_string(size) + " x " + std::to_string(length);
  const auto convolve = [&](int i, cudaStream_t stream) {
    delta_conv(stream, c, kT, taps.as<float>(), all[static_cast<std::size_t>(i)].view, u[i], row,
               {pasts.memory.as<std::byte>(), pasts.each}, qkv.as<void>());
  };
  const auto rest = [&](int i, cudaStream_t stream) {
    gated_delta_net(stream, c, kT, {norm.as<float>(), rates.as<float>(), rates.as<float>(), u[i], row}, qkv.as<void>(),
                    all[static_cast<std::size_t>(i)].view, {states.memory.as<std::byte>(), states.each}, out[i],
                    scratch.as<void>());
  };
  report("gated_delta_net " + what, nbytes, inputs, [&](int i, cudaStream_t stream) {
    convolve(i, stream);
    rest(i, stream);
  });
  report("  without its convolution", nbytes, inputs, rest);
  // K Kᵀ, Q Kᵀ, K S, Q S, Kᵀ U and two triangles of 64, a token and head.
  if (length > 1)
    std::printf("    %.0f GFLOP\n",
                tokens * heads * (4.0 * 64 * key_dim + 6.0 * key_dim * head_dim + 4.0 * 64 * head_dim) / 1e9);
}

void time_shape(int size, int length) {
  const std::string suffix = " " + std::to_string(size) + " x " + std::to_string(length);
  const double tokens = static_cast<double>(size) * length;
  {
    const std::int64_t d = 1792;
    const double nbytes = tokens * static_cast<double>(d) * 6;
    const int inputs = inputs_for(nbytes);
    const Inputs r(inputs, tokens * static_cast<double>(d) * 4, DType::float32), out(inputs, tokens * 2 * d, kT);
    const DeviceMemory weight(random_floats(static_cast<std::size_t>(d)));
    report("norm" + suffix, nbytes, inputs, [&](int i, cudaStream_t stream) {
      norm(stream, NormKind::rms_norm, 1e-5f, weight.as<float>(), nullptr, reinterpret_cast<const float*>(r[i]), d,
           nullptr, static_cast<std::int64_t>(tokens), kT, out[i]);
    });
  }
  const auto batches = [&](int inputs) { return batches_of(size, length, inputs); };
  {
    GatedConvConfig config;
    config.inner_size = 3584;
    config.kernel_size = 3;
    const double e = 3584, state = 2 * e * 2;
    const double nbytes = tokens * 3 * e * 2 + 2 * state * size;
    const int inputs = inputs_for(nbytes);
    const Inputs u(inputs, tokens * 2 * e * 2, kT), out(inputs, tokens * e * 2, kT);
    const Inputs states(inputs * size, state, kT);
    const DeviceMemory taps(random_floats(3584 * 3));
    const std::vector<Batch> all = batches(inputs);
    report("gated_conv" + suffix, nbytes, inputs, [&](int i, cudaStream_t stream) {
      gated_conv(stream, config, kT, taps.as<float>(), all[static_cast<std::size_t>(i)].view, u[i],
                 {states.memory.as<std::byte>(), states.each}, out[i]);
    });
  }
  {
    SlidingWindowConfig config;
    config.num_heads = config.num_kv_heads = 16;
    config.head_dim = config.rotary_dim = 112;
    config.window = 129;
    config.scale = 1 / std::sqrt(112.0);
    const double d = 1792, state = 2 * 129 * d * 2;
    const double nbytes = tokens * 4 * d * 2 + state * size + (length > 1 ? tokens * 4 * d * 2 : 0);
    const int inputs = inputs_for(nbytes);
    const Inputs qkv(inputs, tokens * 3 * d * 2, kT), out(inputs, tokens * d * 2, kT), states(inputs * size, state, kT);
    const std::vector<Batch> all = batches(inputs);
    report("sliding_window" + suffix, nbytes, inputs, [&](int i, cudaStream_t stream) {
      const std::int64_t row = 3 * 1792;
      const char* q = qkv[i];
      sliding_window(stream, config, kT, all[static_cast<std::size_t>(i)].view,
                     {q, q + 1792 * 2, q + 2 * 1792 * 2, row, 112, row, 112, row, 112},
                     contiguous_ring(config, {states.memory.as<std::byte>(), states.each}), out[i], 1792);
    });
  }
}

// Attention over contexts of so many keys, the call's included.
void time_full_attention(int heads, int head_dim, int size, int length, int keys) {
  constexpr std::int64_t kShift = 7, kPieceRows = 1 << kShift;
  const std::int64_t row = heads * head_dim, key_size = (head_dim + 7) / 8 * 8, key_row = heads * key_size;
  const auto config = attention_config<FullAttentionConfig>(heads, heads, head_dim, head_dim);
  const double tokens = static_cast<double>(size) * length;
  const std::int64_t pieces = (keys + kPieceRows - 1) / kPieceRows;
  const double context = static_cast<double>(pieces * 2 * key_row * kPieceRows * 2), d = static_cast<double>(row);
  const double nbytes = static_cast<double>(size) * keys * 2 * d * 2 + tokens * 4 * d * 2;
  const int inputs = inputs_for(nbytes);
  const Inputs qkv(inputs, tokens * 3 * d * 2, kT), out(inputs, tokens * d * 2, kT);
  const Inputs contexts(inputs * size, context, kT);
  std::vector<Batch> batches;
  for (int i = 0; i < inputs; ++i)
    batches.emplace_back(std::vector<Sequence>(static_cast<std::size_t>(size), Sequence{length, keys - length}),
                         i * size);
  const DeviceMemory scratch(full_attention_scratch(config, batches[0].view, keys));
  const std::string what = "full_attention " + std::to_string(heads) + " of " + std::to_string(head_dim) + ", " +
                           std::to_string(size) + " x " + std::to_string(length) + " of " + std::to_string(keys) +
                           " keys";
  report(what, nbytes, inputs, [&](int i, cudaStream_t stream) {
    const char* q = qkv[i];
    full_attention(stream, config, kT, batches[static_cast<std::size_t>(i)].view,
                   {q, q + row * 2, q + 2 * row * 2, 3 * row, head_dim, 3 * row, head_dim, 3 * row, head_dim},
                   {{contexts.memory.as<std::byte>(), contexts.each},
                    key_size,
                    key_row,
                    key_row * kPieceRows,
                    2 * key_row * kPieceRows,
                    static_cast<int>(kShift)},
                   out[i], row, scratch.as<void>(), keys);
  });
  const double pairs = static_cast<double>(length) * (2.0 * keys - length + 1) / 2;
  if (length > 1)
    std::printf("    %.0f GFLOP of products with keys and values\n", static_cast<double>(size) * pairs * 4 * d / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "", only = argc > 2 ? argv[2] : "";
  const bool known = only.empty() || std::any_of(std::begin(kParts), std::end(kParts),
                                                 [&](const auto& part) { return only == part.first; });
  if (!known || (!what.empty() && what != "check" && what != "time")) {
    std::fprintf(stderr, "usage: bench_mixers [check [small|conv|scan|delta|window|attention] | time]\n");
    return 2;
  }
  for (const auto& [name, check_part] : kParts)
    if (what != "time" && (only.empty() || only == name)) check_part();
  if (what != "check") {
    for (int size : {1, 128, 1024}) time_shape(size, 1);
    time_shape(1, 8192);
    time_shape(32, 256);
    for (const auto& [heads, head_dim] : {std::pair(16, 128), {24, 70}, {16, 64}}) {
      time_full_attention(heads, head_dim, 1, 1, 1024);
      time_full_attention(heads, head_dim, 1, 1, 65'536);
      time_full_attention(heads, head_dim, 128, 1, 1536);
      time_full_attention(heads, head_dim, 1, 8192, 8192);
      time_full_attention(heads, head_dim, 2, 4096, 4096);
    }
    for (int size : {1, 128, 1024}) time_scan(4096, size, 1);
    for (int size : {1, 2, 4, 8}) time_scan(4096, size, 2048);
    for (int channels : {1536, 2048, 4096}) time_scan(channels, 1, 8192);
    for (const auto& [heads, key_dim, head_dim] : {std::tuple(16, 128, 128), {6, 256, 512}}) {
      for (int size : {1, 128, 1024}) time_delta(heads, key_dim, head_dim, size, 1);
      time_delta(heads, key_dim, head_dim, 1, 8192);
      time_delta(heads, key_dim, head_dim, 8, 2048);
    }
  }
  if (failures > 0) std::printf("%d checks failed\n", failures);
  return failures > 0 ? 1 : 0;
}
