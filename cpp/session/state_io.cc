#include "session/state_io.h"

#include <algorithm>
#include <map>
#include <string>

#include "based/error.h"
#include "io/state_file.h"

namespace based {

namespace {

struct ExpectedTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  bool may_be_half;  // rings: bfloat16 or float16 too; everything else is float32
};

// What Backend::export_state documents, for a sequence that has seen num_tokens tokens.
std::vector<ExpectedTensor> expected_tensors(const ModelConfig& config, std::int64_t num_tokens) {
  std::vector<ExpectedTensor> expected;
  struct Append {
    std::vector<ExpectedTensor>& out;
    std::string prefix;
    std::int64_t num_tokens;
    void operator()(const GatedConvConfig& c) const {
      out.push_back({prefix + "conv", {c.kernel_size - 1, c.inner_size}, false});
    }
    void operator()(const LinearAttentionConfig& c) const {
      out.push_back({prefix + "taylor", {c.num_heads, c.num_features(), c.head_dim + 1}, false});
    }
    void operator()(const SlidingWindowConfig& c) const {
      const std::vector<std::int64_t> shape{std::min(num_tokens, c.window), c.num_kv_heads, c.head_dim};
      out.push_back({prefix + "keys", shape, true});
      out.push_back({prefix + "values", shape, true});
    }
  };
  for (std::size_t i = 0; i < config.layers.size(); ++i)
    std::visit(Append{expected, "layers." + std::to_string(i) + ".", num_tokens}, config.layers[i]);
  return expected;
}

// The state's tensors in the expected order, each checked.
std::vector<TensorView> arrange(const std::string& where, const io::SavedState& state,
                                const std::vector<ExpectedTensor>& expected) {
  std::map<std::string, TensorView> by_name;
  for (const auto& [name, tensor] : state.tensors) by_name.emplace(name, tensor);
  std::vector<TensorView> arranged;
  for (const ExpectedTensor& want : expected) {
    const auto it = by_name.find(want.name);
    if (it == by_name.end()) throw FormatError(where + ": tensor " + want.name + " is missing");
    const TensorView& tensor = it->second;
    if (tensor.shape != want.shape)
      throw FormatError(where + ": tensor " + want.name + " has shape " + shape_str(tensor.shape) + ", expected " +
                        shape_str(want.shape));
    const bool half = tensor.dtype == DType::bfloat16 || tensor.dtype == DType::float16;
    if (tensor.dtype != DType::float32 && !(want.may_be_half && half))
      throw FormatError(where + ": tensor " + want.name + " has dtype " + std::string(name_of(tensor.dtype)) +
                        ", expected float32" + (want.may_be_half ? ", bfloat16 or float16" : ""));
    arranged.push_back(tensor);
    by_name.erase(it);
  }
  if (!by_name.empty()) throw FormatError(where + ": tensor " + by_name.begin()->first + " has no place in this model");
  return arranged;
}

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
  std::vector<std::vector<TensorView>> tensors;
  for (std::size_t b = 0; b < file.states.size(); ++b)
    tensors.push_back(arrange(path.string() + ": sequence " + std::to_string(b), file.states[b],
                              expected_tensors(model.config(), file.states[b].num_tokens)));

  LoadedStates loaded{backend.make_states(model.config(), model.dtype(), batch_size), {}};
  for (std::size_t b = 0; b < file.states.size(); ++b) {
    backend.import_state(*loaded.states, static_cast<int>(b), file.states[b].num_tokens, tensors[b]);
    loaded.num_tokens.push_back(file.states[b].num_tokens);
  }
  return loaded;
}

}  // namespace based
