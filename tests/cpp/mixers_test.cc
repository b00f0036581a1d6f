// Operations of a block on the CPU against plain double-precision references, and the laws: what a sequence yields
// does not depend on its neighbours, on the number of threads, nor (where that is promised) on how it is cut.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_states.h"
#include "backend/cpu/kernels/linear_attention.h"

namespace based::cpu {
namespace {

using backend::Matrix;
using backend::RaggedBatch;

std::vector<float> random_floats(std::size_t size, std::uint64_t seed, double sd = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, sd);
  std::vector<float> x(size);
  for (float& xi : x) xi = static_cast<float>(normal(random));
  return x;
}

double relative_error(const std::vector<float>& x, const std::vector<double>& expected) {
  EXPECT_EQ(x.size(), expected.size());
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    error += (x[i] - expected[i]) * (x[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

// rel-L2. φ(q)·φ(k) of f = 64 cancels to about 1/64 of its terms: the others stay below 1e-6.
constexpr double kTolerance = 3e-6;

CpuBackend make_cpu(Isa isa, int threads = 2) { return {std::make_shared<ThreadPool>(threads), isa}; }

using Parameters = std::map<std::string_view, std::vector<float>>;

// Columns [begin, begin + cols) of a float32 matrix, dense.
struct Columns {
  std::vector<float> values;
  std::int64_t rows, cols;

  Columns(const Matrix& from, std::int64_t begin, std::int64_t count) : rows(from.rows), cols(count) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const float* row = static_cast<const float*>(from.data) + i * from.cols + begin;
      values.insert(values.end(), row, row + cols);
    }
  }
  Matrix matrix() { return {values.data(), DType::float32, rows, cols}; }
};

// One mixer layer, seen from outside: a sequence of input rows to a sequence of output rows. An input row is what the
// projections make, those of the description but the last one side by side.
struct Mixer {
  MixerConfig config;
  Parameters parameters;  // of the description, drawn from N(0, 0.5)

  explicit Mixer(MixerConfig mixer) : config(std::move(mixer)) {
    std::uint64_t seed = 77;
    for (const Parameter& p : mixer_parameters(config))
      parameters[p.name] = random_floats(static_cast<std::size_t>(num_elements(p.shape)), seed++, 0.5);
    if (const auto* h3 = std::get_if<H3Config>(&config)) {
      const std::int64_t numbers = 2 * h3->num_heads * h3->num_modes;
      parameters["taps"] = random_floats(static_cast<std::size_t>(h3->channels() * h3->kernel_size), seed++, 0.5);
      parameters["weight"] = random_floats(static_cast<std::size_t>(numbers), seed++, 0.5);
      parameters["decay"] = random_floats(static_cast<std::size_t>(numbers), seed++, 0.3);
      for (float& a : parameters["decay"]) a = std::clamp(a, -0.7f, 0.7f);  // |a| < 1
    }
    if (const auto* hyena = std::get_if<HyenaConfig>(&config))
      parameters["table"] = random_floats(static_cast<std::size_t>(hyena->max_length * hyena->inner_size), seed++, 0.5);
  }

  // Null where the mixer has none of this name.
  static const float* find(const Parameters& parameters, std::string_view name) {
    const auto it = parameters.find(name);
    return it == parameters.end() ? nullptr : it->second.data();
  }

  std::int64_t input_width() const {
    std::int64_t rows = -1;  // the output projection's, of hidden size 1
    for (const Projection& p : mixer_projections(config, 1)) rows += p.rows;
    return rows;
  }
  std::int64_t output_width() const { return mixer_projections(config, 1).back().cols; }
  std::unique_ptr<backend::StatePool> states(CpuBackend& cpu, DType ring, int capacity) const {
    ModelConfig model;
    model.layers = {config};
    return cpu.make_states(model, ring, capacity);
  }
  void run(CpuBackend& cpu, const RaggedBatch& batch, const Matrix& in, backend::StatePool& states,
           const Matrix& out) const {
    struct Run {
      CpuBackend& cpu;
      const Parameters& parameters;
      const RaggedBatch& batch;
      const Matrix& in;
      backend::StatePool& states;
      const Matrix& out;
      const float* find(std::string_view name) const { return Mixer::find(parameters, name); }
      void operator()(const GatedConvConfig& c) const {
        cpu.gated_conv(c, find("conv.weight"), batch, in, states, 0, out);
      }
      void operator()(const LinearAttentionConfig& c) const { cpu.linear_attention(c, batch, in, states, 0, out); }
      void operator()(const SlidingWindowConfig& c) const { cpu.sliding_window(c, batch, in, states, 0, out); }
      void operator()(const FullAttentionConfig& c) const { cpu.full_attention(c, batch, in, states, 0, out); }
      // [x|z|δ|B|C|Δ]: the scan's inputs need not be projections of what the convolution makes of x.
      void operator()(const SelectiveScanConfig& c) const {
        const std::int64_t e = c.inner_size, bc = 2 * e + c.dt_rank, dt = bc + 2 * c.state_size;
        Columns xz(in, 0, 2 * e), x(in, 0, e), b_and_c(in, bc, 2 * c.state_size), steps(in, dt, e);
        const std::vector<float>& log = parameters.at("A_log");
        std::vector<float> a(log.size());
        for (std::int64_t i = 0; i < e; ++i)
          for (std::int64_t n = 0; n < c.state_size; ++n) a[n * e + i] = -std::exp(log[i * c.state_size + n]);
        cpu.scan_conv(c, find("conv.weight"), find("conv.bias"), batch, xz.matrix(), states, 0, x.matrix());
        cpu.selective_scan(c, {a.data(), find("D"), xz.matrix(), x.matrix(), b_and_c.matrix(), steps.matrix()}, batch,
                           states, 0, out);
      }
      void operator()(const PrefixLinearAttentionConfig& c) const {
        const std::int64_t cols = c.num_heads * (2 * c.feature_dim + c.head_dim);
        Columns qkv(in, 0, cols), encoder(in, cols, in.cols - cols);
        cpu.prefix_linear_attention(c, batch, qkv.matrix(), encoder.matrix(), states, 0, out);
      }
      void operator()(const GatedDeltaNetConfig& c) const {
        cpu.gated_delta_net(c, {find("conv.weight"), find("norm.weight"), find("A_log"), find("dt_bias")}, batch, in,
                            states, 0, out);
      }
      // [x|v|r]: what the shift makes of x takes the place of the three projections.
      void operator()(const Rwkv4Config& c) const {
        Columns x(in, 0, c.inner_size), k(x), v(x), r(x);
        std::vector<float> decay = parameters.at("time_decay");
        for (float& log : decay) log = -std::exp(log);
        cpu.rwkv4_shift(c, {find("time_mix_k"), find("time_mix_v"), find("time_mix_r")}, batch, x.matrix(), states, 0,
                        {k.matrix(), v.matrix(), r.matrix()});
        cpu.rwkv4(c, {decay.data(), find("time_first"), k.matrix(), v.matrix(), r.matrix()}, batch, states, 0, out);
      }
      // Their weights are what the model makes of the parameters: here the parameters are called and shaped like them.
      void operator()(const H3Config& c) const {
        cpu.h3(c, {find("taps"), find("decay"), find("weight"), find("D")}, batch, in, states, 0, out);
      }
      void operator()(const HyenaConfig& c) const {
        cpu.hyena(c, {find("conv.weight"), find("conv.bias"), find("table"), find("filter.D")}, batch, in, states, 0,
                  out);
      }
      void operator()(const Mamba2Config& c) const {
        std::vector<float> xbc(static_cast<std::size_t>(in.rows * c.channels()));
        cpu.mamba2(c,
                   {find("conv.weight"),
                    find("conv.bias"),
                    find("norm.weight"),
                    find("A_log"),
                    find("D"),
                    find("dt_bias"),
                    in,
                    {xbc.data(), DType::float32, in.rows, c.channels()}},
                   batch, states, 0, out);
      }
      // [q|k|v|g|W₁ u|a]: the decays' inputs need not be a product of the columns before them.
      void operator()(const GatedLinearAttentionConfig& c) const {
        const std::int64_t cols = 2 * c.num_heads * (c.key_dim + c.head_dim), a = c.num_heads * c.key_dim;
        Columns u(in, 0, cols), decays(in, cols + c.gate_rank, a);
        cpu.gated_linear_attention(c, find("norm.weight"), batch, u.matrix(), decays.matrix(), states, 0, out);
      }
      // [x|…]: what the shift makes of x takes the place of the projections, and of those to and from low ranks.
      void operator()(const Rwkv7Config& c) const {
        Columns x(in, 0, c.hidden_size), r(x), w(x), k(x), v(x), a(x), g(x);
        cpu.rwkv7_shift(c, {find("mix_r"), find("mix_w"), find("mix_k"), find("mix_v"), find("mix_a"), find("mix_g")},
                        batch, x.matrix(), states, 0,
                        {r.matrix(), w.matrix(), k.matrix(), v.matrix(), a.matrix(), g.matrix()});
        cpu.rwkv7_low_rank(c, w.matrix(), g.matrix());
        cpu.rwkv7(c,
                  {find("k_k"), find("k_a"), find("r_k"), find("norm.weight"), find("norm.bias"), r.matrix(),
                   k.matrix(), v.matrix(), w.matrix(), a.matrix(), g.matrix()},
                  batch, states, 0, out);
      }
    };
    std::visit(Run{cpu, parameters, batch, in, states, out}, config);
  }
  // Input of one sequence.
  std::vector<float> input(std::int64_t tokens, std::uint64_t seed) const {
    return random_floats(static_cast<std::size_t>(tokens * input_width()), seed);
  }
};

// A part of a sequence, to be fed in one call.
struct Piece {
  const float* in;
  std::int64_t tokens;
  int slot;
  std::int64_t position;
};

// Feeds the pieces in one call. Returns each one's output.
std::vector<std::vector<float>> feed(const Mixer& mixer, CpuBackend& cpu, backend::StatePool& states,
                                     const std::vector<Piece>& pieces, DType dtype = DType::float32) {
  std::vector<std::int32_t> tokens, offsets{0}, slots;
  std::vector<std::int64_t> positions;
  std::vector<float> in;
  for (const Piece& piece : pieces) {
    tokens.insert(tokens.end(), static_cast<std::size_t>(piece.tokens), 0);
    offsets.push_back(static_cast<std::int32_t>(tokens.size()));
    slots.push_back(piece.slot);
    positions.push_back(piece.position);
    in.insert(in.end(), piece.in, piece.in + piece.tokens * mixer.input_width());
  }
  std::vector<std::int64_t> ends;
  for (const Piece& piece : pieces) ends.push_back(piece.position + piece.tokens);
  cpu.reserve_states(states, slots, ends);
  const auto rows = static_cast<std::int64_t>(tokens.size());
  std::vector<float> out(static_cast<std::size_t>(rows * mixer.output_width()), std::nanf(""));
  std::vector<std::uint16_t> out16(out.size(), 0x7fc0);
  const bool bf16 = dtype == DType::bfloat16;
  mixer.run(cpu, {tokens, offsets, slots, positions}, {in.data(), DType::float32, rows, mixer.input_width()}, states,
            {bf16 ? static_cast<void*>(out16.data()) : out.data(), dtype, rows, mixer.output_width()});
  if (bf16) std::transform(out16.begin(), out16.end(), out.begin(), float_from_bf16);
  std::vector<std::vector<float>> results;
  for (std::size_t b = 0; b < pieces.size(); ++b)
    results.emplace_back(out.begin() + offsets[b] * mixer.output_width(),
                         out.begin() + offsets[b + 1] * mixer.output_width());
  return results;
}

// One sequence, in calls of the given numbers of tokens.
std::vector<float> feed_cut(const Mixer& mixer, CpuBackend& cpu, const std::vector<float>& in,
                            const std::vector<std::int64_t>& cuts, DType ring = DType::float32) {
  const auto states = mixer.states(cpu, ring, 1);
  std::vector<float> out;
  std::int64_t position = 0;
  for (std::int64_t tokens : cuts) {
    const auto part = feed(mixer, cpu, *states, {{in.data() + position * mixer.input_width(), tokens, 0, position}});
    out.insert(out.end(), part[0].begin(), part[0].end());
    position += tokens;
  }
  EXPECT_EQ(position * mixer.input_width(), static_cast<std::int64_t>(in.size()));
  return out;
}

// ---- references -----------------------------------------------------------------------------------------------------

std::vector<double> reference(const GatedConvConfig& c, const Parameters& parameters, const std::vector<float>& u,
                              std::int64_t) {
  const float* taps = Mixer::find(parameters, "conv.weight");
  const std::int64_t e = c.inner_size, k = c.kernel_size, tokens = static_cast<std::int64_t>(u.size()) / (2 * e);
  std::vector<double> out;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t i = 0; i < e; ++i) {
      double sum = 0;
      for (std::int64_t j = 0; j < k; ++j)
        if (t - k + 1 + j >= 0) sum += double{taps[i * k + j]} * u[(t - k + 1 + j) * 2 * e + i];
      out.push_back(sum / (1 + std::exp(-sum)) * u[t * 2 * e + e + i]);
    }
  }
  return out;
}

std::vector<double> reference(const LinearAttentionConfig& c, const Parameters&, const std::vector<float>& qkv,
                              std::int64_t) {
  const std::int64_t H = c.num_heads, f = c.feature_dim, dv = c.head_dim, width = H * (2 * f + dv);
  const std::int64_t tokens = static_cast<std::int64_t>(qkv.size()) / width;
  std::vector<double> out(static_cast<std::size_t>(tokens * H * dv));
  for (std::int64_t h = 0; h < H; ++h) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      double denominator = c.eps;
      std::vector<double> numerator(static_cast<std::size_t>(dv));
      for (std::int64_t j = 0; j <= t; ++j) {
        double s = 0;
        for (std::int64_t i = 0; i < f; ++i) s += double{qkv[t * width + h * f + i]} * qkv[j * width + (H + h) * f + i];
        s /= std::sqrt(static_cast<double>(f));
        const double p = 1 + s + s * s / 2;
        denominator += p;
        for (std::int64_t i = 0; i < dv; ++i) numerator[i] += p * qkv[j * width + 2 * H * f + h * dv + i];
      }
      for (std::int64_t i = 0; i < dv; ++i) out[(t * H + h) * dv + i] = numerator[i] / denominator;
    }
  }
  return out;
}

// Sums over all keys, each with its value: first those of the prefix, then those of the tokens up to t.
std::vector<double> reference(const PrefixLinearAttentionConfig& c, const Parameters&, const std::vector<float>& in,
                              std::int64_t start) {
  const std::int64_t H = c.num_heads, f = c.feature_dim, dv = c.head_dim, width = H * (3 * f + 2 * dv);
  const std::int64_t tokens = static_cast<std::int64_t>(in.size()) / width;
  const std::int64_t prefix = start == 0 ? std::min(c.enc_length, tokens) : 0;
  std::vector<double> out;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < H; ++h) {
      double denominator = c.eps;
      std::vector<double> numerator(static_cast<std::size_t>(dv));
      const auto add = [&](const float* k, const float* v) {
        double s = 0;
        for (std::int64_t i = 0; i < f; ++i) s += double{in[t * width + h * f + i]} * k[i];
        s /= std::sqrt(static_cast<double>(f));
        const double p = 1 + s + s * s / 2;
        denominator += p;
        for (std::int64_t i = 0; i < dv; ++i) numerator[i] += p * v[i];
      };
      for (std::int64_t m = 0; m < prefix; ++m) {
        const float* encoder = in.data() + m * width + H * (2 * f + dv);
        add(encoder + h * f, encoder + H * f + h * dv);
      }
      for (std::int64_t j = 0; j <= t; ++j) {
        const float* x = in.data() + j * width;
        add(x + (H + h) * f, x + 2 * H * f + h * dv);
      }
      for (std::int64_t i = 0; i < dv; ++i) out.push_back(numerator[i] / denominator);
    }
  }
  return out;
}

// The first token stands at `start`; what the ring holds before is zeros.
template <class Config>
std::vector<double> softmax_reference(const Config& c, std::int64_t window, const std::vector<float>& qkv,
                                      std::int64_t start) {
  const std::int64_t H = c.num_heads, Hkv = c.num_kv_heads, hd = c.head_dim, width = (H + 2 * Hkv) * hd;
  const std::int64_t tokens = static_cast<std::int64_t>(qkv.size()) / width;
  const auto rotated = [&](std::int64_t t, std::int64_t head) {
    const float* x = qkv.data() + t * width + head * hd;
    std::vector<double> y(x, x + hd);
    const std::int64_t n = (c.rotary_dim + 1) / 2;
    for (std::int64_t i = 0; i < n; ++i) {
      const double angle = static_cast<double>(start + t) * std::pow(c.rotary_base, -2.0 * i / c.rotary_dim);
      const std::int64_t a = c.rotary_interleaved ? 2 * i : i, b = c.rotary_interleaved ? 2 * i + 1 : i + n;
      y[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
      y[b] = x[a] * std::sin(angle) + x[b] * std::cos(angle);
    }
    return y;
  };
  std::vector<double> out(static_cast<std::size_t>(tokens * H * hd));
  for (std::int64_t h = 0; h < H; ++h) {
    const std::int64_t kv = h / (H / Hkv);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto q = rotated(t, h);
      double denominator = 0;
      std::vector<double> numerator(static_cast<std::size_t>(hd));
      for (std::int64_t p = std::max<std::int64_t>(0, start + t - window + 1); p <= start + t; ++p) {
        if (p < start) {
          denominator += 1;
          continue;
        }
        const auto k = rotated(p - start, H + kv);
        double s = 0;
        for (std::int64_t i = 0; i < hd; ++i) s += q[i] * k[i];
        const double e = std::exp(c.scale * s);
        denominator += e;
        for (std::int64_t i = 0; i < hd; ++i) numerator[i] += e * qkv[(p - start) * width + (H + Hkv + kv) * hd + i];
      }
      for (std::int64_t i = 0; i < hd; ++i) out[(t * H + h) * hd + i] = numerator[i] / denominator;
    }
  }
  return out;
}

std::vector<double> reference(const SlidingWindowConfig& c, const Parameters&, const std::vector<float>& qkv,
                              std::int64_t start) {
  return softmax_reference(c, c.window, qkv, start);
}

std::vector<double> reference(const FullAttentionConfig& c, const Parameters&, const std::vector<float>& qkv,
                              std::int64_t start) {
  return softmax_reference(c, limits::kSize, qkv, start);
}

std::vector<double> reference(const SelectiveScanConfig& c, const Parameters& parameters, const std::vector<float>& in,
                              std::int64_t) {
  const std::int64_t e = c.inner_size, size = c.state_size, k = c.kernel_size, width = 3 * e + c.dt_rank + 2 * size;
  const std::int64_t tokens = static_cast<std::int64_t>(in.size()) / width;
  const float *taps = Mixer::find(parameters, "conv.weight"), *bias = Mixer::find(parameters, "conv.bias");
  const float *log = Mixer::find(parameters, "A_log"), *d = Mixer::find(parameters, "D");
  const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
  std::vector<double> out, h(static_cast<std::size_t>(e * size));
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float *row = in.data() + t * width, *b = row + 2 * e + c.dt_rank, *dt = b + 2 * size;
    for (std::int64_t i = 0; i < e; ++i) {
      double x = bias == nullptr ? 0 : bias[i];
      for (std::int64_t j = 0; j < k; ++j)
        if (t - k + 1 + j >= 0) x += double{taps[i * k + j]} * in[(t - k + 1 + j) * width + i];
      x = silu(x);
      const double delta = dt[i] > 20 ? dt[i] : std::log1p(std::exp(double{dt[i]}));
      double y = d[i] * x;
      for (std::int64_t n = 0; n < size; ++n) {
        double& s = h[i * size + n];
        s = std::exp(-delta * std::exp(double{log[i * size + n]})) * s + delta * b[n] * x;
        y += b[size + n] * s;
      }
      out.push_back(y * silu(row[e + i]));
    }
  }
  return out;
}

// The sums over all tokens before: u_t = β_t (v_t − Σ_{j<t} (γ_t/γ_j) (k_t·k_j) u_j), Sᵀq = Σ_{j≤t} (γ_t/γ_j) (q·k_j)
// u_j, with γ the product of the α up to a token.
std::vector<double> reference(const GatedDeltaNetConfig& c, const Parameters& parameters, const std::vector<float>& in,
                              std::int64_t) {
  const std::int64_t H = c.num_heads, dk = c.key_dim, dv = c.head_dim, k = c.kernel_size, channels = c.channels();
  const std::int64_t width = channels + H + (c.decay ? H : 0) + (c.output_gate ? H * dv : 0);
  const std::int64_t tokens = static_cast<std::int64_t>(in.size()) / width;
  const float *taps = Mixer::find(parameters, "conv.weight"), *norm = Mixer::find(parameters, "norm.weight");
  const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
  const auto convolved = [&](std::int64_t t, std::int64_t channel, std::int64_t count) {
    std::vector<double> y;
    for (std::int64_t i = channel; i < channel + count; ++i) {
      double sum = 0;
      for (std::int64_t j = 0; j < k; ++j)
        if (t - k + 1 + j >= 0) sum += double{taps[i * k + j]} * in[(t - k + 1 + j) * width + i];
      y.push_back(silu(sum));
    }
    return y;
  };
  const auto dot = [](const std::vector<double>& x, const std::vector<double>& y) {
    return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
  };
  const auto unit = [&](std::vector<double> x) {
    const double length = std::sqrt(dot(x, x) + 1e-6);
    for (double& v : x) v /= length;
    return x;
  };
  std::vector<double> out(static_cast<std::size_t>(tokens * H * dv));
  for (std::int64_t h = 0; h < H; ++h) {
    std::vector<std::vector<double>> keys, changes;
    std::vector<double> time;  // −log γ
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* row = in.data() + t * width;
      const auto q = unit(convolved(t, h * dk, dk)), v = convolved(t, 2 * H * dk + h * dv, dv);
      keys.push_back(unit(convolved(t, (H + h) * dk, dk)));
      double step = 0;
      if (c.decay) {
        const double rate = std::exp(double{Mixer::find(parameters, "A_log")[h]});
        step = rate * std::log1p(std::exp(row[channels + H + h] + double{Mixer::find(parameters, "dt_bias")[h]}));
      }
      time.push_back(step + (time.empty() ? 0 : time.back()));
      const double beta = 1 / (1 + std::exp(-double{row[channels + h]}));
      std::vector<double> change = v, y(static_cast<std::size_t>(dv));
      for (std::int64_t j = 0; j < t; ++j) {
        const double weight = std::exp(time[j] - time[t]) * dot(keys[t], keys[j]);
        for (std::int64_t i = 0; i < dv; ++i) change[i] -= weight * changes[j][i];
      }
      for (double& x : change) x *= beta;
      changes.push_back(change);
      for (std::int64_t j = 0; j <= t; ++j) {
        const double weight = std::exp(time[j] - time[t]) * dot(q, keys[j]) / std::sqrt(static_cast<double>(dk));
        for (std::int64_t i = 0; i < dv; ++i) y[i] += weight * changes[j][i];
      }
      const double root = std::sqrt(dot(y, y) / static_cast<double>(dv) + c.eps);
      const float* gate = row + channels + H + (c.decay ? H : 0) + h * dv;
      for (std::int64_t i = 0; i < dv; ++i)
        out[(t * H + h) * dv + i] = y[i] / root * norm[i] * (c.output_gate ? silu(gate[i]) : 1);
    }
  }
  return out;
}

// The sums over all tokens before.
std::vector<double> reference(const Rwkv4Config& c, const Parameters& parameters, const std::vector<float>& in,
                              std::int64_t) {
  const std::int64_t e = c.inner_size, width = 3 * e, tokens = static_cast<std::int64_t>(in.size()) / width;
  const auto mixed = [&](const char* name, std::int64_t t, std::int64_t i) {
    const double mu = Mixer::find(parameters, name)[i];
    return mu * in[t * width + i] + (1 - mu) * (t > 0 ? in[(t - 1) * width + i] : 0);
  };
  std::vector<double> out;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t i = 0; i < e; ++i) {
      const double w = -std::exp(double{Mixer::find(parameters, "time_decay")[i]});
      double numerator = 0, denominator = 0;
      for (std::int64_t j = 0; j <= t; ++j) {
        const double first = Mixer::find(parameters, "time_first")[i], k = mixed("time_mix_k", j, i);
        const double weight = std::exp(k + (j == t ? first : static_cast<double>(t - 1 - j) * w));
        numerator += weight * mixed("time_mix_v", j, i);
        denominator += weight;
      }
      out.push_back(numerator / denominator / (1 + std::exp(-mixed("time_mix_r", t, i))));
    }
  }
  return out;
}

// Sums over all tokens before: S = Σ_j G_{t−j} k_j v_jᵀ, G_n = Σ_m Re(w a^n) with the complex numbers w and a of a
// mode.
std::vector<double> reference(const H3Config& c, const Parameters& parameters, const std::vector<float>& in,
                              std::int64_t) {
  const std::int64_t H = c.num_heads, d = c.head_dim, K = c.kernel_size, M = c.num_modes, width = 3 * H * d;
  const std::int64_t tokens = static_cast<std::int64_t>(in.size()) / width;
  const float *taps = Mixer::find(parameters, "taps"), *decay = Mixer::find(parameters, "decay");
  const float *weight = Mixer::find(parameters, "weight"), *skip = Mixer::find(parameters, "D");
  std::vector<double> out(static_cast<std::size_t>(tokens * H * d));
  for (std::int64_t h = 0; h < H; ++h) {
    std::vector<double> kernel(static_cast<std::size_t>(tokens));
    for (std::int64_t m = 0; m < M; ++m) {
      const std::complex<double> a(decay[h * 2 * M + m], decay[(h * 2 + 1) * M + m]);
      std::complex<double> power(weight[h * 2 * M + m], -weight[(h * 2 + 1) * M + m]);
      for (double& k : kernel) {
        k += power.real();
        power *= a;
      }
    }
    kernel[0] += skip[h];
    const auto k = [&](std::int64_t t, std::int64_t i) {
      double sum = 0;
      for (std::int64_t j = 0; j < K; ++j)
        if (t - K + 1 + j >= 0)
          sum += double{taps[(h * d + i) * K + j]} * in[(t - K + 1 + j) * width + (H + h) * d + i];
      return sum;
    };
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t s = 0; s < tokens; ++s) {
        const double ks = k(s, i);
        for (std::int64_t t = s; t < tokens; ++t)
          for (std::int64_t j = 0; j < d; ++j)
            out[(t * H + h) * d + j] +=
                in[t * width + h * d + i] * kernel[t - s] * ks * in[s * width + (2 * H + h) * d + j];
      }
    }
  }
  return out;
}

std::vector<double> reference(const HyenaConfig& c, const Parameters& parameters, const std::vector<float>& in,
                              std::int64_t) {
  const std::int64_t e = c.inner_size, K = c.kernel_size, width = 3 * e;
  const std::int64_t tokens = static_cast<std::int64_t>(in.size()) / width;
  const float *taps = Mixer::find(parameters, "conv.weight"), *bias = Mixer::find(parameters, "conv.bias");
  const auto conv = [&](std::int64_t t, std::int64_t i) {
    double sum = bias[i];
    for (std::int64_t j = 0; j < K; ++j)
      if (t - K + 1 + j >= 0) sum += double{taps[i * K + j]} * in[(t - K + 1 + j) * width + i];
    return sum;
  };
  std::vector<double> out(static_cast<std::size_t>(tokens * e));
  for (std::int64_t i = 0; i < e; ++i) {
    for (std::int64_t s = 0; s < tokens; ++s) {
      const double g = conv(s, i) * conv(s, 2 * e + i);
      out[s * e + i] += Mixer::find(parameters, "filter.D")[i] * g;
      for (std::int64_t t = s; t < tokens; ++t) out[t * e + i] += Mixer::find(parameters, "table")[(t - s) * e + i] * g;
    }
    for (std::int64_t t = 0; t < tokens; ++t) out[t * e + i] *= conv(t, e + i);
  }
  return out;
}

// The sums over all tokens: Sᵀc = Σ_{j≤t} (γ_t/γ_j) (c_t·b_j) Δ_j x_j, with γ the product of the α up to a token.
std::vector<double> reference(const Mamba2Config& c, const Parameters& parameters, const std::vector<float>& in,
                              std::int64_t) {
  const std::int64_t H = c.num_heads, P = c.head_dim, N = c.state_size, G = c.num_groups, k = c.kernel_size;
  const std::int64_t e = H * P, channels = e + 2 * G * N, width = channels + e + H;
  const std::int64_t tokens = static_cast<std::int64_t>(in.size()) / width;
  const float *taps = Mixer::find(parameters, "conv.weight"), *bias = Mixer::find(parameters, "conv.bias");
  const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
  std::vector<double> xbc(static_cast<std::size_t>(tokens * channels));
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t i = 0; i < channels; ++i) {
      double sum = bias == nullptr ? 0 : bias[i];
      for (std::int64_t j = 0; j < k; ++j)
        if (t - k + 1 + j >= 0) sum += double{taps[i * k + j]} * in[(t - k + 1 + j) * width + i];
      xbc[t * channels + i] = silu(sum);
    }
  }
  std::vector<double> out(static_cast<std::size_t>(tokens * e));
  for (std::int64_t h = 0; h < H; ++h) {
    const double rate = std::exp(double{Mixer::find(parameters, "A_log")[h]}), d = Mixer::find(parameters, "D")[h];
    const std::int64_t b = e + h / (H / G) * N;
    std::vector<double> steps, time;  // Δ, −log γ
    for (std::int64_t t = 0; t < tokens; ++t) {
      const double dt = in[t * width + channels + e + h] + double{Mixer::find(parameters, "dt_bias")[h]};
      steps.push_back(std::log1p(std::exp(dt)));
      time.push_back(rate * steps.back() + (time.empty() ? 0 : time.back()));
      for (std::int64_t i = 0; i < P; ++i) {
        double y = d * xbc[t * channels + h * P + i];
        for (std::int64_t j = 0; j <= t; ++j) {
          const double* row = xbc.data() + j * channels;
          const double product = std::inner_product(row + b, row + b + N, xbc.data() + t * channels + b + G * N, 0.0);
          y += std::exp(time[j] - time[t]) * product * steps[j] * row[h * P + i];
        }
        out[t * e + h * P + i] = y * silu(in[t * width + channels + h * P + i]);
      }
    }
  }
  const float* norm = Mixer::find(parameters, "norm.weight");
  for (std::int64_t i = 0; i < tokens * e; i += e / G) {
    double* y = out.data() + i;
    const double root = std::sqrt(std::inner_product(y, y + e / G, y, 0.0) / static_cast<double>(e / G) + c.eps);
    for (std::int64_t j = 0; j < e / G; ++j) y[j] *= norm[i % e + j] / root;
  }
  return out;
}

// Σ_{j≤t} Σ_i q_t[i] (γ_t[i]/γ_j[i]) k_j[i] v_j, with γ the products of the α up to a token.
std::vector<double> reference(const GatedLinearAttentionConfig& c, const Parameters& parameters,
                              const std::vector<float>& in, std::int64_t) {
  const std::int64_t H = c.num_heads, dk = c.key_dim, dv = c.head_dim, gate = H * (2 * dk + dv), a = gate + H * dv;
  const std::int64_t width = a + c.gate_rank + H * dk, tokens = static_cast<std::int64_t>(in.size()) / width;
  const float* norm = Mixer::find(parameters, "norm.weight");
  std::vector<double> out(static_cast<std::size_t>(tokens * H * dv));
  for (std::int64_t h = 0; h < H; ++h) {
    std::vector<double> time(static_cast<std::size_t>((tokens + 1) * dk));  // −log γ
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* row = in.data() + t * width;
      for (std::int64_t i = 0; i < dk; ++i)
        time[(t + 1) * dk + i] =
            time[t * dk + i] + std::log1p(std::exp(-double{row[a + c.gate_rank + h * dk + i]})) / c.gate_normalizer;
      std::vector<double> y(static_cast<std::size_t>(dv));
      for (std::int64_t j = 0; j <= t; ++j) {
        double weight = 0;
        for (std::int64_t i = 0; i < dk; ++i)
          weight += std::exp(time[(j + 1) * dk + i] - time[(t + 1) * dk + i]) * row[h * dk + i] *
                    in[j * width + (H + h) * dk + i];
        for (std::int64_t i = 0; i < dv; ++i)
          y[i] += weight / std::sqrt(static_cast<double>(dk)) * in[j * width + 2 * H * dk + h * dv + i];
      }
      const double square = std::inner_product(y.begin(), y.end(), y.begin(), 0.0) / static_cast<double>(dv);
      for (std::int64_t i = 0; i < dv; ++i) {
        const double z = row[gate + h * dv + i];
        out[(t * H + h) * dv + i] = y[i] / std::sqrt(square + c.eps) * norm[i] * z / (1 + std::exp(-z));
      }
    }
  }
  return out;
}

// By the recurrence, on Sᵀ as the paper has it: a row for each number of v.
std::vector<double> reference(const Rwkv7Config& c, const Parameters& parameters, const std::vector<float>& in,
                              std::int64_t) {
  const std::int64_t D = c.head_dim, e = c.inner_size();
  const Mixer shape{c};
  const std::int64_t width = shape.input_width(), tokens = static_cast<std::int64_t>(in.size()) / width;
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto mixed = [&](const char* name, std::int64_t t, std::int64_t i) {
    const double x = in[t * width + i], before = t > 0 ? in[(t - 1) * width + i] : 0;
    return x + (before - x) * Mixer::find(parameters, name)[i];
  };
  std::vector<double> out(static_cast<std::size_t>(tokens * e));
  for (std::int64_t begin = 0; begin < e; begin += D) {
    std::vector<std::vector<double>> s(static_cast<std::size_t>(D), std::vector<double>(static_cast<std::size_t>(D)));
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<double> r, w, k, v, a, kappa, y;
      double length = 0, bonus = 0, mean = 0, square = 0;
      for (std::int64_t i = begin; i < begin + D; ++i) {
        r.push_back(mixed("mix_r", t, i));
        w.push_back(std::exp(-std::exp(-0.5) * sigmoid(std::tanh(mixed("mix_w", t, i)))));
        a.push_back(sigmoid(mixed("mix_a", t, i)));
        v.push_back(mixed("mix_v", t, i));
        const double key = mixed("mix_k", t, i);
        kappa.push_back(key * Mixer::find(parameters, "k_k")[i]);
        length += kappa.back() * kappa.back();
        k.push_back(key * (1 + (a.back() - 1) * Mixer::find(parameters, "k_a")[i]));
        bonus += r.back() * k.back() * Mixer::find(parameters, "r_k")[i];
      }
      for (double& x : kappa) x /= std::max(std::sqrt(length), 1e-12);
      for (std::int64_t j = 0; j < D; ++j) {
        const double seen = std::inner_product(kappa.begin(), kappa.end(), s[j].begin(), 0.0);
        for (std::int64_t i = 0; i < D; ++i) s[j][i] = s[j][i] * w[i] - seen * kappa[i] * a[i] + v[j] * k[i];
        y.push_back(std::inner_product(r.begin(), r.end(), s[j].begin(), 0.0));
        mean += y.back() / static_cast<double>(D);
      }
      for (const double x : y) square += (x - mean) * (x - mean) / static_cast<double>(D);
      for (std::int64_t j = 0; j < D; ++j) {
        const double normed =
            (y[j] - mean) / std::sqrt(square + c.eps) * Mixer::find(parameters, "norm.weight")[begin + j] +
            Mixer::find(parameters, "norm.bias")[begin + j];
        out[t * e + begin + j] = (normed + bonus * v[j]) * sigmoid(mixed("mix_g", t, begin + j));
      }
    }
  }
  return out;
}

std::vector<double> reference(const Mixer& mixer, const std::vector<float>& in, std::int64_t start = 0) {
  return std::visit([&](const auto& config) { return reference(config, mixer.parameters, in, start); }, mixer.config);
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

std::vector<Mixer> convs() {
  return {Mixer(GatedConvConfig{256, 3, true}), Mixer(GatedConvConfig{1, 1, false}),
          Mixer(GatedConvConfig{37, 4, false}), Mixer(GatedConvConfig{530, 2, false}),
          Mixer(GatedConvConfig{19, 90, false})};
}

std::vector<Mixer> linears() {
  return {Mixer(LinearAttentionConfig{4, 16, 32, 1e-12}),  Mixer(LinearAttentionConfig{3, 16, 64, 1e-12}),
          Mixer(LinearAttentionConfig{1, 1, 1, 0}),        Mixer(LinearAttentionConfig{2, 5, 7, 1e-6}),
          Mixer(LinearAttentionConfig{1, 24, 112, 1e-12}), Mixer(LinearAttentionConfig{1, 33, 80, 1e-12}),
          Mixer(LinearAttentionConfig{1, 64, 130, 1e-12})};
}

SlidingWindowConfig window_config(std::int64_t H, std::int64_t Hkv, std::int64_t hd, std::int64_t window,
                                  std::int64_t rotary, bool interleaved = false) {
  SlidingWindowConfig c;
  c.num_heads = H;
  c.num_kv_heads = Hkv;
  c.head_dim = hd;
  c.window = window;
  c.scale = 1 / std::sqrt(static_cast<double>(hd));
  c.rotary_dim = rotary;
  c.rotary_interleaved = interleaved;
  return c;
}

std::vector<Mixer> windows() {
  return {Mixer(window_config(4, 4, 32, 9, 32)),         Mixer(window_config(2, 2, 64, 129, 64)),
          Mixer(window_config(1, 1, 1, 1, 0)),           Mixer(window_config(6, 2, 7, 5, 3)),
          Mixer(window_config(6, 1, 20, 16, 20, true)),  Mixer(window_config(3, 3, 112, 17, 50)),
          Mixer(window_config(2, 1, 80, 300, 13, true)), Mixer(window_config(5, 5, 33, 31, 31))};
}

std::vector<Mixer> fulls() {
  const auto full = [](std::int64_t H, std::int64_t Hkv, std::int64_t hd, std::int64_t rotary, bool interleaved) {
    return Mixer(FullAttentionConfig{H, Hkv, hd, 1 / std::sqrt(static_cast<double>(hd)), false, false, rotary, 10000,
                                     interleaved});
  };
  return {full(4, 4, 32, 16, false), full(2, 2, 70, 35, false), full(1, 1, 1, 0, false), full(6, 2, 7, 3, true),
          full(40, 1, 16, 16, false)};
}

std::vector<Mixer> scans() {
  return {Mixer(SelectiveScanConfig{256, 16, 4, 8, true, false}), Mixer(SelectiveScanConfig{1, 1, 1, 1, false, false}),
          Mixer(SelectiveScanConfig{37, 5, 3, 2, true, true}), Mixer(SelectiveScanConfig{150, 32, 2, 3, false, false}),
          Mixer(SelectiveScanConfig{19, 7, 90, 1, true, false})};
}

// A prefix of one token: these may be cut anywhere.
std::vector<Mixer> prefixes() {
  return {Mixer(PrefixLinearAttentionConfig{4, 16, 32, 1, 1e-12}), Mixer(PrefixLinearAttentionConfig{1, 5, 70, 1, 0})};
}

std::vector<Mixer> deltas() {
  return {Mixer(GatedDeltaNetConfig{4, 32, 64, 4, 1e-5, true, true}),
          Mixer(GatedDeltaNetConfig{1, 1, 1, 1, 1e-2, false, false}),
          Mixer(GatedDeltaNetConfig{2, 5, 19, 3, 1e-5, true, false}),
          Mixer(GatedDeltaNetConfig{3, 17, 7, 2, 1e-5, false, true})};
}

std::vector<Mixer> rwkv4s() {
  return {Mixer(Rwkv4Config{128, 128}), Mixer(Rwkv4Config{1, 1}), Mixer(Rwkv4Config{37, 37}),
          Mixer(Rwkv4Config{150, 150})};
}

std::vector<Mixer> h3s() {
  return {Mixer(H3Config{32, 2, 16, 8}), Mixer(H3Config{1, 1, 1, 1}), Mixer(H3Config{2, 19, 3, 5}),
          Mixer(H3Config{3, 4, 40, 33})};
}

// Not one of the tests with all mixers has more tokens than 200.
std::vector<Mixer> hyenas() {
  return {Mixer(HyenaConfig{128, 3, 200, 64}), Mixer(HyenaConfig{1, 1, 200, 1}), Mixer(HyenaConfig{37, 4, 256, 3})};
}

std::vector<Mixer> mambas() {
  return {Mixer(Mamba2Config{4, 64, 16, 1, 4, 1e-5, true}), Mixer(Mamba2Config{1, 1, 1, 1, 1, 1e-2, false}),
          Mixer(Mamba2Config{6, 5, 7, 3, 3, 1e-5, true}), Mixer(Mamba2Config{2, 19, 33, 2, 2, 1e-5, false}),
          Mixer(Mamba2Config{3, 16, 5, 1, 90, 1e-5, true})};
}

std::vector<Mixer> gated_linears() {
  return {Mixer(GatedLinearAttentionConfig{4, 16, 64, 16, 16, 1e-5}),
          Mixer(GatedLinearAttentionConfig{1, 1, 1, 1, 1, 1e-2}),
          Mixer(GatedLinearAttentionConfig{3, 17, 7, 2, 2, 1e-5}),
          Mixer(GatedLinearAttentionConfig{2, 5, 19, 3, 16, 1e-5})};
}

// As wide as the residual stream, and as their low ranks.
std::vector<Mixer> rwkv7s() {
  const auto rwkv7 = [](std::int64_t heads, std::int64_t dim, double eps) {
    const std::int64_t e = heads * dim;
    return Mixer(Rwkv7Config{e, heads, dim, e, e, e, eps});
  };
  return {rwkv7(2, 64, 64e-5), rwkv7(1, 2, 1e-2), rwkv7(3, 7, 1e-5), rwkv7(2, 19, 1e-5)};
}

std::vector<Mixer> all_mixers() {
  std::vector<Mixer> all = convs();
  for (auto& mixers : {linears(), windows(), prefixes(), fulls(), scans(), deltas(), rwkv4s(), h3s(), hyenas(),
                       mambas(), gated_linears(), rwkv7s()})
    all.insert(all.end(), mixers.begin(), mixers.end());
  return all;
}

std::string describe(const Mixer& mixer) {
  return std::to_string(mixer.config.index()) + ": " + std::to_string(mixer.input_width()) + " → " +
         std::to_string(mixer.output_width());
}

class Mixers : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(Cpu, Mixers, testing::ValuesIn(available_isas()),
                         [](const auto& isa) { return std::string(name_of(isa.param)); });

// ---- tests ----------------------------------------------------------------------------------------------------------

// One call holds the prefix; how the rest is cut changes nothing but the rounding.
TEST_P(Mixers, ReadAPrefixAsAWhole) {
  CpuBackend cpu = make_cpu(GetParam());
  for (std::int64_t prefix : {1, 5, 63, 64, 100, 1000}) {
    for (const auto& config :
         {PrefixLinearAttentionConfig{3, 16, 20, prefix, 1e-12}, PrefixLinearAttentionConfig{1, 5, 70, prefix, 0}}) {
      const Mixer mixer(config);
      SCOPED_TRACE(describe(mixer) + ", prefix " + std::to_string(prefix));
      for (std::int64_t tokens : {1, 4, 17, 64, 65, 150}) {
        const auto in = mixer.input(tokens, static_cast<std::uint64_t>(tokens));
        const auto expected = reference(mixer, in);
        EXPECT_LT(relative_error(feed_cut(mixer, cpu, in, {tokens}), expected), kTolerance) << tokens;
        if (tokens <= prefix) continue;
        std::vector<std::int64_t> cuts{prefix};
        cuts.resize(static_cast<std::size_t>(1 + tokens - prefix), 1);
        EXPECT_LT(relative_error(feed_cut(mixer, cpu, in, cuts), expected), kTolerance) << tokens;
      }
    }
  }
}

TEST(AllMixers, AreOfAllKinds) {
  std::set<std::size_t> kinds;
  for (const Mixer& mixer : all_mixers()) kinds.insert(mixer.config.index());
  EXPECT_EQ(kinds.size(), std::variant_size_v<MixerConfig>);
}

TEST_P(Mixers, MatchReferenceInOneCall) {
  CpuBackend cpu = make_cpu(GetParam());
  for (const Mixer& mixer : all_mixers()) {
    SCOPED_TRACE(describe(mixer));
    for (std::int64_t tokens : {1, 2, 15, 16, 17, 63, 64, 65, 150, 200}) {
      const auto in = mixer.input(tokens, static_cast<std::uint64_t>(tokens));
      EXPECT_LT(relative_error(feed_cut(mixer, cpu, in, {tokens}), reference(mixer, in)), kTolerance) << tokens;
    }
  }
}

TEST_P(Mixers, MatchReferenceTokenByToken) {
  CpuBackend cpu = make_cpu(GetParam());
  for (const Mixer& mixer : all_mixers()) {
    SCOPED_TRACE(describe(mixer));
    const auto in = mixer.input(150, 1);
    EXPECT_LT(relative_error(feed_cut(mixer, cpu, in, std::vector<std::int64_t>(150, 1)), reference(mixer, in)),
              kTolerance);
  }
}

TEST_P(Mixers, MatchReferenceInRaggedBatches) {
  CpuBackend cpu = make_cpu(GetParam(), 3);
  std::mt19937 random(5);
  const std::vector<std::int64_t> lengths{150, 1, 40, 97, 3, 129};
  for (const Mixer& mixer : all_mixers()) {
    SCOPED_TRACE(describe(mixer));
    const auto states = mixer.states(cpu, DType::float32, 8);
    std::vector<std::vector<float>> in, out(lengths.size());
    for (std::size_t b = 0; b < lengths.size(); ++b) in.push_back(mixer.input(lengths[b], b));
    std::vector<std::int64_t> seen(lengths.size(), 0);
    while (seen != lengths) {
      std::vector<Piece> pieces;
      std::vector<std::size_t> who;
      for (std::size_t b = 0; b < lengths.size(); ++b) {
        const std::int64_t left = lengths[b] - seen[b];
        if (left == 0 || random() % 4 == 0) continue;
        const std::int64_t tokens = random() % 2 == 0 ? 1 : 1 + static_cast<std::int64_t>(random() % left);
        who.push_back(b);
        pieces.push_back(
            {in[b].data() + seen[b] * mixer.input_width(), tokens, static_cast<int>((b * 3 + 1) % 8), seen[b]});
        seen[b] += tokens;
      }
      if (pieces.empty()) continue;
      const auto parts = feed(mixer, cpu, *states, pieces);
      for (std::size_t i = 0; i < who.size(); ++i)
        out[who[i]].insert(out[who[i]].end(), parts[i].begin(), parts[i].end());
    }
    for (std::size_t b = 0; b < lengths.size(); ++b)
      EXPECT_LT(relative_error(out[b], reference(mixer, in[b])), kTolerance) << b;
  }
}

TEST_P(Mixers, CutsChangeNoBitOfWhatGoesTokenByToken) {
  CpuBackend cpu = make_cpu(GetParam());
  std::vector<Mixer> mixers = convs();
  for (const auto& more :
       {windows(), fulls(), scans(), deltas(), rwkv4s(), h3s(), hyenas(), mambas(), gated_linears(), rwkv7s()})
    mixers.insert(mixers.end(), more.begin(), more.end());
  std::mt19937 random(6);
  for (const Mixer& mixer : mixers) {
    SCOPED_TRACE(describe(mixer));
    for (DType ring : {DType::float32, DType::bfloat16}) {
      const std::int64_t tokens = 170;
      const auto in = mixer.input(tokens, 8);
      const auto whole = feed_cut(mixer, cpu, in, {tokens}, ring);
      EXPECT_EQ(feed_cut(mixer, cpu, in, std::vector<std::int64_t>(170, 1), ring), whole);
      for (int trial = 0; trial < 6; ++trial) {
        std::vector<std::int64_t> cuts;
        for (std::int64_t left = tokens; left > 0; left -= cuts.back())
          cuts.push_back(std::min<std::int64_t>(left, 1 + random() % (trial < 3 ? 6 : 90)));
        EXPECT_EQ(feed_cut(mixer, cpu, in, cuts, ring), whole);
      }
    }
  }
}

// Several spans of keys, which several threads share in a step.
TEST_P(Mixers, LongContextsAreExactAndCutsAndThreadsChangeNoBit) {
  const std::int64_t tokens = 1300;  // more than two spans of keys
  for (const Mixer& mixer : {fulls()[1], fulls()[3]}) {
    SCOPED_TRACE(describe(mixer));
    const auto in = mixer.input(tokens, 17), other = mixer.input(tokens, 18);
    const std::vector<std::int64_t> cuts{511, 1, 1, 1, 300, 1, 128, 1, 354, 1, 1};
    const std::vector<std::int64_t> whole{tokens};
    const std::vector<double> expected = reference(mixer, in);
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      CpuBackend one = make_cpu(GetParam(), 1);
      const auto out = feed_cut(mixer, one, in, whole, dtype);
      EXPECT_LT(relative_error(out, expected), dtype == DType::float32 ? kTolerance : 8e-3);
      for (const int threads : {1, 3, 40}) {
        CpuBackend cpu = make_cpu(GetParam(), threads);
        EXPECT_EQ(feed_cut(mixer, cpu, in, cuts, dtype), out) << threads << " threads";
        // A last step beside shorter sequences.
        const auto states = mixer.states(cpu, dtype, 3);
        const float* at = in.data();
        feed(mixer, cpu, *states, {{at, tokens - 1, 1, 0}, {other.data(), 700, 0, 0}, {other.data(), 3, 2, 0}});
        const std::int64_t width = mixer.input_width();
        const auto parts = feed(mixer, cpu, *states,
                                {{other.data() + 700 * width, 1, 0, 700},
                                 {at + (tokens - 1) * width, 1, 1, tokens - 1},
                                 {other.data() + 3 * width, 1, 2, 3}});
        EXPECT_EQ(parts[1], std::vector<float>(out.end() - mixer.output_width(), out.end())) << threads << " threads";
      }
    }
  }
}

TEST_P(Mixers, AStepTakesNoMoreScratchThanWasReserved) {
  for (const Mixer& mixer : {fulls()[0], fulls()[4]}) {
    SCOPED_TRACE(describe(mixer));
    CpuBackend cpu = make_cpu(GetParam(), 3);
    ModelConfig model;
    model.layers = {mixer.config};
    const auto in = mixer.input(2000, 19);
    const auto states = mixer.states(cpu, DType::float32, 1);
    feed(mixer, cpu, *states, {{in.data(), 1999, 0, 0}});
    cpu.trim();
    cpu.reserve_step(model, 1);
    const auto& held = cpu.memory().nbytes[static_cast<std::size_t>(backend::MemoryKind::workspace)];
    const std::size_t before = held;
    feed(mixer, cpu, *states, {{in.data() + 1999 * mixer.input_width(), 1, 0, 1999}});
    EXPECT_EQ(held, before);
  }
}

TEST_P(Mixers, CutsAtChunksChangeNoBitOfLinearAttention) {
  CpuBackend cpu = make_cpu(GetParam());
  ASSERT_EQ(cpu.chunk_tokens() % kTaylorChunk, 0);
  for (const Mixer& mixer : linears()) {
    SCOPED_TRACE(describe(mixer));
    for (std::int64_t tail : {5, 40, 64}) {
      const std::int64_t c = kTaylorChunk;
      const auto in = mixer.input(4 * c + tail, 9);
      const auto whole = feed_cut(mixer, cpu, in, {4 * c + tail});
      EXPECT_EQ(feed_cut(mixer, cpu, in, {c, 2 * c, c, tail}), whole);
      EXPECT_EQ(feed_cut(mixer, cpu, in, {3 * c, c + tail}), whole);
    }
  }
}

TEST_P(Mixers, NeighboursAndThreadsChangeNoBit) {
  CpuBackend one = make_cpu(GetParam(), 1);
  for (const Mixer& mixer : all_mixers()) {
    SCOPED_TRACE(describe(mixer));
    const auto in = mixer.input(100, 10), other = mixer.input(100, 11);
    const std::vector<std::int64_t> cuts{30, 1, 1, 20, 48};
    const auto alone = feed_cut(mixer, one, in, cuts, DType::bfloat16);
    for (int threads : {1, 2, 5, 40}) {
      CpuBackend cpu = make_cpu(GetParam(), threads);
      const auto states = mixer.states(cpu, DType::bfloat16, 3);
      std::vector<float> out;
      std::int64_t position = 0, other_position = 0;
      for (std::int64_t tokens : cuts) {
        const std::int64_t other_tokens = 21 - tokens % 20;
        const auto parts = feed(mixer, cpu, *states,
                                {{other.data() + other_position * mixer.input_width(), other_tokens, 0, other_position},
                                 {in.data() + position * mixer.input_width(), tokens, 2, position},
                                 {other.data() + other_position * mixer.input_width(), 1, 1, other_position}});
        out.insert(out.end(), parts[1].begin(), parts[1].end());
        position += tokens;
        other_position += other_tokens;
      }
      EXPECT_EQ(out, alone) << threads << " threads";
    }
  }
}

TEST_P(Mixers, Bfloat16OutputIsTheRoundedFloat32Output) {
  CpuBackend cpu = make_cpu(GetParam());
  for (const Mixer& mixer : all_mixers()) {
    SCOPED_TRACE(describe(mixer));
    for (std::int64_t tokens : {1, 70}) {
      const auto in = mixer.input(tokens, 12);
      const auto a = mixer.states(cpu, DType::float32, 1), b = mixer.states(cpu, DType::float32, 1);
      auto wide = feed(mixer, cpu, *a, {{in.data(), tokens, 0, 0}})[0];
      for (float& x : wide) x = float_from_bf16(bf16_from_float(x));
      EXPECT_EQ(feed(mixer, cpu, *b, {{in.data(), tokens, 0, 0}}, DType::bfloat16)[0], wide);
    }
  }
}

TEST_P(Mixers, RotaryIsExactFarFromTheStart) {
  CpuBackend cpu = make_cpu(GetParam());
  for (bool interleaved : {false, true}) {
    const Mixer mixer(window_config(2, 2, 32, 12, 32, interleaved));
    const std::int64_t start = 30'000'017, tokens = 40;
    const auto in = mixer.input(tokens, 13);
    const auto states = mixer.states(cpu, DType::float32, 1);
    EXPECT_LT(
        relative_error(feed(mixer, cpu, *states, {{in.data(), tokens, 0, start}})[0], reference(mixer, in, start)),
        2e-6);
  }
}

TEST_P(Mixers, Bfloat16RingsCostWhatTheirRoundingDoes) {
  CpuBackend cpu = make_cpu(GetParam());
  for (const Mixer& mixer : windows()) {
    const auto in = mixer.input(150, 14);
    EXPECT_LT(relative_error(feed_cut(mixer, cpu, in, {150}, DType::bfloat16), reference(mixer, in)), 8e-3);
  }
}

TEST_P(Mixers, LinearAttentionStaysExactOverManyTokens) {
  CpuBackend cpu = make_cpu(GetParam());
  const Mixer mixer(LinearAttentionConfig{1, 8, 16, 1e-12});
  const auto in = mixer.input(3000, 15);
  const auto expected = reference(mixer, in);
  EXPECT_LT(relative_error(feed_cut(mixer, cpu, in, {3000}), expected), 3e-6);
  EXPECT_LT(relative_error(feed_cut(mixer, cpu, in, std::vector<std::int64_t>(3000, 1)), expected), 3e-6);
}

// Steps from e⁻⁶⁰ to 60: what stays for ever, and what is forgotten at once.
TEST_P(Mixers, ScanIsExactForStepsOfAllSizes) {
  CpuBackend cpu = make_cpu(GetParam());
  const Mixer mixer(SelectiveScanConfig{35, 16, 4, 1, true, false});
  const std::int64_t width = mixer.input_width();
  auto in = mixer.input(3000, 17);
  for (std::size_t i = 0; i < in.size(); ++i)
    if (static_cast<std::int64_t>(i) % width >= width - 35) in[i] *= 20;
  const auto expected = reference(mixer, in);
  const auto whole = feed_cut(mixer, cpu, in, {3000});
  EXPECT_LT(relative_error(whole, expected), 1e-6);
  EXPECT_EQ(feed_cut(mixer, cpu, in, std::vector<std::int64_t>(3000, 1)), whole);
  // Each channel by itself: where steps are small, the outputs are.
  for (std::int64_t i = 0; i < 35; ++i) {
    std::vector<float> one;
    std::vector<double> one_expected;
    for (std::size_t t = 0; t < 3000; ++t) {
      one.push_back(whole[t * 35 + static_cast<std::size_t>(i)]);
      one_expected.push_back(expected[t * 35 + static_cast<std::size_t>(i)]);
    }
    EXPECT_LT(relative_error(one, one_expected), 2e-6) << i;
  }
}

// The only input that matters is Δ, far below 0: softplus must be right relative to its own size.
TEST_P(Mixers, SmallStepsOfTheScanHaveAllTheirDigits) {
  CpuBackend cpu = make_cpu(GetParam());
  Mixer mixer(SelectiveScanConfig{20, 1, 1, 1, false, false});
  std::ranges::fill(mixer.parameters["D"], 0.0f);
  for (float dt = -80; dt < 25; dt += 0.37f) {
    auto in = mixer.input(1, 18);
    std::fill(in.end() - 20, in.end(), dt);
    const auto out = feed_cut(mixer, cpu, in, {1});
    const auto expected = reference(mixer, in);
    for (std::size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out[i] / expected[i], 1, 1e-6) << dt;
  }
}

// e^k would overflow, or be 0, as float: only differences of exponents may be taken. What all k have in common changes
// nothing.
TEST_P(Mixers, Rwkv4IsExactForExponentsOfAllSizes) {
  CpuBackend cpu = make_cpu(GetParam());
  Mixer mixer(Rwkv4Config{35, 35});
  std::ranges::fill(mixer.parameters["time_mix_k"], 1.0f);  // k is x; v and r are the token before
  for (const char* name : {"time_mix_v", "time_mix_r"}) std::ranges::fill(mixer.parameters[name], 0.0f);
  std::vector<float> decay = mixer.parameters["time_decay"];
  for (float& log : decay) log = -std::exp(log);
  const std::int64_t rows = 300, e = 35;
  auto in = mixer.input(rows, 20);
  for (float& x : in) x = std::round(x * 32) / 8;  // k + offset is exact
  const auto expected = reference(mixer, in);
  for (const float offset : {-3000.0f, -90.0f, 0.0f, 90.0f, 3000.0f}) {
    std::vector<float> k, v, out(static_cast<std::size_t>(rows * e));
    for (std::int64_t t = 0; t < rows; ++t)
      for (std::int64_t i = 0; i < e; ++i) {
        k.push_back(in[t * 3 * e + i] + offset);
        v.push_back(t > 0 ? in[(t - 1) * 3 * e + i] : 0);
      }
    const std::vector<std::int32_t> tokens(300), offsets{0, 300}, slots{0};
    const std::vector<std::int64_t> positions{0};
    const auto matrix = [&](std::vector<float>& x) { return Matrix{x.data(), DType::float32, rows, e}; };
    const auto states = mixer.states(cpu, DType::float32, 1);
    cpu.rwkv4(std::get<Rwkv4Config>(mixer.config),
              {decay.data(), mixer.parameters["time_first"].data(), matrix(k), matrix(v), matrix(v)},
              {tokens, offsets, slots, positions}, *states, 0, matrix(out));
    // Exponents are rounded to 2⁻¹³ at 3,000, to 2⁻¹⁸ at 90.
    EXPECT_LT(relative_error(out, expected), 3e-6 + 6e-8 * std::abs(offset)) << offset;
  }
}

// What is no number stays none: it may not vanish in a comparison.
TEST_P(Mixers, ScanHandsOnWhatIsNoNumber) {
  CpuBackend cpu = make_cpu(GetParam());
  const Mixer mixer(SelectiveScanConfig{40, 3, 2, 2, true, false});
  const std::int64_t e = 40, width = mixer.input_width();
  for (const std::int64_t column : {std::int64_t{7}, e + 7, 2 * e + 2, 2 * e + 2 + 3, width - e + 7}) {
    auto in = mixer.input(3, 19);
    in[static_cast<std::size_t>(width + column)] = std::nanf("");
    const auto out = feed_cut(mixer, cpu, in, {3});
    EXPECT_FALSE(std::isnan(out[7])) << column;
    EXPECT_TRUE(std::isnan(out[static_cast<std::size_t>(e + 7)])) << column;
  }
  Mixer damaged = mixer;
  damaged.parameters["A_log"][7 * 3] = std::nanf("");
  EXPECT_TRUE(std::isnan(feed_cut(damaged, cpu, mixer.input(3, 19), {3})[7]));
}

TEST_P(Mixers, SoftmaxAttentionWithLargeScoresIsExact) {
  CpuBackend cpu = make_cpu(GetParam());
  for (const Mixer& mixer : {Mixer(window_config(2, 2, 64, 33, 0)), Mixer(FullAttentionConfig{2, 2, 64, 0.125})}) {
    auto in = mixer.input(700, 16);
    for (float& x : in) x *= 6;  // scores up to some hundred
    EXPECT_LT(relative_error(feed_cut(mixer, cpu, in, {700}), reference(mixer, in)), 2e-5);
  }
}

// ---- norm -----------------------------------------------------------------------------------------------------------

std::vector<double> norm_reference(NormKind kind, double eps, const std::vector<float>& w, const float* b,
                                   const float* x) {
  const std::size_t d = w.size();
  double mean = 0, square = 0;
  if (kind == NormKind::layer_norm)
    for (std::size_t i = 0; i < d; ++i) mean += x[i] / static_cast<double>(d);
  for (std::size_t i = 0; i < d; ++i) square += (x[i] - mean) * (x[i] - mean) / static_cast<double>(d);
  std::vector<double> y;
  for (std::size_t i = 0; i < d; ++i)
    y.push_back((x[i] - mean) / std::sqrt(square + eps) * w[i] + (b == nullptr ? 0 : b[i]));
  return y;
}

TEST_P(Mixers, NormMatchesReference) {
  CpuBackend cpu = make_cpu(GetParam(), 3);
  for (NormKind kind : {NormKind::rms_norm, NormKind::layer_norm}) {
    for (std::int64_t d : {1, 3, 16, 63, 64, 65, 128, 1000, 1792}) {
      const std::int64_t rows = 37;
      const auto width = static_cast<std::size_t>(d);
      auto x = random_floats(width * rows, 20), w = random_floats(width, 21), b = random_floats(width, 22);
      for (float& xi : x) xi += 0.5f;
      for (double eps : {1e-5, 0.1}) {
        for (const float* bias : {static_cast<const float*>(nullptr), static_cast<const float*>(b.data())}) {
          std::vector<float> y(x.size());
          std::vector<std::uint16_t> y16(x.size());
          const Matrix r{x.data(), DType::float32, rows, d};
          cpu.norm(kind, eps, w.data(), bias, r, {}, {y.data(), DType::float32, rows, d});
          cpu.norm(kind, eps, w.data(), bias, r, {}, {y16.data(), DType::bfloat16, rows, d});
          std::vector<double> expected;
          for (std::int64_t i = 0; i < rows; ++i)
            for (double v : norm_reference(kind, eps, w, bias, x.data() + i * d)) expected.push_back(v);
          if (kind == NormKind::rms_norm || d > 1) {  // else all zeros
            EXPECT_LT(relative_error(y, expected), 5e-7) << d;
          }
          for (std::size_t i = 0; i < y.size(); ++i) ASSERT_EQ(y16[i], bf16_from_float(y[i]));

          const std::vector<std::int32_t> some{36, 0, 5};
          std::vector<float> picked(width * some.size());
          cpu.norm(kind, eps, w.data(), bias, r, some, {picked.data(), DType::float32, 3, d});
          for (std::size_t i = 0; i < some.size(); ++i)
            EXPECT_TRUE(std::equal(picked.begin() + static_cast<std::ptrdiff_t>(i * width),
                                   picked.begin() + static_cast<std::ptrdiff_t>((i + 1) * width),
                                   y.begin() + some[i] * d));
        }
      }
    }
  }
}

}  // namespace
}  // namespace based::cpu
