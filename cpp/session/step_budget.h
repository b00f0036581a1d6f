#pragma once

#include <algorithm>
#include <cstdint>

namespace based {

/// How many tokens of prompts a step may take, so that it lasts `allowance` times as long as a step without prompts
/// will when all who are there have begun. Whoever joins waits for the step under way, then for its own; whoever runs
/// gets its tokens that much later.
class StepBudget {
 public:
  /// cut: the least number, and what numbers are rounded down to. most: the greatest. fixed: the number, if not 0.
  /// row_cost: bytes that a step moves for a sample, of those that it moves anyway, the weights.
  StepBudget(std::int64_t cut, std::int64_t most, std::int64_t fixed, double row_cost)
      : cut_(cut),
        most_(most),
        fixed_(fixed),
        row_cost_(row_cost),
        tokens_(static_cast<double>(std::max(cut, most / 8))) {}

  std::int64_t tokens() const {
    if (fixed_ > 0) return fixed_;
    return std::max(static_cast<std::int64_t>(tokens_) / cut_ * cut_, cut_);
  }

  /// Whether the time of steps without prompts is known. The first one may have been recorded, which takes longer.
  bool knows_plain() const { return num_plain_ >= 2; }

  /// A step of `rows` samples and `prompt` tokens of prompts took so long. expected: samples that run soon, `rows`
  /// among them.
  void measured(std::int64_t rows, std::int64_t prompt, std::int64_t expected, double seconds) {
    if (prompt == 0) {
      const double each = seconds / bytes(rows);
      // What a step takes longer than others at times is not its length.
      plain_ = num_plain_ == 0 ? each : std::min(each, plain_ + 0.2 * (each - plain_));
      ++num_plain_;
    }
    if (prompt < tokens()) return;
    const double aim = std::max(allowance(expected) * plain_ * bytes(expected), kShort);
    tokens_ = std::clamp(tokens_ * std::clamp(aim / seconds, 0.5, 1.25), static_cast<double>(cut_),
                         static_cast<double>(most_));
  }

 private:
  // Of few samples, what joins should begin soon; of many, prompts should get most of the time: less than 3, so that
  // with what steps vary, the longest 1 % of gaps between tokens stay below 3 times the median.
  static double allowance(std::int64_t rows) {
    return 1.5 + 1.25 * static_cast<double>(std::min<std::int64_t>(rows, kMany)) / kMany;
  }
  double bytes(std::int64_t rows) const { return 1 + static_cast<double>(rows) * row_cost_; }
  static constexpr std::int64_t kMany = 32;
  static constexpr double kShort = 0.005;  // seconds: nobody minds, and small pieces of a prompt take longer in all

  std::int64_t cut_, most_, fixed_;
  double row_cost_;
  double tokens_;
  double plain_ = 0;  // seconds of a step without prompts, over bytes(rows)
  std::int64_t num_plain_ = 0;
};

}  // namespace based
