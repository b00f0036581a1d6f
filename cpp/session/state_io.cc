#include "session/state_io.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "based/error.h"
#include "io/state_file.h"

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
      throw FormatError(where_ + ": tensor " + by_name_.begin()->first + " has no place in this model");
    return std::move(arranged_);
  }

 private:
  using Tensors = std::map<std::string, TensorView>;

  void take_part(const DenseState& state) { take(state.name, state.shape, state.dtype == StateDType::model); }

  void take_part(const RingState& state) {
    for (const char* name : {"keys", "values"}) take(name, state.saved_shape(num_tokens_), true);
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

}  // namespace

void save_states(const std::filesystem::path& path, const Model& model, backend::Backend& backend,
                 const backend::StatePool& states, std::span<const std::int64_t> num_tokens) {
  std::vector<io::SavedState> saved(num_tokens.size());
  std::vector<backend::NamedTensor> keep;  // owns what `saved` views
  for (std::size_t b = 0; b < num_tokens.size(); ++b) {
    saved[b].num_tokens = num_tokens[b];
    for (auto& named : backend.export_state(states, static_cast<int>(b), num_tokens[b])) {
      saved[b].tensors.push_back({named.name, named.tensor.view()});
      keep.push_back(std::move(named));
    }
  }
  io::write_state_file(path, model.fingerprint(), saved);
}

LoadedStates load_states(const std::filesystem::path& path, const Model& model, backend::Backend& backend,
                         int batch_size) {
  const auto file = io::StateFile::open(path, model.fingerprint());
  if (file.states.size() != static_cast<std::size_t>(batch_size))
    throw StateError(path.string() + ": holds " + std::to_string(file.states.size()) + " sequences, the session has " +
                     std::to_string(batch_size));
  std::vector<std::vector<backend::NamedView>> tensors;
  for (std::size_t b = 0; b < file.states.size(); ++b)
    tensors.push_back(
        Arranger(path.string() + ": sequence " + std::to_string(b), file.states[b]).arrange(model.config()));

  LoadedStates loaded{backend.make_states(model.config(), model.dtype(), batch_size), {}};
  for (std::size_t b = 0; b < file.states.size(); ++b) {
    backend.import_state(*loaded.states, static_cast<int>(b), file.states[b].num_tokens, tensors[b]);
    loaded.num_tokens.push_back(file.states[b].num_tokens);
  }
  return loaded;
}

}  // namespace based
