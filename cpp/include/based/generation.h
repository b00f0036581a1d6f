#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "based/model.h"
#include "based/sampling.h"
#include "based/session.h"

namespace based {

struct GenerationRequest {
  std::vector<std::int32_t> prompt;  // may be empty on a session whose sequence has seen a token: it goes on from there
  SamplingParams params;
};

/// length: it has max_tokens tokens, or, if these have no limit, as many as Model::max_context has room for.
/// error: this sample cannot go on (TokenEvent::error says why), as one that reaches max_context before its max_tokens;
/// others do. abort: an Engine's request was cancelled, was too late or was shut down.
enum class FinishReason : std::uint8_t { none, stop, length, error, abort };

/// One new token of one sample of one request.
struct TokenEvent {
  int request = 0;
  int sample = 0;  // 0 … n − 1
  std::int32_t token = 0;
  float logprob = 0;                       // log-probability of `token` under the model's own distribution
  std::vector<TokenLogprob> top_logprobs;  // likeliest first; as many as params.logprobs asks
  FinishReason finish = FinishReason::none;
  std::optional<std::int32_t> stop_token;  // the token that ended it, when finish == stop
  std::string error;                       // why there is no token (`token` is −1), when finish == error
};

/// Runs requests to their ends, one token per sequence and call, admitting waiting requests as others finish. What a
/// request yields depends on nothing but the model, its prompt and its params (and what a session's sequence has seen);
/// one that cannot go on ends with FinishReason::error. One thread at a time. Keeps one of the model's executors.
class Generator {
 public:
  /// A session of its own, of at most `max_batch_size` sequences, and of no more than these requests have samples.
  Generator(std::shared_ptr<const Model> model, std::vector<GenerationRequest> requests, int max_batch_size);

  /// On a caller's session, which must outlive this: request i continues sequence i; every n must be 1. When it is
  /// done(), the session has seen every prompt and every token returned. Penalties count what the sequences saw
  /// before.
  Generator(Session& session, std::vector<GenerationRequest> requests);
  ~Generator();
  Generator(const Generator&) = delete;
  Generator& operator=(const Generator&) = delete;

  /// Gives a generator with a session of its own one more request, at any time between two calls; returns its number.
  /// Forgets the first requests, as far as they have ended. Throws InvalidArgument.
  int add(GenerationRequest request);

  bool done() const;

  /// Advances every running sequence by one token. Empty only when done(). `interrupt` is called before each step too:
  /// what it throws comes out between two tokens, and the next call goes on. `last_interrupt` is called once, at the
  /// end: what it throws leaves the tokens to the next call.
  std::vector<TokenEvent> next(const InterruptCheck& interrupt = {}, const InterruptCheck& last_interrupt = {});

  /// Ends a sample early (a stop string was found, the reader lost interest). No effect on one that has ended.
  /// num_read: of the sample's tokens, that the caller has read; all that earlier calls of next() gave must have been.
  /// A caller's session does not see tokens that were not read; on a GPU, where steps run ahead, it may have seen one.
  void finish(int request, int sample, std::int64_t num_read = kAllTokens);
  static constexpr std::int64_t kAllTokens = std::numeric_limits<std::int64_t>::max();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace based
