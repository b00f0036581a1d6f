#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "based/tensor.h"
#include "io/safetensors.h"

namespace based::io {

/// The saved form of one sequence's state: tensors named as Backend::export_state names them.
struct SavedState {
  std::int64_t num_tokens = 0;
  std::vector<TensorToWrite> tensors;
};

/// Saves B states in one safetensors file of the newest version (docs/state-format.md). Metadata: format "based-state",
/// format_version, fingerprint, num_tokens (comma-separated, B numbers), checksum of the data. Tensor names:
/// sequences.{b}.{name}.
void write_state_file(const std::filesystem::path& path, const std::string& fingerprint,
                      const std::vector<SavedState>& states);

/// A state file, checked: format, version, checksum, token counts. Throws FormatError when damaged, StateError when
/// format_version is another one, or the fingerprint none of `fingerprints` (of the model, newest first).
struct StateFile {
  std::shared_ptr<const SafetensorsFile> file;
  std::vector<SavedState> states;  // views into `file`

  /// Reads the file into memory. Throws IoError, OutOfMemory, too.
  static StateFile open(const std::filesystem::path& path, const std::vector<std::string>& fingerprints);
  static StateFile check(std::shared_ptr<const SafetensorsFile> file, const std::vector<std::string>& fingerprints);
};

}  // namespace based::io
