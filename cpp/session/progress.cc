#include "session/progress.h"

#include <algorithm>
#include <utility>

namespace based {

using backend::SeenToken;

void SeenTokens::add_prompt(std::span<const std::int32_t> tokens) {
  unsettled_.insert(unsettled_.end(), tokens.begin(), tokens.end());
}

void SeenTokens::add_output(std::int32_t token) { unsettled_.push_back(~token); }

void SeenTokens::reserve_one() {
  if (unsettled_.size() >= kMostUnsettled) settle();
  constexpr std::size_t kSpare = 8;  // a generator runs a few steps ahead of what it counts
  if (unsettled_.capacity() - unsettled_.size() < kSpare) unsettled_.reserve(2 * unsettled_.size() + 2 * kSpare);
}

void SeenTokens::settle() const {
  if (unsettled_.empty()) return;
  std::vector<SeenToken> added;
  added.reserve(unsettled_.size());
  for (const std::int32_t item : unsettled_)
    added.push_back(item >= 0 ? SeenToken{item, true, 0} : SeenToken{~item, false, 1});
  std::ranges::sort(added, {}, &SeenToken::token);

  std::vector<SeenToken> merged;
  merged.reserve(entries_.size() + added.size());
  const auto add = [&merged](const SeenToken& entry) {
    if (merged.empty() || merged.back().token != entry.token) {
      merged.push_back(entry);
    } else {
      merged.back().in_prompt |= entry.in_prompt;
      merged.back().num_outputs += entry.num_outputs;
    }
  };
  auto old = entries_.begin();
  for (const SeenToken& entry : added) {
    for (; old != entries_.end() && old->token <= entry.token; ++old) add(*old);
    add(entry);
  }
  for (; old != entries_.end(); ++old) add(*old);
  entries_ = std::move(merged);
  unsettled_.clear();
}

SeenTokens SeenTokens::from_entries(std::vector<SeenToken> entries) {
  SeenTokens seen;
  seen.entries_ = std::move(entries);
  return seen;
}

}  // namespace based
