#pragma once

#include <algorithm>
#include <cstdint>

namespace based {

/// How many tokens of prompts a step may take, so that it lasts `allowance` times as long as a step without prompts.
/// Whoever joins waits for the step under way, then for its own; whoever runs gets its tokens that much later.
class StepBudget {
 public:
  /// cut: the least number, and what numbers are rounded down to. most: the greatest. fixed: the number, if not 0.
  StepBudget(std::int64_t cut, std::int64_t most, std::int64_t fixed)
      : cut_(cut), most_(most), fixed_(fixed), tokens_(static_cast<double>(std::max(cut, most / 8))) {}

  std::int64_t tokens() const {
    if (fixed_ > 0) return fixed_;
    return std::max(static_cast<std::int64_t>(tokens_) / cut_ * cut_, cut_);
  }

  /// A step of `rows` samples and `prompt` tokens of prompts took so long.
  void measured(std::int64_t rows, std::int64_t prompt, double seconds) {
    const bool is_plain = prompt == 0 || (rows + prompt <= cut_ && (plain_ == 0 || seconds < plain_));
    if (is_plain) plain_ = plain_ == 0 ? seconds : plain_ + 0.2 * (seconds - plain_);
    if (prompt < tokens()) return;
    const double aim = std::max(allowance(rows) * plain_, kShort);
    tokens_ = std::clamp(tokens_ * std::clamp(aim / seconds, 0.5, 1.25), static_cast<double>(cut_),
                         static_cast<double>(most_));
  }

 private:
  // Of few samples, what joins should begin soon; of many, prompts and tokens should get about equal shares of time.
  static double allowance(std::int64_t rows) {
    return 1.5 + 1.5 * static_cast<double>(std::min<std::int64_t>(rows, kMany)) / kMany;
  }
  static constexpr std::int64_t kMany = 32;
  static constexpr double kShort = 0.005;  // seconds: nobody minds, and small pieces of a prompt take longer in all

  std::int64_t cut_, most_, fixed_;
  double tokens_;
  double plain_ = 0;  // seconds of a step without prompts; 0: not measured
};

}  // namespace based
