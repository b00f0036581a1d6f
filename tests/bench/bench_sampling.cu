// The CUDA sampler: its choices against a plain reference in double, the same choices from a recorded step, and times.
//   bench_sampling [check | graph | time]     none: all of them. Exit status 1 when a check fails.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend/cpu/philox.h"
#include "based/error.h"
#include "cuda_error.h"
#include "cuda_sampler.h"
#include "stream.h"

namespace {

using namespace based;
using based::backend::RaggedBatch;
using based::backend::SampledToken;
using based::cuda::check;
using Tokens = std::vector<std::int32_t>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int failures = 0;

template <typename... Arguments>
void expect(bool condition, const char* format, Arguments... arguments) {
  if (condition || ++failures > 20) return;
  std::printf("FAILED: ");
  std::printf(format, arguments...);
  std::printf("\n");
}

// ---- a device ------------------------------------------------------------------------------------------------------

struct Host final : cuda::SamplerHost {
  static constexpr std::size_t kMaxRows = 1024;
  std::shared_ptr<cuda::Stream> queue = std::make_shared<cuda::Stream>(0);
  std::shared_ptr<void> batch_memory = queue->allocate(kMaxRows * 24);
  cuda::DeviceBatch on_device;
  RaggedBatch batch;
  std::vector<std::function<void(const RaggedBatch&)>> recorded;
  bool recording = false, muted = false;

  cudaStream_t stream() const override { return queue->get(); }
  const cuda::DeviceBatch& device_batch(const RaggedBatch&) override { return on_device; }
  backend::Buffer allocate_workspace(std::size_t nbytes) override { return {queue->allocate(nbytes), nbytes}; }
  void copy_staged(void* device, const void* host, std::size_t nbytes) override {
    check(cudaMemcpyAsync(device, host, nbytes, cudaMemcpyHostToDevice, stream()), "copy");
    check(cudaStreamSynchronize(stream()), "copy");
  }
  void after_launch(std::function<void(const RaggedBatch&)> launched) override {
    if (recording) {
      recorded.push_back(std::move(launched));
    } else if (!muted) {
      launched(batch);
    }
  }
  void begin(const RaggedBatch& next) {
    batch = next;
    auto* data = static_cast<std::byte*>(batch_memory.get());
    const auto put = [&]<typename T>(std::size_t at, std::span<const T> values) {
      copy_staged(data + at * kMaxRows, values.data(), values.size_bytes());
      return reinterpret_cast<T*>(data + at * kMaxRows);
    };
    on_device = {};
    on_device.num_sequences = static_cast<int>(next.num_sequences());
    on_device.positions = put(0, next.positions);
    on_device.slots = put(8, next.slots);
    on_device.offsets = put(12, next.offsets);
    if (!next.logit_rows.empty()) on_device.logit_rows = put(20, next.logit_rows);
  }
};

// One token for each of `slots`, at `position`, from row logit_rows[b] (empty: b).
struct Batch {
  Tokens slots, offsets, logit_rows;
  std::vector<std::int64_t> positions;

  Batch(Tokens rows, std::int64_t position, Tokens from = {})
      : slots(std::move(rows)), offsets(slots.size() + 1), logit_rows(std::move(from)), positions(slots.size()) {
    std::iota(offsets.begin(), offsets.end(), 0);
    for (std::size_t b = 0; b < slots.size(); ++b) positions[b] = position - 1 + static_cast<std::int64_t>(b);
  }
  RaggedBatch view() const { return {{}, offsets, slots, positions, nullptr, logit_rows}; }
};

struct Logits {
  std::shared_ptr<void> memory;
  backend::Matrix matrix;

  Logits(Host& host, const std::vector<float>& values, std::int64_t rows) {
    memory = host.queue->allocate(values.size() * sizeof(float));
    host.copy_staged(memory.get(), values.data(), values.size() * sizeof(float));
    matrix = {memory.get(), DType::float32, rows, static_cast<std::int64_t>(values.size()) / rows};
  }
};

// ---- the reference -------------------------------------------------------------------------------------------------

struct Sequence {
  SamplingParams params;
  Tokens prompt, stop, output;
  std::uint64_t seed = 0;
  std::uint32_t number = 0;
};

double clean(float x) { return x == x ? std::min(x, std::numeric_limits<float>::max()) : -INFINITY; }

std::vector<std::int32_t> by_logit(const std::vector<float>& x) {
  std::vector<std::int32_t> order;
  for (std::size_t i = 0; i < x.size(); ++i)
    if (x[i] == x[i]) order.push_back(static_cast<std::int32_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
    return clean(x[static_cast<std::size_t>(a)]) > clean(x[static_cast<std::size_t>(b)]);
  });
  return order;
}

std::vector<float> changed(std::vector<float> x, const Sequence& s) {
  const SamplingParams& p = s.params;
  const auto at = [&](std::int64_t t) -> float& { return x[static_cast<std::size_t>(t)]; };
  for (const auto& [token, bias] : p.logit_bias) at(token) += static_cast<float>(bias);
  if (static_cast<std::int64_t>(s.output.size()) < p.min_tokens)
    for (auto token : s.stop) at(token) = -kInf;
  for (std::int32_t t = 0; t < static_cast<std::int32_t>(x.size()); ++t) {
    const auto count = std::count(s.output.begin(), s.output.end(), t);
    if (count == 0 && std::find(s.prompt.begin(), s.prompt.end(), t) == s.prompt.end()) continue;
    double y = at(t);
    y = y > 0 ? y / p.repetition_penalty : y * p.repetition_penalty;
    if (count > 0) y -= p.presence_penalty + p.frequency_penalty * static_cast<double>(count);
    at(t) = static_cast<float>(y);
  }
  return x;
}

// log Σ e^(x − max)
double log_sum(const std::vector<float>& x, double max) {
  double sum = 0;
  for (float v : x) sum += std::exp(clean(v) - max);
  return std::log(sum);
}

bool near(double a, double b) { return a == b || std::abs(a - b) < 2e-6 + 3e-7 * std::abs(b); }

// Whether `chosen` is what the sequence chooses at `position`, but for rounding.
void verify(const std::vector<float>& raw, const Sequence& s, std::int64_t position, const SampledToken& chosen,
            const char* name) {
  const auto order = by_logit(raw);
  const auto logit = [&](std::int32_t t) { return clean(raw[static_cast<std::size_t>(t)]); };
  const double highest = logit(order[0]), log_of_sum = log_sum(raw, highest);
  const auto log_prob = [&](std::int32_t t) { return logit(t) - highest - log_of_sum; };
  if (chosen.token < 0 || static_cast<std::size_t>(chosen.token) >= raw.size())
    return expect(false, "%s: token %d of %zu", name, chosen.token, raw.size());
  expect(near(chosen.logprob, log_prob(chosen.token)), "%s: logprob %.8g, expected %.8g", name,
         static_cast<double>(chosen.logprob), log_prob(chosen.token));
  const auto wanted = std::min(static_cast<std::size_t>(s.params.logprobs.value_or(0)), order.size());
  expect(chosen.top_logprobs.size() == wanted, "%s: %zu top_logprobs of %zu", name, chosen.top_logprobs.size(), wanted);
  for (std::size_t i = 0; i < std::min(wanted, chosen.top_logprobs.size()); ++i)
    expect(chosen.top_logprobs[i].token == order[i] && near(chosen.top_logprobs[i].logprob, log_prob(order[i])),
           "%s: top_logprobs[%zu] = %d, %.8g, expected %d, %.8g", name, i, chosen.top_logprobs[i].token,
           static_cast<double>(chosen.top_logprobs[i].logprob), order[i], log_prob(order[i]));

  const SamplingParams& p = s.params;
  const auto x = changed(raw, s);
  auto kept = by_logit(x);
  const double max = clean(x[static_cast<std::size_t>(kept[0])]);
  if (p.temperature == 0) return expect(chosen.token == kept[0], "%s: %d, expected %d", name, chosen.token, kept[0]);
  const double inverse = std::min(1 / p.temperature, 1e30);
  const auto weight = [&](std::int32_t t) {
    const double w = std::exp((clean(x[static_cast<std::size_t>(t)]) - max) * inverse);
    return w == w ? w : 0;
  };
  std::erase_if(kept, [&](auto t) { return weight(t) < std::max(p.min_p, 1e-30); });
  if (p.top_k > 0 && static_cast<std::size_t>(p.top_k) < kept.size()) kept.resize(static_cast<std::size_t>(p.top_k));
  double all = 0, sum = 0;
  for (auto t : kept) all += weight(t);
  std::size_t count = 0;
  while (count < kept.size() && (p.top_p == 1 || sum < p.top_p * all)) sum += weight(kept[count++]);
  const auto rank = static_cast<std::size_t>(std::find(kept.begin(), kept.end(), chosen.token) - kept.begin());
  expect(rank < count + (count > 1000 ? 1 : 0), "%s: token %d of rank %zu, kept are %zu", name, chosen.token, rank,
         count);
  kept.resize(count);
  std::sort(kept.begin(), kept.end());
  double below = 0;
  for (auto t : kept)
    if (t < chosen.token) below += weight(t) / sum;
  const double u = cpu::uniform(s.seed, s.number, static_cast<std::uint64_t>(position));
  expect(below - 1e-5 <= u && u <= below + weight(chosen.token) / sum + 1e-5,
         "%s: token %d is drawn in [%g, %g], not %g", name, chosen.token, below, below + weight(chosen.token) / sum, u);
}

// ---- checks --------------------------------------------------------------------------------------------------------

std::vector<float> make_logits(std::size_t size, unsigned seed, int kind) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> x(size);
  for (float& v : x) {
    v = normal(random);
    if (kind == 1) v = std::floor(v) / 2;  // many equal
    if (kind == 2) v = 0.25f;
    if (kind == 3 && random() % 4 == 0) v = std::vector<float>{kNan, -kInf, -0.0f, 1e30f, -1e38f}[random() % 5];
    if (kind == 4 && random() % 8 == 0) v = kInf;
    if (kind == 5) v = 100 + v / 1000;
  }
  if (kind == 3) x[size / 2] = 2;  // something to choose
  return x;
}

std::vector<SamplingParams> parameter_sets() {
  std::vector<SamplingParams> sets;
  const auto add = [&](auto&& change) {
    SamplingParams p;
    p.max_tokens = 100;
    change(p);
    sets.push_back(p);
  };
  add([](auto& p) { p.temperature = 0; });
  add([](auto&) {});
  for (double temperature : {1e-300, 0.3, 2.5, 1e300})
    for (std::int64_t top_k : {0, 1, 3, 40, 3000})
      for (double top_p : {1.0, 0.9, 0.3, 1e-9})
        add([&](auto& p) {
          p.temperature = temperature;
          p.top_k = top_k;
          p.top_p = top_p;
          p.min_p = top_k == 3 ? 0.02 : 0;
        });
  add([](auto& p) { p.min_p = 1; });
  add([](auto& p) { p.top_k = std::numeric_limits<std::int64_t>::max(); });
  for (int logprobs : {0, 1, 20, 2048, 5000, 1000000}) add([&](auto& p) { p.logprobs = logprobs; });
  for (double temperature : {0.0, 0.8})
    add([&](auto& p) {
      p.temperature = temperature;
      p.repetition_penalty = 1.3;
      p.presence_penalty = 0.5;
      p.frequency_penalty = 0.25;
      p.min_tokens = 2;
      p.logit_bias = {{0, 3.5}, {2, -1}, {0, 1.25}};
      p.top_p = 0.95;
      p.logprobs = 3;
    });
  return sets;
}

void check_choices(Host& host) {
  const auto sets = parameter_sets();
  for (std::size_t vocab : {3, 100, 5003, 50257}) {
    const std::size_t cols = vocab == 100 ? 100 : vocab + 7;  // aligned rows, and others
    const int kinds = vocab == 50257 ? 2 : 6;
    for (int kind = 0; kind < kinds; ++kind) {
      std::vector<float> values;
      for (unsigned row = 0; row < 2; ++row) {
        auto x = make_logits(vocab, 10 * row + static_cast<unsigned>(kind), kind);
        x.resize(cols, 1e6f);  // no tokens
        values.insert(values.end(), x.begin(), x.end());
      }
      const Logits logits(host, values, 2);
      const auto rows = static_cast<std::int32_t>(sets.size());
      cuda::CudaSampler sampler(host, static_cast<std::int64_t>(vocab), rows);
      std::vector<Sequence> sequences;
      Tokens slots, from;
      for (std::int32_t i = 0; i < rows; ++i) {
        Sequence s{sets[static_cast<std::size_t>(i)], {0, 1, 1}, {2}, {}, 77, static_cast<std::uint32_t>(i)};
        sampler.assign(i, s.params, s.seed, s.number, s.prompt, s.stop);
        sequences.push_back(std::move(s));
        slots.push_back(rows - 1 - i);
        from.push_back(i % 2);
      }
      slots[5] = -1;
      for (std::int64_t position = 9; position < 12; ++position) {
        const Batch batch(slots, position, from);
        host.begin(batch.view());
        sampler.sample(logits.matrix, batch.view());
        const auto chosen = sampler.take();
        for (std::size_t b = 0; b < slots.size(); ++b) {
          if (slots[b] < 0) continue;
          Sequence& s = sequences[static_cast<std::size_t>(slots[b])];
          const auto begin = values.begin() + from[b] * static_cast<std::ptrdiff_t>(cols);
          const std::string name = "vocabulary " + std::to_string(vocab) + ", logits " + std::to_string(kind) +
                                   ", parameters " + std::to_string(slots[b]) + ", position " +
                                   std::to_string(position);
          verify({begin, begin + static_cast<std::ptrdiff_t>(vocab)}, s, position + static_cast<std::int64_t>(b),
                 chosen[b], name.c_str());
          s.output.push_back(chosen[b].token);
        }
      }
    }
  }
}

void check_failures(Host& host) {
  for (int kind : {0, 1}) {
    const Logits logits(host, kind == 0 ? std::vector<float>{kNan, -kInf, kNan} : std::vector<float>{1, -kInf, kNan},
                        1);
    cuda::CudaSampler sampler(host, 3, 2);
    SamplingParams params;
    params.min_tokens = 1;
    sampler.assign(1, params, 0, 0, Tokens{0}, Tokens{0});
    const Batch batch({1}, 6);
    host.begin(batch.view());
    sampler.sample(logits.matrix, batch.view());
    const SampledToken result = sampler.take().at(0);
    const std::string& message = result.failure;
    expect(result.token == -1, "token %d of a failed row", result.token);
    const std::string expected = std::string("sampling row 1 at position 6: ") +
                                 (kind == 0 ? "all 3 logits" : "logit_bias, min_tokens and penalties leave no token");
    expect(message.rfind(expected, 0) == 0, "message '%s'", message.c_str());
  }
}

void check_log_probs(Host& host) {
  const std::int64_t rows = 5, cols = 1003, vocab = 1001;
  const auto values = make_logits(static_cast<std::size_t>(rows * cols), 3, 0);
  const Logits logits(host, values, rows);
  const Tokens targets{0, 1000, 17, 500, 999};
  const auto memory = host.queue->allocate(2 * 64);
  host.copy_staged(memory.get(), targets.data(), targets.size() * 4);
  auto* out = static_cast<float*>(memory.get()) + 16;
  cuda::token_log_probs(host.stream(), static_cast<const float*>(logits.matrix.data), rows, cols, vocab,
                        static_cast<const std::int32_t*>(memory.get()), out);
  float result[rows];
  check(cudaMemcpyAsync(result, out, sizeof(result), cudaMemcpyDeviceToHost, host.stream()), "copy");
  check(cudaStreamSynchronize(host.stream()), "copy");
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto begin = values.begin() + r * cols;
    const std::vector<float> x(begin, begin + vocab);
    const auto target = static_cast<std::size_t>(targets[static_cast<std::size_t>(r)]);
    const double expected =
        clean(x[target]) - *std::max_element(x.begin(), x.end()) - log_sum(x, *std::max_element(x.begin(), x.end()));
    expect(near(result[r], expected), "token_log_probs %g, expected %g", static_cast<double>(result[r]), expected);
  }
}

// A recorded step, replayed with other slots, positions and parameters, chooses as one that is not recorded.
void check_recorded(Host& host) {
  const std::size_t vocab = 5000;
  const int rows = 6;
  const Logits logits(host, make_logits(4 * vocab, 5, 1), 4);
  const auto sets = parameter_sets();
  cuda::CudaSampler plain(host, vocab, rows), recorded(host, vocab, rows);
  const auto assign = [&](int round) {
    for (int i = 0; i < rows; ++i)
      for (auto* sampler : {&plain, &recorded})
        sampler->assign(i, sets[static_cast<std::size_t>(round * 29 + i * 7) % sets.size()], 5, 0, Tokens{1},
                        Tokens{2});
  };
  assign(0);
  const Batch first({0, 1, 2, -1}, 3);
  host.begin(first.view());
  recorded.sample(logits.matrix, first.view());  // loads the kernel
  recorded.take();
  assign(0);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t step = nullptr;
  host.recording = true;
  check(cudaStreamBeginCapture(host.stream(), cudaStreamCaptureModeThreadLocal), "capture");
  recorded.sample(logits.matrix, first.view());
  check(cudaStreamEndCapture(host.stream(), &graph), "capture");
  host.recording = false;
  check(cudaGraphInstantiate(&step, graph, 0), "capture");
  for (int round = 0; round < 6; ++round) {
    if (round % 3 == 0) assign(round);
    const Batch batch({round, (round + 3) % 6, (round + 1) % 6, round % 2 == 0 ? -1 : (round + 2) % 6}, 100 + round);
    host.begin(batch.view());
    plain.sample(logits.matrix, batch.view());
    check(cudaGraphLaunch(step, host.stream()), "replay");
    for (const auto& launched : host.recorded) launched(host.batch);
    const auto expected = plain.take(), found = recorded.take();
    for (std::size_t b = 0; b < found.size(); ++b)
      expect(found[b].token == expected[b].token && found[b].logprob == expected[b].logprob &&
                 found[b].top_logprobs.size() == expected[b].top_logprobs.size(),
             "recorded step %d, sequence %zu: %d, expected %d", round, b, found[b].token, expected[b].token);
  }
  check(cudaGraphExecDestroy(step), "capture");
  check(cudaGraphDestroy(graph), "capture");
}

// ---- times ---------------------------------------------------------------------------------------------------------

void time_sampler(Host& host, const char* name, int rows, const SamplingParams& params) {
  const std::size_t vocab = 50257, cols = 50264;
  const Logits logits(host, make_logits(static_cast<std::size_t>(rows) * cols, 1, 0), rows);
  cuda::CudaSampler sampler(host, vocab, rows);
  Tokens slots(static_cast<std::size_t>(rows));
  std::iota(slots.begin(), slots.end(), 0);
  for (std::int32_t row : slots) sampler.assign(row, params, 1, static_cast<std::uint32_t>(row), Tokens{1, 2, 3}, {});
  const Batch batch(slots, 50);
  host.begin(batch.view());
  host.muted = true;  // nobody takes the tokens
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  const int steps = rows > 100 ? 20 : 100;
  std::vector<float> times;
  for (int repeat = 0; repeat < 7; ++repeat) {
    check(cudaEventRecord(begin, host.stream()), "event");
    for (int i = 0; i < steps; ++i) sampler.sample(logits.matrix, batch.view());
    check(cudaEventRecord(end, host.stream()), "event");
    check(cudaEventSynchronize(end), "event");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    times.push_back(1000 * milliseconds / static_cast<float>(steps));
  }
  host.muted = false;
  std::sort(times.begin(), times.end());
  std::printf("%-28s %5d rows %9.1f us\n", name, rows, static_cast<double>(times[3]));
  check(cudaEventDestroy(begin), "event");
  check(cudaEventDestroy(end), "event");
}

void time_all(Host& host) {
  SamplingParams greedy, plain, top_p, top_k, penalised, logprobs;
  greedy.temperature = 0;
  top_p.top_p = 0.9;
  top_k.top_k = 50;
  penalised.repetition_penalty = 1.1;
  logprobs.logprobs = 20;
  const std::pair<const char*, const SamplingParams*> cases[] = {{"greedy", &greedy},
                                                                 {"temperature", &plain},
                                                                 {"top_p = 0.9", &top_p},
                                                                 {"top_k = 50", &top_k},
                                                                 {"repetition_penalty", &penalised},
                                                                 {"logprobs = 20", &logprobs}};
  for (const auto& [name, params] : cases)
    for (int rows : {1, 8, 128, 1024}) time_sampler(host, name, rows, *params);
}

}  // namespace

int main(int argc, char** argv) {
  const auto asked = [&](const char* part) { return argc < 2 || std::strcmp(argv[1], part) == 0; };
  try {
    Host host;
    if (asked("check")) {
      check_choices(host);
      check_failures(host);
      check_log_probs(host);
    }
    if (asked("graph")) check_recorded(host);
    if (asked("time")) time_all(host);
  } catch (const std::exception& e) {
    std::printf("FAILED: %s\n", e.what());
    return 1;
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
