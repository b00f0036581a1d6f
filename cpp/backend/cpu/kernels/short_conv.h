#pragma once

// A causal convolution of a few taps per channel, whose inputs before the call are kept in a state.

#include <cstdint>

#include "backend/cpu/kernels/simd.h"

namespace based::cpu::BASED_ISA {

struct ShortConv {
  const float* taps;  // (channels, K): the last one is the present token's
  std::int64_t kernel_size;
  const float* u;  // rows of `width` numbers, from the first channel on
  std::int64_t width;
  float* past;  // (K − 1, channels), before the call, oldest first
  std::int64_t channels;

  /// `bias` and the convolution of channels [c, c + n) at token t of the call.
  __attribute__((always_inline)) f32v at(std::int64_t t, std::int64_t c, std::int64_t n, f32v bias) const {
    f32v sum = bias;
    for (std::int64_t j = 0; j < kernel_size; ++j) {
      f32v w{};
      for (std::int64_t i = 0; i < n; ++i) w[i] = taps[(c + i) * kernel_size + j];
      sum = fmadd(w, load_n(row(t - kernel_size + 1 + j) + c, n), sum);
    }
    return sum;
  }

  /// past ← the last K − 1 rows of [past; u], of channels [begin, end).
  __attribute__((always_inline)) void keep(std::int64_t num_tokens, std::int64_t begin, std::int64_t end) const {
    const std::int64_t rows = kernel_size - 1;
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* from = row(num_tokens - rows + r);  // those before the call lie further behind
      float* to = past + r * channels;
      for (std::int64_t c = begin; c < end; ++c) to[c] = from[c];
    }
  }

 private:
  __attribute__((always_inline)) const float* row(std::int64_t t) const {
    return t < 0 ? past + (t + kernel_size - 1) * channels : u + t * width;
  }
};

}  // namespace based::cpu::BASED_ISA
