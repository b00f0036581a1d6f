#pragma once

// What a request means, for Generator and Engine.

#include <cstdint>
#include <string>
#include <vector>

#include "based/generation.h"
#include "model/model_impl.h"

namespace based {

std::uint64_t fresh_seed();

/// The tokens that end a sequence: stop_token_ids and the model's end token.
std::vector<std::int32_t> stop_ids_of(const SamplingParams& params, const ModelConfig& config);

/// How a sequence ends with `token`, the last of its `taken` tokens; none: it goes on. `most`: the tokens that it has
/// room for.
FinishReason finish_of(std::int32_t token, const SamplingParams& params, const std::vector<std::int32_t>& stop_ids,
                       std::int64_t taken, std::int64_t most);

/// Tokens that may be chosen behind `seen` others. `feeds_last`: the sequence is to see the last one, too.
std::int64_t room_behind(const Model& model, std::int64_t seen, bool feeds_last);

/// Why a sequence that has no room is ended.
std::string out_of_room(const Model& model);

}  // namespace based
