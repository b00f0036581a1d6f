#pragma once

// What comes out when the memory that a model works in held something else before.

#include <memory>
#include <utility>
#include <vector>

#include "based/generation.h"
#include "based/session.h"
#include "faulty_backend.h"
#include "tiny_model.h"

namespace based::test {

/// Logits and log-probabilities of prompts, steps, a generation and a score, on a backend whose allocations hold `fill`
/// in every byte.
inline std::vector<float> results_in_filled_memory(const ModelConfig& config, std::unique_ptr<backend::Backend> device,
                                                   DType dtype, std::byte fill) {
  const auto faults = std::make_shared<Faults>();
  faults->fill = fill;
  RandomWeights weights(31);
  const auto model =
      Model::Impl::make(config, std::make_unique<FaultyBackend>(std::move(device), faults), weights, dtype);
  std::vector<float> results;
  const auto keep = [&](const Tensor& tensor) {
    const std::size_t begin = results.size();
    results.resize(begin + static_cast<std::size_t>(tensor.size()));
    const auto lease = model->impl().executors.lease();
    lease->backend().copy_to_host(results.data() + begin, tensor.data(), tensor.nbytes());
  };
  const auto tokens = [&](std::size_t count, std::uint32_t seed) {
    return random_tokens(count, seed, config.vocab_size);
  };
  Session session(model, 5);
  for (std::uint32_t round = 0; round < 2; ++round)
    keep(session.prefill(std::vector<std::vector<std::int32_t>>{tokens(300, round), tokens(1, round), tokens(70, round),
                                                                tokens(2, round), tokens(129, round)}));
  for (std::uint32_t t = 0; t < 4; ++t) keep(session.step(tokens(5, 40 + t)));
  const std::vector<int> some{4, 0, 2};
  keep(session.step(tokens(3, 50), some));
  keep(session.fork()->step(tokens(5, 51)));

  const std::vector<float> scores = model->score(tokens(150, 7));
  results.insert(results.end(), scores.begin(), scores.end());
  SamplingParams params = greedy(12);
  params.logprobs = 3;
  params.repetition_penalty = 1.2;
  Generator generator(model, {{tokens(20, 8), params}, {tokens(3, 9), params}}, 2);
  while (!generator.done())
    for (const TokenEvent& event : generator.next()) results.push_back(event.logprob);
  return results;
}

}  // namespace based::test
