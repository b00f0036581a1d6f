#include "model/mixer.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace based {

namespace {

// The entry of this name, which is loaded now.
template <class Entry>
auto take(const std::vector<Entry>& entries, std::string_view name, std::set<std::string_view>& loaded) {
  const auto it = std::ranges::find(entries, name, &Entry::name);
  if (it == entries.end()) throw std::logic_error(std::string(name) + " is not in the mixer's description");
  loaded.insert(it->name);
  return it;
}

}  // namespace

backend::Matrix Activations::scratch(std::size_t index, std::int64_t cols, DType dtype) const {
  const std::size_t nbytes = static_cast<std::size_t>(r.rows) * ScratchSize{cols, dtype}.row_nbytes();
  if (index >= buffers.size() || nbytes > buffers[index].nbytes)
    throw std::logic_error("scratch " + std::to_string(index) + " of " + std::to_string(cols) +
                           " columns was not announced by scratch()");
  return {buffers[index].data.get(), dtype, r.rows, cols};
}

MixerWeights::MixerWeights(const MixerConfig& mixer, std::int64_t hidden_size, WeightLoader& loader, std::string prefix)
    : loader_(loader),
      prefix_(std::move(prefix)),
      projections_(mixer_projections(mixer, hidden_size)),
      parameters_(mixer_parameters(mixer)) {}

std::shared_ptr<const backend::LinearWeight> MixerWeights::linear(std::string_view name) {
  auto it = take(projections_, name, loaded_);
  const Projection& first = *it;
  std::vector<WeightLoader::Matrix> stack;
  do {
    if (it->cols != first.cols || it->bias != first.bias)
      throw std::logic_error(std::string(it->name) + " cannot be stacked on " + std::string(name));
    loaded_.insert(it->name);
    stack.push_back({prefix_ + std::string(it->name), it->rows});
  } while (++it != projections_.end() && it->stacked);
  return loader_.linear(stack, first.cols, first.bias);
}

std::vector<std::shared_ptr<const backend::LinearWeight>> MixerWeights::rows_of(std::string_view name,
                                                                                const std::vector<std::int64_t>& rows) {
  const auto it = take(projections_, name, loaded_);
  const bool is_alone = !it->bias && !it->stacked && (it + 1 == projections_.end() || !(it + 1)->stacked);
  if (!is_alone || std::accumulate(rows.begin(), rows.end(), std::int64_t{0}) != it->rows)
    throw std::logic_error(std::string(name) + " cannot be cut into these rows");
  return loader_.rows_of(prefix_ + std::string(name), rows, it->cols);
}

backend::Buffer MixerWeights::parameter(std::string_view name) {
  return loader_.vector(prefix_ + std::string(name), take(parameters_, name, loaded_)->shape);
}

backend::Buffer MixerWeights::parameter(std::string_view name, const Change& change) {
  backend::Buffer buffer = parameter(name);
  std::vector<float> values(buffer.nbytes / sizeof(float));
  loader_.backend.copy_to_host(values.data(), buffer.data.get(), buffer.nbytes);
  values = change(values);
  if (values.size() * sizeof(float) != buffer.nbytes)
    throw std::logic_error(std::string(name) + " was changed to another size");
  loader_.backend.copy_from_host(buffer.data.get(), values.data(), buffer.nbytes);
  loader_.backend.synchronize();
  return buffer;
}

std::vector<float> MixerWeights::numbers(std::string_view name) {
  const backend::Buffer buffer = parameter(name);
  std::vector<float> values(buffer.nbytes / sizeof(float));
  loader_.backend.copy_to_host(values.data(), buffer.data.get(), buffer.nbytes);
  loader_.nbytes -= buffer.nbytes;
  return values;
}

backend::Buffer MixerWeights::upload(const std::vector<float>& values) {
  const std::size_t nbytes = values.size() * sizeof(float);
  backend::Buffer buffer = loader_.backend.allocate(nbytes, backend::MemoryKind::weights);
  loader_.backend.copy_from_host(buffer.data.get(), values.data(), nbytes);
  loader_.backend.synchronize();
  loader_.nbytes += nbytes;
  return buffer;
}

void MixerWeights::check_all_loaded() const {
  const auto check = [this](const auto& entry) {
    if (!loaded_.contains(entry.name))
      throw std::logic_error(prefix_ + std::string(entry.name) + " is in the mixer's description and was not loaded");
  };
  std::ranges::for_each(projections_, check);
  std::ranges::for_each(parameters_, check);
}

InOutProjections::InOutProjections(MixerWeights& weights, std::string_view in, std::string_view out)
    : in_(weights.linear(in)),
      out_(weights.linear(out)),
      projection_dtype_(weights.projection_dtype()),
      activation_dtype_(weights.activation_dtype()) {}

std::unique_ptr<Mixer> make_mixer(const MixerConfig& config, std::int64_t hidden_size, WeightLoader& loader,
                                  const std::string& prefix) {
  MixerWeights weights(config, hidden_size, loader, prefix);
  auto mixer = std::visit([&](const auto& kind) { return kind.make(weights); }, config);
  weights.check_all_loaded();
  return mixer;
}

}  // namespace based
