#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "based/model.h"

namespace based {

/// Saves every slot of `states`; num_tokens (capacity).
void save_states(const std::filesystem::path& path, const Model& model, backend::Backend& backend,
                 const backend::StatePool& states, std::span<const std::int64_t> num_tokens);

struct LoadedStates {
  std::unique_ptr<backend::StatePool> states;
  std::vector<std::int64_t> num_tokens;
};

/// A new pool filled from a file that must hold `batch_size` sequences of this model, every tensor with the name, dtype
/// and shape that the config, its token count and its number of pending tokens give. Throws IoError, FormatError,
/// StateError.
LoadedStates load_states(const std::filesystem::path& path, const Model& model, backend::Backend& backend,
                         int batch_size);

}  // namespace based
