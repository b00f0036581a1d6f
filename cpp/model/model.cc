#include "based/model.h"

#include <algorithm>

#include "based/error.h"
#include "io/file.h"
#include "io/hash.h"
#include "model/model_impl.h"

namespace based {

namespace {

constexpr std::size_t kMaxConfigBytes = std::size_t{4} << 20;  // 4096 layers take 1 MB

// A single sequence that starts from nothing and is fed in chunks: forward, score and trace.
class OneSequence {
 public:
  explicit OneSequence(const Model::Impl& impl)
      : transformer_(impl.transformer),
        lease_(impl.executors.lease()),
        states_(backend().make_states(transformer_.config(), impl.dtype, 1)) {}

  backend::Backend& backend() { return lease_->backend(); }

  // Tokens to feed next, of `left` that follow in one prompt.
  std::int64_t piece(std::int64_t left) { return std::min(left, transformer_.piece_tokens(backend(), position_ == 0)); }

  // Feeds tokens; writes their logits (N, padded_vocab_size) float32.
  void feed(std::span<const std::int32_t> tokens, void* logits, const InterruptCheck& interrupt,
            LayerTrace* trace = nullptr) {
    const ModelConfig& config = transformer_.config();
    const auto n = static_cast<std::int64_t>(tokens.size());
    const std::int32_t offsets[] = {0, static_cast<std::int32_t>(n)};
    const std::int32_t slots[] = {0};
    const std::int64_t positions[] = {position_};
    const backend::RaggedBatch batch{tokens, offsets, slots, positions};
    const std::int64_t length[] = {position_ + n};
    backend().reserve_states(*states_, slots, length);
    backend().begin(batch);
    const auto r = transformer_.hidden(backend(), batch, *states_, lease_->workspace(), interrupt, trace);
    if (interrupt) interrupt();
    if (n > normed_rows_) {
      normed_ = backend().allocate(
          static_cast<std::size_t>(n * config.hidden_size) * size_of(transformer_.activation_dtype()),
          backend::MemoryKind::workspace);
      normed_rows_ = n;
    }
    const backend::Matrix x{normed_.data.get(), transformer_.activation_dtype(), n, config.hidden_size};
    transformer_.final_norm(backend(), r, {}, x);
    transformer_.logits(backend(), x, {logits, DType::float32, n, config.padded_vocab_size});
    position_ += n;
  }

 private:
  const Transformer& transformer_;
  Executors::Lease lease_;
  std::unique_ptr<backend::StatePool> states_;
  backend::Buffer normed_;
  std::int64_t normed_rows_ = 0;
  std::int64_t position_ = 0;
};

// A 16-bit file keeps its dtype where the device has kernels for it. On a GPU float32 files are run in bfloat16.
DType default_dtype(Device device, DType file_dtype) {
  if (file_dtype == DType::bfloat16) return DType::bfloat16;
  if (device.type == Device::Type::cpu) return DType::float32;
  return file_dtype == DType::float16 ? DType::float16 : DType::bfloat16;
}

DType choose_dtype(const LoadOptions& options, DType file_dtype) {
  if (!options.dtype) return default_dtype(options.device, file_dtype);
  if (*options.dtype != DType::float32 && *options.dtype != DType::bfloat16 && *options.dtype != DType::float16)
    throw InvalidArgument("dtype is " + std::string(name_of(*options.dtype)) +
                          ", expected float32, bfloat16 or float16");
  return *options.dtype;
}

bool is_context(const StatePart& part) { return std::holds_alternative<ContextState>(part); }

bool has_context(const ModelConfig& config) {
  return std::ranges::any_of(config.layers,
                             [](const auto& mixer) { return std::ranges::any_of(mixer_state(mixer), is_context); });
}

bool has_nothing_else(const ModelConfig& config) {
  return std::ranges::all_of(config.layers,
                             [](const auto& mixer) { return std::ranges::all_of(mixer_state(mixer), is_context); });
}

// Before weights are loaded, which takes long.
void check_max_context(const ModelConfig& config, std::optional<std::int64_t> max_context) {
  if (!max_context) return;
  if (!has_context(config) && !config.max_tokens())
    throw InvalidArgument("max_context is " + std::to_string(*max_context) +
                          ", but this model has no full_attention layer: its sequences may have any number of tokens");
  const std::int64_t most = config.max_tokens().value_or(limits::kSize);
  if (*max_context < 1 || *max_context > most)
    throw InvalidArgument("max_context is " + std::to_string(*max_context) + ", expected 1 to " + std::to_string(most));
}

}  // namespace

void check_tokens(std::span<const std::int32_t> tokens, std::int64_t vocab_size, const std::string& what) {
  if (tokens.empty()) throw InvalidArgument(what + " is empty, expected at least one token");
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocab_size)
      throw InvalidArgument(what + ": token id " + std::to_string(tokens[i]) + " at index " + std::to_string(i) +
                            " is outside [0, " + std::to_string(vocab_size) + ")");
}

Model::Impl::Impl(const ModelConfig& config, std::unique_ptr<backend::Backend> backend, WeightSource& source,
                  DType type)
    : executors(std::move(backend)), dtype(type), transformer([&] {
        const auto lease = executors.lease();
        WeightLoader loader{.backend = lease->backend(), .source = source, .dtype = dtype};
        Transformer loaded(config, loader);
        lease->backend().synchronize();
        return loaded;
      }()) {}

std::shared_ptr<Model> Model::Impl::make(const ModelConfig& config, std::unique_ptr<backend::Backend> backend,
                                         WeightSource& source, DType dtype, std::optional<std::int64_t> max_context) {
  check_max_context(config, max_context);
  auto impl = std::make_unique<Impl>(config, std::move(backend), source, dtype);
  if (has_context(config)) {
    // Of tokens that no window has place for, and so many that what they are cut into divides them.
    impl->context_nbytes =
        (impl->state_nbytes_of(2 * limits::kSize) - impl->state_nbytes_of(limits::kSize)) / limits::kSize;
    impl->only_appends = has_nothing_else(config);
    const std::size_t fits = impl->executors.device().available_nbytes() / impl->context_nbytes;
    impl->max_context =
        max_context.value_or(static_cast<std::int64_t>(std::clamp<std::size_t>(fits, 1, limits::kSize)));
  } else {
    impl->max_context = max_context;
  }
  if (const auto most = config.max_tokens()) impl->max_context = std::min(impl->max_context.value_or(*most), *most);
  return std::shared_ptr<Model>(new Model(std::move(impl)));
}

std::string Model::Impl::context_advice() const {
  return max_context == transformer.config().max_tokens() ? "a layer's max_length allows no more"
                                                          : "load it with a greater one";
}

void Model::Impl::check_context(std::int64_t seen, std::int64_t more, const std::string& what) const {
  if (!max_context || more <= *max_context - seen) return;
  throw InvalidArgument(
      what + ": " + std::to_string(more) + " tokens" + (seen > 0 ? " behind " + std::to_string(seen) : "") +
      " are more than the model's max_context, " + std::to_string(*max_context) + " tokens: " + context_advice());
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;

std::shared_ptr<const Model> Model::load(const std::filesystem::path& directory, const LoadOptions& options) {
  auto backend = backend::make_backend(options.device, options.num_threads, options.deterministic);
  const auto config_path = directory / "config.json";
  const auto config =
      ModelConfig::from_json(io::read_file(config_path, io::parse_limit(kMaxConfigBytes)), config_path.string());
  FileWeights weights(io::WeightFiles::open(directory), directory.string());
  const DType dtype = weights.dtype_of("embedding.weight", {config.padded_vocab_size, config.hidden_size});
  auto model = Impl::make(config, std::move(backend), weights, choose_dtype(options, dtype), options.max_context);
  weights.check_all_taken();
  model->impl_->fingerprints = weights.fingerprints(config);
  return model;
}

std::shared_ptr<const Model> Model::random(const ModelConfig& config, std::uint64_t seed, const LoadOptions& options) {
  config.validate("config");
  RandomWeights weights(seed);
  io::Fnv1a hash;
  hash.add(config.to_json());
  hash.add("random " + std::to_string(seed));
  auto model = Impl::make(config, backend::make_backend(options.device, options.num_threads, options.deterministic),
                          weights, choose_dtype(options, DType::float32), options.max_context);
  model->impl_->fingerprints = {hash.hex(), hash.hex()};
  return model;
}

const ModelConfig& Model::config() const { return impl_->transformer.config(); }
Device Model::device() const { return impl_->executors.device().device(); }
DType Model::dtype() const { return impl_->dtype; }
int Model::num_threads() const { return impl_->executors.device().num_threads(); }
std::int64_t Model::num_parameters() const { return config().num_parameters(); }
std::size_t Model::weight_nbytes() const { return impl_->transformer.nbytes(); }
std::size_t Model::state_nbytes() const {
  return impl_->state_nbytes_of(impl_->max_context.value_or(backend::Backend::kAnyNumber));
}
std::size_t Model::state_nbytes(std::int64_t num_tokens) const {
  if (num_tokens < 0) throw InvalidArgument("num_tokens is " + std::to_string(num_tokens) + ", expected ≥ 0");
  impl_->check_context(0, num_tokens, "state_nbytes");
  return impl_->state_nbytes_of(num_tokens);
}
std::optional<std::int64_t> Model::max_context() const { return impl_->max_context; }
MemoryUse Model::memory() const {
  const auto& nbytes = impl_->executors.device().memory().nbytes;
  const auto of = [&](backend::MemoryKind kind) { return nbytes[static_cast<std::size_t>(kind)].load(); };
  return {of(backend::MemoryKind::weights), of(backend::MemoryKind::states), of(backend::MemoryKind::workspace)};
}
std::string Model::kernel_isa() const { return impl_->executors.device().kernel_isa(); }
const std::string& Model::fingerprint() const { return impl_->fingerprints.all; }

Tensor Model::forward(std::span<const std::int32_t> tokens, const InterruptCheck& interrupt) const {
  check_tokens(tokens, config().vocab_size, "forward: tokens");
  impl_->check_context(0, static_cast<std::int64_t>(tokens.size()), "forward");
  OneSequence sequence(*impl_);
  const auto total = static_cast<std::int64_t>(tokens.size());
  Tensor logits = impl_->transformer.new_logits(sequence.backend(), total);
  for (std::int64_t t = 0, n = 0; t < total; t += n) {
    n = sequence.piece(total - t);
    sequence.feed(tokens.subspan(static_cast<std::size_t>(t), static_cast<std::size_t>(n)),
                  logits.data_as<float>() + t * config().padded_vocab_size, interrupt);
  }
  sequence.backend().synchronize();
  return logits;
}

std::vector<float> Model::score(std::span<const std::int32_t> tokens, const InterruptCheck& interrupt) const {
  check_tokens(tokens, config().vocab_size, "score: tokens");
  const auto total = static_cast<std::int64_t>(tokens.size()) - 1;
  impl_->check_context(0, total, "score");
  OneSequence sequence(*impl_);
  std::vector<float> scores(static_cast<std::size_t>(total));
  const std::int64_t chunk = std::min(sequence.backend().piece_tokens(), total);
  const Tensor logits = impl_->transformer.new_logits(sequence.backend(), chunk);
  // Whoever reads a prefix as a whole has seen the tokens that are to be scored: there, the first one is the prompt.
  const std::int64_t prompt = impl_->transformer.prefix_tokens() > 0 ? std::min<std::int64_t>(1, total) : 0;
  for (std::int64_t t = 0, most = prompt > 0 ? prompt : chunk; t < total; t += most, most = chunk) {
    const auto first = static_cast<std::size_t>(t);
    const auto n = static_cast<std::size_t>(std::min(most, total - t));
    sequence.feed(tokens.subspan(first, n), logits.data(), interrupt);
    sequence.backend().token_log_probs(
        {logits.data(), DType::float32, static_cast<std::int64_t>(n), config().padded_vocab_size}, config().vocab_size,
        tokens.subspan(first + 1, n), std::span(scores).subspan(first, n));
  }
  return scores;
}

LayerTrace Model::trace(std::span<const std::int32_t> tokens, const InterruptCheck& interrupt) const {
  check_tokens(tokens, config().vocab_size, "trace: tokens");
  const auto n = static_cast<std::int64_t>(tokens.size());
  impl_->check_context(0, n, "trace");
  OneSequence sequence(*impl_);
  LayerTrace trace;
  const Tensor logits = impl_->transformer.new_logits(sequence.backend(), n);
  sequence.feed(tokens, logits.data(), interrupt, &trace);
  trace.logits = Tensor::empty(DType::float32, logits.shape());
  sequence.backend().copy_to_host(trace.logits.data(), logits.data(), logits.nbytes());
  return trace;
}

}  // namespace based
