// The selective scan: its convolution is that of gated_conv; a task of the scan is a sequence and some channels. The
// arithmetic is in kernels/.

#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/selective_scan.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

constexpr std::int64_t kScanChannels = 128;  // of a task

std::int64_t thread_floats(const SelectiveScanConfig& config) { return kScanScratch * config.state_size; }

}  // namespace

std::size_t scratch_nbytes(const SelectiveScanConfig& config, const Lengths& lengths, Isa, int num_threads) {
  return std::max(conv_scratch_nbytes(config.kernel_size, lengths, num_threads),
                  plan_nbytes<ThreadFloats>(num_threads, thread_floats(config)));
}

void CpuBackend::scan_conv(const SelectiveScanConfig& config, const float* taps, const float* bias,
                           const RaggedBatch& batch, const Matrix& xz, backend::StatePool& states, int layer,
                           const Matrix& x) {
  convolve(config.kernel_size, taps, bias, false, batch, xz, states, layer, x);
}

void CpuBackend::selective_scan(const SelectiveScanConfig& config, const backend::ScanOperands& operands,
                                const RaggedBatch& batch, backend::StatePool& states, int layer, const Matrix& out) {
  const SelectiveScanKernels& kernels =
      for_isa(isa_, [](auto tag) -> const SelectiveScanKernels& { return selective_scan_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  Carver carver(scratch(plan_nbytes<ThreadFloats>(num_threads(), thread_floats(config))));
  const ThreadFloats floats(carver, num_threads(), thread_floats(config));
  const std::int64_t e = config.inner_size, blocks = ceil_div(e, kScanChannels);
  pool_->run(batch.num_sequences() * blocks, [&](std::int64_t index, int thread) {
    const std::int64_t b = index / blocks, first = batch.offsets[b], channel = index % blocks * kScanChannels;
    SelectiveScanTask task;
    task.a = operands.a;
    task.d = operands.d;
    task.xz = row(operands.xz, first);
    task.x = row(operands.x, first);
    task.bc = row(operands.bc, first);
    task.dt = row(operands.dt, first);
    task.inner_size = e;
    task.state_size = config.state_size;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.channel_begin = channel;
    task.channel_end = std::min(channel + kScanChannels, e);
    task.state = pool.layer<float>(batch.slots[b], layer, 1);
    task.out = element(out, first, 0);
    task.out_bf16 = is_bf16(out);
    task.scratch = floats.of(thread);
    kernels.scan(task);
  });
}

}  // namespace based::cpu
