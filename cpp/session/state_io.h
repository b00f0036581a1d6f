#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "based/model.h"
#include "io/state_file.h"
#include "session/progress.h"

namespace based {

/// A sequence to save: a slot of a pool, and what is kept beside it. Without a pool: a sequence that has seen nothing.
struct SequenceView {
  const backend::StatePool* states = nullptr;
  int slot = 0;
  const Progress* progress = nullptr;
  std::span<const std::int32_t> tokens = {};  // all that it has seen, where the file is to say so
};

/// The saved form of sequences, on the host.
class ExportedStates {
 public:
  /// Throws OutOfMemory.
  ExportedStates(const Model& model, backend::Backend& backend, std::span<const SequenceView> sequences);

  /// At least the bytes of the file.
  std::size_t file_nbytes() const;
  /// Throws IoError.
  void write(const std::filesystem::path& path) const;

 private:
  std::string fingerprint_;
  std::vector<io::SavedState> saved_;
  std::vector<backend::NamedTensor> tensors_;  // own what saved_ views
};

/// Saves sequences as one state file (docs/state-format.md). Throws IoError, OutOfMemory.
void save_states(const std::filesystem::path& path, const Model& model, backend::Backend& backend,
                 std::span<const SequenceView> sequences);

/// A state file of this model, every tensor checked to have the name, dtype and shape that the config, the token counts
/// and the numbers of pending tokens give. Throws IoError, FormatError, StateError.
class StateFileReader {
 public:
  StateFileReader(const std::filesystem::path& path, const Model& model);

  std::size_t num_sequences() const { return sequences_.size(); }

  /// Writes sequence `sequence` into a fresh slot and returns what is kept beside it.
  Progress read(int sequence, backend::Backend& backend, backend::StatePool& states, int slot) const;

  /// Whether the file says that the sequence has seen these tokens.
  bool has_tokens(int sequence, std::span<const std::int32_t> tokens) const;

 private:
  struct Sequence {
    std::int64_t num_tokens = 0;
    std::vector<backend::NamedView> tensors;  // in the order of Backend::export_state
    TensorView last_hidden, tokens;           // without data: the file has none
    std::vector<backend::SeenToken> seen;
  };
  const Model& model_;
  std::shared_ptr<const io::SafetensorsFile> file_;  // keeps what the views see
  std::vector<Sequence> sequences_;
};

}  // namespace based
