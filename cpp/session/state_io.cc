#include "session/state_io.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "based/error.h"
#include "io/convert_dtype.h"
#include "io/state_file.h"
#include "io/text.h"
#include "model/model_impl.h"

namespace based {

namespace {

constexpr const char* kHalfOrSingle = "float32, bfloat16 or float16";

bool is_half_or_single(DType dtype) {
  return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16;
}

// Takes the tensors of one sequence's saved state in the order of Backend::export_state, each checked.
class Arranger {
 public:
  Arranger(std::string where, const io::SavedState& state) : where_(std::move(where)), num_tokens_(state.num_tokens) {
    for (const auto& [name, tensor] : state.tensors) by_name_.emplace(name, tensor);
  }

  std::vector<backend::NamedView> arrange(const ModelConfig& config) {
    for (std::size_t i = 0; i < config.layers.size(); ++i) {
      prefix_ = "layers." + std::to_string(i) + ".";
      for (const StatePart& part : mixer_state(config.layers[i]))
        std::visit([this](const auto& state) { take_part(state); }, part);
    }
    if (!by_name_.empty())
      throw FormatError(where_ + ": tensor " + io::printable(by_name_.begin()->first) + " has no place in this model");
    return std::move(arranged_);
  }

 private:
  using Tensors = std::map<std::string, TensorView>;

  void take_part(const DenseState& state) { take(state.name, state.shape, state.dtype == StateDType::model); }

  void take_part(const RingState& state) { take_rows(state.saved_shape(num_tokens_)); }
  void take_part(const ContextState& state) { take_rows(state.saved_shape(num_tokens_)); }
  void take_rows(const std::vector<std::int64_t>& shape) {
    for (const char* name : {"keys", "values"}) take(name, shape, true);
  }

  void take_part(const TaylorState& state) {
    take("taylor", state.saved_shape(), false);
    take_pending(state);
  }

  // `may_be_half`: bfloat16 or float16 too; everything else is float32.
  void take(std::string_view name, const std::vector<std::int64_t>& shape, bool may_be_half) {
    const auto it = by_name_.find(prefix_ + std::string(name));
    if (it == by_name_.end()) throw FormatError(where_ + ": tensor " + prefix_ + std::string(name) + " is missing");
    if (it->second.shape != shape) refuse(it, "shape " + shape_str(it->second.shape), shape_str(shape));
    const DType dtype = it->second.dtype;
    if (dtype != DType::float32 && !(may_be_half && is_half_or_single(dtype)))
      refuse(it, "dtype " + std::string(name_of(dtype)), may_be_half ? kHalfOrSingle : "float32");
    append(it);
  }

  // A layer without them has 0 of them, as has one whose tensors are empty.
  void take_pending(const TaylorState& state) {
    const auto keys = by_name_.find(prefix_ + "pending_keys"), values = by_name_.find(prefix_ + "pending_values");
    const bool has_keys = keys != by_name_.end(), has_values = values != by_name_.end();
    if (has_keys != has_values || (!has_keys && num_pending_.value_or(0) > 0))
      throw FormatError(where_ + ": tensor " + prefix_ + (has_keys ? "pending_values" : "pending_keys") +
                        " is missing");
    std::int64_t n = 0;
    if (has_keys) {
      const TensorView &k = keys->second, &v = values->second;
      n = k.shape.empty() ? 0 : k.shape[0];
      for (const auto& [it, width] : {std::pair(keys, state.feature_dim), std::pair(values, state.head_dim)}) {
        const std::vector<std::int64_t> shape{n, state.num_heads, width};
        if (it->second.shape != shape) refuse(it, "shape " + shape_str(it->second.shape), shape_str(shape));
        if (!is_half_or_single(it->second.dtype))
          refuse(it, "dtype " + std::string(name_of(it->second.dtype)), kHalfOrSingle);
      }
      if (v.dtype != k.dtype)
        refuse(values, "dtype " + std::string(name_of(v.dtype)), std::string(name_of(k.dtype)) + " as its keys");
      if (n > num_tokens_)
        refuse(keys, std::to_string(n) + " tokens", "at most " + std::to_string(num_tokens_) + ", the number seen");
      if (n != num_pending_.value_or(n))
        refuse(keys, std::to_string(n) + " tokens", std::to_string(*num_pending_) + " as the linear layers before");
    }
    num_pending_ = n;
    if (n > 0) {
      append(keys);
      append(values);
    } else if (has_keys) {
      by_name_.erase(keys);
      by_name_.erase(values);
    }
  }

  [[noreturn]] void refuse(Tensors::const_iterator it, const std::string& found, const std::string& expected) const {
    throw FormatError(where_ + ": tensor " + it->first + " has " + found + ", expected " + expected);
  }

  void append(Tensors::iterator it) {
    arranged_.push_back({it->first, it->second});
    by_name_.erase(it);
  }

  std::string where_, prefix_;
  std::int64_t num_tokens_;
  Tensors by_name_;
  std::vector<backend::NamedView> arranged_;
  std::optional<std::int64_t> num_pending_;
};

// ---- what is kept beside a slot ------------------------------------------------------------------------------------

constexpr const char* kLastHidden = "last_hidden";       // (d) activation dtype
constexpr const char* kSeenInPrompt = "seen_in_prompt";  // (vocab_size) boolean
constexpr const char* kSeenOutputs = "seen_outputs";     // (vocab_size) int32
constexpr const char* kTokens = "tokens";                // (num_tokens) int32

std::vector<backend::NamedTensor> export_progress(const Progress& progress, const Transformer& transformer,
                                                  backend::Backend& backend) {
  std::vector<backend::NamedTensor> out;
  if (progress.last.rows.data) {
    const DType dtype = transformer.activation_dtype();
    const std::int64_t d = transformer.config().hidden_size;
    Tensor hidden = Tensor::empty(dtype, {d});
    const auto* rows = static_cast<const std::byte*>(progress.last.rows.data.get());
    const std::size_t nbytes = hidden.nbytes();
    backend.copy_to_host(hidden.data(), rows + static_cast<std::size_t>(progress.last.row) * nbytes, nbytes);
    out.push_back({kLastHidden, std::move(hidden)});
  }
  if (progress.num_tokens > 0) {  // all of the vocabulary: files of one model have one size
    const std::int64_t vocab_size = transformer.config().vocab_size;
    Tensor in_prompt = Tensor::empty(DType::boolean, {vocab_size}), outputs = Tensor::empty(DType::int32, {vocab_size});
    std::fill_n(in_prompt.data_as<std::uint8_t>(), vocab_size, std::uint8_t{0});
    std::fill_n(outputs.data_as<std::int32_t>(), vocab_size, 0);
    for (const backend::SeenToken& entry : progress.seen.entries()) {
      in_prompt.data_as<std::uint8_t>()[entry.token] = entry.in_prompt;
      outputs.data_as<std::int32_t>()[entry.token] = entry.num_outputs;
    }
    out.push_back({kSeenInPrompt, std::move(in_prompt)});
    out.push_back({kSeenOutputs, std::move(outputs)});
  }
  return out;
}

// Takes the tensors of this name from a saved state; without data when there is none.
TensorView take(io::SavedState& state, const char* name) {
  const auto it = std::ranges::find(state.tensors, name, &io::TensorToWrite::name);
  if (it == state.tensors.end()) return {};
  const TensorView tensor = it->tensor;
  state.tensors.erase(it);
  return tensor;
}

[[noreturn]] void refuse(const std::string& where, const char* name, const std::string& found,
                         const std::string& expected) {
  throw FormatError(where + ": tensor " + name + " has " + found + ", expected " + expected);
}

TensorView take_last_hidden(io::SavedState& state, const ModelConfig& config, const std::string& where) {
  const TensorView tensor = take(state, kLastHidden);
  if (tensor.data == nullptr) return tensor;
  const std::vector<std::int64_t> shape{config.hidden_size};
  if (tensor.shape != shape) refuse(where, kLastHidden, "shape " + shape_str(tensor.shape), shape_str(shape));
  if (!is_half_or_single(tensor.dtype))
    refuse(where, kLastHidden, "dtype " + std::string(name_of(tensor.dtype)), kHalfOrSingle);
  if (state.num_tokens == 0)
    throw FormatError(where + ": tensor " + kLastHidden + " belongs to a token, expected none, for num_tokens is 0");
  return tensor;
}

TensorView take_tokens(io::SavedState& state, const std::string& where) {
  const TensorView tensor = take(state, kTokens);
  if (tensor.data == nullptr) return tensor;
  const std::vector<std::int64_t> shape{state.num_tokens};
  if (tensor.shape != shape) refuse(where, kTokens, "shape " + shape_str(tensor.shape), shape_str(shape));
  if (tensor.dtype != DType::int32) refuse(where, kTokens, "dtype " + std::string(name_of(tensor.dtype)), "int32");
  return tensor;
}

std::vector<backend::SeenToken> take_seen(io::SavedState& state, const ModelConfig& config, const std::string& where) {
  const TensorView in_prompt = take(state, kSeenInPrompt), outputs = take(state, kSeenOutputs);
  if (in_prompt.data == nullptr && outputs.data == nullptr) return {};
  for (const auto& [name, tensor, dtype] :
       {std::tuple(kSeenInPrompt, in_prompt, DType::boolean), {kSeenOutputs, outputs, DType::int32}}) {
    if (tensor.data == nullptr) throw FormatError(where + ": tensor " + name + " is missing");
    const std::vector<std::int64_t> shape{config.vocab_size};
    if (tensor.shape != shape) refuse(where, name, "shape " + shape_str(tensor.shape), shape_str(shape));
    if (tensor.dtype != dtype)
      refuse(where, name, "dtype " + std::string(name_of(tensor.dtype)), std::string(name_of(dtype)));
  }
  std::vector<backend::SeenToken> seen;
  for (std::int64_t token = 0; token < config.vocab_size; ++token) {
    std::int32_t num_outputs;
    std::memcpy(&num_outputs, outputs.data + 4 * token, 4);
    if (num_outputs < 0 || num_outputs > state.num_tokens)
      refuse(where, kSeenOutputs, std::to_string(num_outputs) + " for token " + std::to_string(token),
             "0 to num_tokens, " + std::to_string(state.num_tokens));
    const bool was_in_prompt = in_prompt.data[token] != std::byte{0};
    if (was_in_prompt || num_outputs > 0)
      seen.push_back({static_cast<std::int32_t>(token), was_in_prompt, num_outputs});
  }
  return seen;
}

}  // namespace

ExportedStates::ExportedStates(const Model& model, backend::Backend& backend, std::span<const SequenceView> sequences)
    : fingerprint_(model.fingerprint()), saved_(sequences.size()) {
  std::unique_ptr<backend::StatePool> fresh;
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    const auto& [states, slot, progress, tokens] = sequences[b];
    saved_[b].num_tokens = progress->num_tokens;
    if (states == nullptr && !fresh) fresh = backend.make_states(model.config(), model.dtype(), 1);
    const auto add = [&](std::vector<backend::NamedTensor> tensors) {
      for (auto& named : tensors) {
        saved_[b].tensors.push_back({named.name, named.tensor.view()});
        tensors_.push_back(std::move(named));
      }
    };
    add(backend.export_state(states ? *states : *fresh, states ? slot : 0, progress->num_tokens));
    add(export_progress(*progress, model.impl().transformer, backend));
    if (!tokens.empty()) {
      const Tensor copy = Tensor::empty(DType::int32, {static_cast<std::int64_t>(tokens.size())});
      std::ranges::copy(tokens, copy.data_as<std::int32_t>());
      add({{kTokens, copy}});
    }
  }
}

std::size_t ExportedStates::file_nbytes() const {
  constexpr std::size_t kHeader = 4096, kEntry = 256;  // of a tensor: its name, dtype, shape and offsets
  std::size_t total = kHeader;
  for (const auto& [name, tensor] : tensors_) total += kEntry + name.size() + tensor.nbytes();
  return total;
}

void ExportedStates::write(const std::filesystem::path& path) const {
  io::write_state_file(path, fingerprint_, saved_);
}

void save_states(const std::filesystem::path& path, const Model& model, backend::Backend& backend,
                 std::span<const SequenceView> sequences) {
  ExportedStates(model, backend, sequences).write(path);
}

StateFileReader::StateFileReader(const std::filesystem::path& path, const Model& model) : model_(model) {
  const Fingerprints& fingerprints = model.impl().fingerprints;
  io::StateFile file = io::StateFile::open(path, {fingerprints.all, fingerprints.sampled});
  file_ = std::move(file.file);
  for (std::size_t b = 0; b < file.states.size(); ++b) {
    io::SavedState& state = file.states[b];
    const std::string where = path.string() + ": sequence " + std::to_string(b);
    model.impl().check_context(0, state.num_tokens, where);
    Sequence sequence;
    sequence.num_tokens = state.num_tokens;
    sequence.last_hidden = take_last_hidden(state, model.config(), where);
    sequence.tokens = take_tokens(state, where);
    sequence.seen = take_seen(state, model.config(), where);
    sequence.tensors = Arranger(where, state).arrange(model.config());
    sequences_.push_back(std::move(sequence));
  }
}

Progress StateFileReader::read(int which, backend::Backend& backend, backend::StatePool& states, int slot) const {
  const Sequence& sequence = sequences_[static_cast<std::size_t>(which)];
  backend.import_state(states, slot, sequence.num_tokens, sequence.tensors);
  Progress progress;
  progress.num_tokens = sequence.num_tokens;
  progress.seen = SeenTokens::from_entries(sequence.seen);
  if (sequence.last_hidden.data != nullptr) {
    const Tensor hidden = Tensor::empty(model_.impl().transformer.activation_dtype(), sequence.last_hidden.shape);
    io::convert(sequence.last_hidden, hidden.dtype(), hidden.data());
    progress.last.rows = backend.allocate(hidden.nbytes(), backend::MemoryKind::workspace);
    backend.copy_from_host(progress.last.rows.data.get(), hidden.data(), hidden.nbytes());
  }
  return progress;
}

bool StateFileReader::has_tokens(int which, std::span<const std::int32_t> tokens) const {
  const TensorView& found = sequences_[static_cast<std::size_t>(which)].tokens;
  return found.data != nullptr && found.nbytes() == tokens.size_bytes() &&
         std::memcmp(found.data, tokens.data(), tokens.size_bytes()) == 0;
}

}  // namespace based
