#pragma once

#include <cstdint>

namespace based::cpu {

/// Backend::rwkv4_shift and rwkv7_shift, with N mixes, for one sequence and channels [channel_begin, channel_end).
/// Pointers are to the sequence's first token of the call.
template <int N>
struct TokenShiftTask {
  const void* x;        // (tokens, d) float, or bfloat16 when bf16; so mixed
  const float* mix[N];  // (d)
  void* mixed[N];       // (tokens, d)
  bool bf16;
  std::int64_t hidden_size, num_tokens;
  std::int64_t channel_begin, channel_end;
  float* before;  // (d): the token before
};

}  // namespace based::cpu
