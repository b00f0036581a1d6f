#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"

namespace based {

/// The final norm's output at a sequence's last token, (d) in the activation dtype: logits are its product with the
/// head, at 1/28 of their size. Row `row` of a device matrix; `rows` without data: not known.
struct LastHidden {
  backend::Buffer rows;
  std::int64_t row = 0;
};

/// The tokens that a sequence has seen, as penalties count them. Holds 12 bytes for each different token.
class SeenTokens {
 public:
  void add_prompt(std::span<const std::int32_t> tokens);
  void add_output(std::int32_t token);

  /// The next few tokens that are added one by one take no memory.
  void reserve_one();

  /// By rising token, each once. Settles what was added since the last call: not to be called by two threads at once
  /// unless settle() came before.
  std::span<const backend::SeenToken> entries() const {
    settle();
    return entries_;
  }
  void settle() const;

  /// By rising token, each once.
  static SeenTokens from_entries(std::vector<backend::SeenToken> entries);

 private:
  static constexpr std::size_t kMostUnsettled = 4096;

  mutable std::vector<backend::SeenToken> entries_;
  mutable std::vector<std::int32_t> unsettled_;  // a token of a prompt, or ~token of an output
};

/// What is kept of a sequence beside its slot of a state pool.
struct Progress {
  std::int64_t num_tokens = 0;
  LastHidden last;
  SeenTokens seen;
};

}  // namespace based
