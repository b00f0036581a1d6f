#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Backend::selective_scan for one sequence and channels [channel_begin, channel_end). Pointers are to the sequence's
/// first token of the call.
struct SelectiveScanTask {
  const float* a;   // (N, e)
  const float* d;   // (e)
  const float* xz;  // rows [· (e) | z (e)]
  const float* x;   // (tokens, e)
  const float* bc;  // rows [B (N) | C (N)]
  const float* dt;  // (tokens, e)
  std::int64_t inner_size, state_size, num_tokens;
  std::int64_t channel_begin, channel_end;
  float* state;  // (N, e)
  void* out;     // (tokens, e) float, or bfloat16 when out_bf16
  bool out_bf16;
  float* scratch;  // kScanScratch · N floats
};

inline constexpr std::int64_t kScanScratch = 32;  // the state and A of one vector of channels

struct SelectiveScanKernels {
  void (*scan)(const SelectiveScanTask& task);
};

const SelectiveScanKernels& selective_scan_kernels(IsaTag<Isa::baseline>);
const SelectiveScanKernels& selective_scan_kernels(IsaTag<Isa::avx2>);
const SelectiveScanKernels& selective_scan_kernels(IsaTag<Isa::avx512>);
const SelectiveScanKernels& selective_scan_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
