#include <cmath>
#include <sstream>
#include <string>

#include "based/error.h"
#include "based/sampling.h"

namespace based {
namespace {

template <typename T>
void check(bool ok, const std::string& field, const T& value, const std::string& domain) {
  if (ok) return;
  std::ostringstream message;
  message << "SamplingParams: " << field << " is " << value << ", expected " << domain;
  throw InvalidArgument(message.str());
}

// NaN lies in no interval.
bool in(double value, double low, double high) { return value >= low && value <= high; }

void check_token(const std::string& field, std::int64_t token, std::int64_t vocab_size) {
  check(token >= 0 && token < vocab_size, field, token, "a token id, 0 … " + std::to_string(vocab_size - 1));
}

}  // namespace

void SamplingParams::validate(std::int64_t vocab_size) const {
  check(n >= 1 && n <= kMaxSamples, "n", n, "1 … " + std::to_string(kMaxSamples));
  check(max_tokens >= 1, "max_tokens", max_tokens, "at least 1");
  check(min_tokens >= 0 && min_tokens <= max_tokens, "min_tokens", min_tokens,
        "0 … max_tokens (" + std::to_string(max_tokens) + ")");
  check(temperature >= 0 && std::isfinite(temperature), "temperature", temperature, "a finite number, at least 0");
  check(top_p > 0 && top_p <= 1, "top_p", top_p, "above 0 and at most 1");
  check(top_k >= -1, "top_k", top_k, "at least 1, or 0 or -1 for all");
  check(in(min_p, 0, 1), "min_p", min_p, "0 to 1");
  check(repetition_penalty > 0 && std::isfinite(repetition_penalty), "repetition_penalty", repetition_penalty,
        "a finite number above 0");
  check(in(presence_penalty, -2, 2), "presence_penalty", presence_penalty, "-2 to 2");
  check(in(frequency_penalty, -2, 2), "frequency_penalty", frequency_penalty, "-2 to 2");
  for (std::int64_t token : stop_token_ids) check_token("stop_token_ids: an element", token, vocab_size);
  if (logprobs) check(*logprobs >= 0, "logprobs", *logprobs, "at least 0");
  for (const auto& [token, bias] : logit_bias) {
    check_token("logit_bias: a key", token, vocab_size);
    check(in(bias, -100, 100), "logit_bias of token " + std::to_string(token), bias, "-100 to 100");
  }
}

}  // namespace based
