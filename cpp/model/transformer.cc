#include "model/transformer.h"

#include <algorithm>

namespace based {

namespace {

std::size_t matrix_bytes(std::int64_t rows, std::int64_t cols, DType dtype) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols) * size_of(dtype);
}

// A host copy of a float32 matrix.
Tensor download(backend::Backend& backend, const backend::Matrix& m) {
  Tensor host = Tensor::empty(DType::float32, {m.rows, m.cols});
  backend.copy_to_host(host.data(), m.data, host.nbytes());
  return host;
}

// What `add` adds to the residual stream, kept as a host copy.
template <typename Add>
Tensor add_traced(backend::Backend& backend, const backend::Matrix& r, Add&& add) {
  const std::size_t nbytes = matrix_bytes(r.rows, r.cols, DType::float32);
  const backend::Buffer delta = backend.allocate(nbytes, backend::MemoryKind::workspace);
  backend.zero(delta.data.get(), nbytes);
  const backend::Matrix out{delta.data.get(), DType::float32, r.rows, r.cols};
  add(out);
  Tensor added = download(backend, out);
  Tensor sum = download(backend, r);
  for (std::int64_t i = 0; i < sum.size(); ++i) sum.data_as<float>()[i] += added.data_as<float>()[i];
  backend.copy_from_host(r.data, sum.data(), nbytes);
  return added;
}

}  // namespace

Transformer::Transformer(const ModelConfig& config, WeightLoader& loader)
    : config_(config),
      prefix_tokens_(config.prefix_tokens()),
      activation_dtype_(loader.backend.activation_dtype(loader.dtype)) {
  for (std::size_t i = 0; i < config.layers.size(); ++i)
    if (!loader.backend.supports(config.layers[i]))
      loader.backend.throw_unsupported("layers[" + std::to_string(i) + "]: ", mixer_name(config.layers[i]));
  const std::int64_t d = config.hidden_size;
  const auto reserve_scratch = [this](const std::vector<ScratchSize>& sizes) {
    scratch_nbytes_.resize(std::max(scratch_nbytes_.size(), sizes.size()));
    for (std::size_t i = 0; i < sizes.size(); ++i)
      scratch_nbytes_[i] = std::max(scratch_nbytes_[i], sizes[i].row_nbytes());
  };
  embedding_ = loader.linear({{"embedding", config.padded_vocab_size}}, d, false);
  for (std::size_t i = 0; i < config.layers.size(); ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    Layer layer;
    layer.norm1 = load_norm(loader, prefix + "norm1");
    layer.mixer = make_mixer(config.layers[i], d, loader, prefix + "mixer.");
    reserve_scratch(layer.mixer->scratch());
    if (config.mlp) {
      layer.norm2 = load_norm(loader, prefix + "norm2");
      layer.mlp = std::make_unique<Mlp>(*config.mlp, d, loader, prefix + "mlp.");
      reserve_scratch(layer.mlp->scratch());
    }
    layers_.push_back(std::move(layer));
  }
  final_norm_ = load_norm(loader, "final_norm");
  head_ = config.tie_embeddings ? embedding_ : loader.linear({{"lm_head", config.padded_vocab_size}}, d, false);
  nbytes_ = loader.nbytes;
}

Transformer::Norm Transformer::load_norm(WeightLoader& loader, const std::string& name) const {
  Norm norm;
  norm.weight = loader.vector(name + ".weight", {config_.hidden_size});
  if (config_.norm == NormKind::layer_norm) norm.bias = loader.vector(name + ".bias", {config_.hidden_size});
  return norm;
}

std::int64_t Transformer::piece_tokens(const backend::Backend& backend, bool begins_a_sequence) const {
  const std::int64_t chunk = backend.piece_tokens();
  if (!begins_a_sequence || prefix_tokens_ <= chunk) return chunk;
  return (prefix_tokens_ + chunk - 1) / chunk * chunk;
}

void Transformer::reserve(backend::Backend& backend, Workspace& workspace, std::int64_t num_tokens) const {
  if (num_tokens <= workspace.capacity) return;
  Workspace grown;
  const auto allocate = [&](std::size_t row_nbytes) {
    return backend.allocate(static_cast<std::size_t>(num_tokens) * row_nbytes, backend::MemoryKind::workspace);
  };
  grown.r = allocate(ScratchSize{config_.hidden_size, DType::float32}.row_nbytes());
  grown.x = allocate(ScratchSize{config_.hidden_size, activation_dtype_}.row_nbytes());
  for (const std::size_t row_nbytes : scratch_nbytes_) grown.scratch.push_back(allocate(row_nbytes));
  grown.capacity = num_tokens;
  workspace = std::move(grown);
}

void Transformer::norm(backend::Backend& backend, const Norm& norm, const backend::Matrix& r,
                       std::span<const std::int32_t> rows, const backend::Matrix& out) const {
  backend.norm(config_.norm, config_.norm_eps, floats(norm.weight), floats(norm.bias), r, rows, out);
}

backend::Matrix Transformer::hidden(backend::Backend& backend, const backend::RaggedBatch& batch,
                                    backend::StatePool& states, Workspace& workspace, const InterruptCheck& interrupt,
                                    LayerTrace* trace) const {
  const std::int64_t n = batch.num_tokens(), d = config_.hidden_size;
  reserve(backend, workspace, n);
  Activations a;
  a.r = {workspace.r.data.get(), DType::float32, n, d};
  a.x = {workspace.x.data.get(), activation_dtype_, n, d};
  a.buffers = workspace.scratch;

  backend.embed(*embedding_, batch, a.r);
  if (trace) trace->embed = download(backend, a.r);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    if (interrupt) interrupt();
    const Layer& layer = layers_[i];
    const auto mix = [&](const backend::Matrix& out) {
      layer.mixer->forward(backend, batch, states, static_cast<int>(i), a, out);
    };
    norm(backend, layer.norm1, a.r, {}, a.x);
    if (trace)
      trace->mixer_out.push_back(add_traced(backend, a.r, mix));
    else
      mix(a.r);
    if (layer.mlp) {
      norm(backend, layer.norm2, a.r, {}, a.x);
      layer.mlp->forward(backend, a, a.r);
    }
    if (trace) trace->block_out.push_back(download(backend, a.r));
  }
  if (trace) {
    const std::size_t nbytes = matrix_bytes(n, d, DType::float32);
    const backend::Buffer out = backend.allocate(nbytes, backend::MemoryKind::workspace);
    const backend::Matrix normed{out.data.get(), DType::float32, n, d};
    norm(backend, final_norm_, a.r, {}, normed);
    trace->final_norm = download(backend, normed);
  }
  return a.r;
}

void Transformer::final_norm(backend::Backend& backend, const backend::Matrix& r, std::span<const std::int32_t> rows,
                             const backend::Matrix& out) const {
  norm(backend, final_norm_, r, rows, out);
}

Tensor Transformer::new_logits(backend::Backend& backend, std::int64_t rows) const {
  std::vector<std::int64_t> shape{rows, config_.padded_vocab_size};
  const auto nbytes = static_cast<std::size_t>(num_elements(shape)) * sizeof(float);
  return {backend.device(), DType::float32, std::move(shape),
          backend.allocate(nbytes, backend::MemoryKind::workspace).data};
}

void Transformer::logits(backend::Backend& backend, const backend::Matrix& x, const backend::Matrix& logits) const {
  backend.linear(*head_, x, logits, false);
}

}  // namespace based
