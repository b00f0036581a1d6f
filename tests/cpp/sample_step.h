#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "backend/backend.h"

namespace based {

/// Samples one token for each sampler row; row i reads logits row i. positions: of the chosen tokens.
inline std::vector<backend::SampledToken> sample_step(backend::Backend& backend, backend::Sampler& sampler,
                                                      const backend::Matrix& logits, std::span<const std::int32_t> rows,
                                                      std::span<const std::int64_t> positions) {
  std::vector<std::int32_t> offsets(rows.size() + 1);
  std::iota(offsets.begin(), offsets.end(), 0);
  std::vector<std::int64_t> before;
  for (const std::int64_t position : positions) before.push_back(position - 1);
  const backend::RaggedBatch batch{{}, offsets, rows, before};
  backend.begin(batch);
  sampler.sample(logits, batch);
  return sampler.take();
}

}  // namespace based
