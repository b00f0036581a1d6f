#include "session/request.h"

#include <algorithm>
#include <random>

namespace based {

std::uint64_t fresh_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

std::vector<std::int32_t> stop_ids_of(const SamplingParams& params, const ModelConfig& config) {
  std::vector<std::int32_t> ids(params.stop_token_ids.begin(), params.stop_token_ids.end());
  if (const auto eos = config.eos_token_id; eos && !params.ignore_eos) ids.push_back(static_cast<std::int32_t>(*eos));
  return ids;
}

FinishReason finish_of(std::int32_t token, const SamplingParams& params, const std::vector<std::int32_t>& stop_ids,
                       std::int64_t taken, std::int64_t most) {
  if (std::ranges::count(stop_ids, token) > 0) return FinishReason::stop;
  const bool is_full = taken >= most && params.max_tokens == SamplingParams::kNoLimit;
  return taken >= params.max_tokens || is_full ? FinishReason::length : FinishReason::none;
}

std::int64_t room_behind(const Model& model, std::int64_t seen, bool feeds_last) {
  const auto max_context = model.max_context();
  if (!max_context) return SamplingParams::kNoLimit;
  return *max_context - seen + (feeds_last ? 0 : 1);
}

std::string out_of_room(const Model& model) {
  return "the sequence has reached the model's max_context, " + std::to_string(*model.max_context()) +
         " tokens: " + model.impl().context_advice();
}

}  // namespace based
