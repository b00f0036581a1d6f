#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>

#include "based/model.h"

namespace based {

/// What one sequence has seen, at one moment: its state of every layer, its number of tokens, and what going on needs
/// (the last hidden vector, from which logits follow; the tokens that penalties have counted). Immutable, so that any
/// number of threads, sessions and checkpoints may share it; keeps its model alive. Made by Session::snapshot and load.
class State : public std::enable_shared_from_this<State> {
 public:
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  const std::shared_ptr<const Model>& model() const;

  /// Tokens seen.
  std::int64_t num_tokens() const;

  /// Device memory that it holds, bytes: 0 when nothing has been seen.
  std::size_t nbytes() const;

  /// Saves it as a state file of one sequence (docs/state-format.md): written aside, then renamed. Throws IoError.
  void save(const std::filesystem::path& path) const;

  /// Sequence `sequence` of a state file; none: the only one. Throws StateError on another model, format version or
  /// number of sequences, FormatError on a damaged file, IoError, OutOfMemory.
  static std::shared_ptr<const State> load(const std::filesystem::path& path, std::shared_ptr<const Model> model,
                                           std::optional<int> sequence = std::nullopt);

  class Impl;
  const Impl& impl() const { return *impl_; }
  explicit State(std::unique_ptr<Impl> impl);

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace based
