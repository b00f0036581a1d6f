// Hyena: a task is a sequence and some channels. The arithmetic is in kernels/.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/hyena.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

constexpr std::int64_t kChannels = 64;  // of a task

}  // namespace

std::size_t scratch_nbytes(const HyenaConfig&, const Lengths&, Isa, int) { return 0; }

void CpuBackend::hyena(const HyenaConfig& config, const backend::HyenaOperands& operands, const RaggedBatch& batch,
                       const Matrix& u, backend::StatePool& states, int layer, const Matrix& out) {
  const HyenaKernels& kernels = for_isa(isa_, [](auto tag) -> const HyenaKernels& { return hyena_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  const Lengths lengths(batch);
  for (std::int64_t b = 0; b < lengths.num_sequences(); ++b)
    if (lengths.start(b) + lengths.tokens(b) > config.max_length)
      throw std::logic_error("hyena: a sequence of " + std::to_string(lengths.start(b) + lengths.tokens(b)) +
                             " tokens was not refused, the filter has " + std::to_string(config.max_length));
  const std::int64_t e = config.inner_size, blocks = ceil_div(e, kChannels);
  pool_->run(batch.num_sequences() * blocks, [&](std::int64_t index, int) {
    const std::int64_t b = index / blocks, first = batch.offsets[b];
    HyenaTask task;
    task.taps = operands.taps;
    task.bias = operands.bias;
    task.filter = operands.filter;
    task.skip = operands.skip;
    task.u = row(u, first);
    task.inner_size = e;
    task.kernel_size = config.kernel_size;
    task.start = lengths.start(b);
    task.num_tokens = lengths.tokens(b);
    task.channel_begin = index % blocks * kChannels;
    task.channel_end = std::min(task.channel_begin + kChannels, e);
    task.past = pool.layer<float>(batch.slots[b], layer, 0);
    task.products = pool.layer<float>(batch.slots[b], layer, 1);
    task.out = element(out, first, 0);
    task.out_bf16 = is_bf16(out);
    kernels.advance(task);
  });
}

}  // namespace based::cpu
