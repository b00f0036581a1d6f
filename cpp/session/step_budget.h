#pragma once

#include <algorithm>
#include <cstdint>

namespace based {

/// How many tokens of prompts a step may take, so that it lasts `allowance` times as long as a step without prompts
/// will when all who are there have begun. Whoever joins waits for the steps under way, then for its own; whoever runs
/// gets its tokens that much later. A step is taken to last as long as its samples alone, and so much longer for each
/// token of prompts: both are measured.
class StepBudget {
 public:
  /// cut: the least number, and what numbers are rounded down to. most: the greatest. fixed: the number, if not 0.
  /// row_cost: bytes that a step moves for a sample, of those that it moves anyway, the weights.
  StepBudget(std::int64_t cut, std::int64_t most, std::int64_t fixed, double row_cost)
      : cut_(cut), most_(most), fixed_(fixed), row_cost_(row_cost) {}

  /// Of a step of `rows` samples. expected: samples that run soon, `rows` among them.
  std::int64_t tokens(std::int64_t rows, std::int64_t expected) const {
    if (fixed_ > 0) return fixed_;
    double count = static_cast<double>(most_) / 8;  // until a step was measured
    if (per_token_ > 0) {
      const double aim = std::max(allowance(rows, expected) * plain(expected), kShort);
      count = (aim - plain(rows)) / per_token_;
    }
    return std::max(static_cast<std::int64_t>(std::min(count, static_cast<double>(most_))) / cut_ * cut_, cut_);
  }

  /// Whether the time of steps without prompts is known. The first one may have been recorded, which takes longer.
  bool knows_plain() const { return num_plain_ >= 2; }

  /// A step of `rows` samples and `prompt` tokens of prompts, of `budget` that it might have had, took so long.
  void measured(std::int64_t rows, std::int64_t prompt, std::int64_t budget, double seconds) {
    seconds = std::max(seconds, 1e-6);
    if (prompt == 0)
      measured_plain(seconds / bytes(rows));
    else
      measured_prompt(std::max(seconds - plain(rows), seconds / 4) / static_cast<double>(prompt),
                      std::min(1.0, static_cast<double>(prompt) / static_cast<double>(std::max(budget, cut_))));
  }

 private:
  // What a step takes longer than others at times is not its length; nor is what one seems to take that had ended long
  // before it was looked at.
  void measured_plain(double each) {
    if (num_plain_++ < 2)
      plain_ = num_plain_ == 1 ? each : std::min(each, plain_);
    else
      plain_ = std::clamp(each, 0.9 * plain_, 1.1 * plain_);  // the median, in the end
  }

  // A token of a short prompt takes longer than one of many: it counts for less. A kernel that is loaded may make a
  // step a hundred times as long, the first ones above all.
  void measured_prompt(double each, double weight) {
    if (num_prompts_++ < 2)
      per_token_ = num_prompts_ == 1 ? each : std::min(each, per_token_);
    else
      per_token_ +=
          (each < per_token_ ? 0.5 : 0.3) * weight * (std::clamp(each, per_token_ / 4, per_token_ * 2) - per_token_);
  }

  // Of few samples, what joins should begin soon; of many, prompts should get most of the time: so much below 3 that
  // with what steps and a server vary, the longest 1 % of gaps stay below 3 times the median. Where more wait than a
  // quarter of those who run, most steps have prompts, and the median is longer, too. While more than three times as
  // many wait as run, the few who run wait longer: that is less than 1 % of all gaps.
  static double allowance(std::int64_t rows, std::int64_t expected) {
    const double many = static_cast<double>(std::min(expected, kMany)) / kMany;
    const double usual = 1.5 + 0.85 * many;
    const double waiting = static_cast<double>(expected - rows) / static_cast<double>(std::max<std::int64_t>(rows, 1));
    const double longer = usual * (1 + many * std::max(waiting - 0.25, 0.0));
    return std::max(std::min(longer, 2.9), usual * waiting / 3);
  }
  double bytes(std::int64_t rows) const { return 1 + static_cast<double>(rows) * row_cost_; }
  double plain(std::int64_t rows) const { return plain_ * bytes(rows); }  // seconds
  static constexpr std::int64_t kMany = 32;
  static constexpr double kShort = 0.004;  // seconds: nobody minds, and small pieces of a prompt take longer in all

  std::int64_t cut_, most_, fixed_;
  double row_cost_;
  double plain_ = 0;      // seconds of a step without prompts, over bytes(rows)
  double per_token_ = 0;  // seconds that a token of a prompt adds
  std::int64_t num_plain_ = 0, num_prompts_ = 0;
};

}  // namespace based
