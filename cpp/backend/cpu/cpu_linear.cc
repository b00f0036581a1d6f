#include <algorithm>
#include <cstring>
#include <span>
#include <string>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_sampler.h"
#include "backend/cpu/kernels/linear.h"
#include "backend/cpu/linear_weight.h"
#include "based/error.h"

namespace based::cpu {
namespace {

using backend::Buffer;
using backend::LinearSource;
using backend::LinearWeight;
using backend::Matrix;
using backend::MemoryKind;

// Few rows: the weights are a stream from memory, each panel used by all tiles at once. Weights of a task when there is
// one tile: enough to hide the hand-out, little enough that threads end together.
constexpr std::int64_t kStreamTiles = 8;
constexpr std::size_t kStreamBytes = std::size_t{64} << 10;

// How far ahead of the first use; the hardware's prefetcher starts slowly and stops at pages.
constexpr std::int64_t kPrefetchBytes = 2048;

// Many rows: weights that stay in L2 while a task goes through the tiles, each tile in L1 from panel to panel.
constexpr std::size_t kResidentBytes = std::size_t{512} << 10;

const LinearKernels& kernels_of(Isa isa) {
  return for_isa(isa, [](auto tag) -> const LinearKernels& { return linear_kernels(tag); });
}

bool is_weight_dtype(DType dtype) {
  return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16;
}

const CpuLinearWeight& cpu_weight(const LinearWeight& weight) {
  const auto* w = dynamic_cast<const CpuLinearWeight*>(&weight);
  if (w == nullptr) throw InvalidArgument("weights of another device given to the CPU backend");
  return *w;
}

std::string describe(const Matrix& m) { return std::string(name_of(m.dtype)) + " " + shape_str({m.rows, m.cols}); }

void check(const LinearSource& source, DType dtype) {
  if (dtype != DType::float32 && dtype != DType::bfloat16)
    throw InvalidArgument("linear weights are packed as float32 or bfloat16, found " + std::string(name_of(dtype)));
  if (source.weights.empty()) throw InvalidArgument("a linear layer without weights");
  std::int64_t rows = 0;
  for (const TensorView& w : source.weights) {
    if (!is_weight_dtype(w.dtype) || w.shape.size() != 2 || w.shape[0] < 1 || w.shape[1] < 1 ||
        w.shape[1] != source.weights[0].shape[1])
      throw InvalidArgument("linear weight: found " + std::string(name_of(w.dtype)) + " " + shape_str(w.shape) +
                            ", expected a float matrix with as many columns as its neighbours");
    rows += w.shape[0];
  }
  if (source.gated && rows % 2 != 0)
    throw InvalidArgument("a gated linear layer has an even number of rows, found " + std::to_string(rows));
  if (!source.biases.empty() && source.biases.size() != source.weights.size())
    throw InvalidArgument("linear layer: found " + std::to_string(source.biases.size()) + " biases for " +
                          std::to_string(source.weights.size()) + " weights");
  for (std::size_t i = 0; i < source.biases.size(); ++i) {
    const TensorView& b = source.biases[i];
    if (!is_weight_dtype(b.dtype) || b.shape != std::vector<std::int64_t>{source.weights[i].shape[0]})
      throw InvalidArgument("linear bias: found " + std::string(name_of(b.dtype)) + " " + shape_str(b.shape) +
                            ", expected floats of shape " + shape_str({source.weights[i].shape[0]}));
  }
}

// The stacked row that column c of a panel holds, or −1 for padding.
std::int64_t row_of(const CpuLinearWeight& w, std::int64_t panel, int c) {
  const bool gate = w.gated && c >= kPanelColumns / 2;
  const std::int64_t column = panel * w.panel_columns() + (gate ? c - kPanelColumns / 2 : c);
  if (column >= w.n) return -1;
  return gate ? w.n + column : column;
}

}  // namespace

DType CpuBackend::activation_dtype(DType weights) const {
  if (weights != DType::float32 && weights != DType::bfloat16)
    throw UnsupportedError("the CPU has kernels for float32 and bfloat16, not for " + std::string(name_of(weights)));
  return kernels_of(isa_).row_dtype(weights);
}

Buffer CpuBackend::pack_float32(const TensorView& tensor) {
  if (!is_weight_dtype(tensor.dtype))
    throw InvalidArgument("expected float32, bfloat16 or float16, found " + std::string(name_of(tensor.dtype)));
  const std::int64_t n = tensor.size();
  Buffer out = allocate(static_cast<std::size_t>(n) * sizeof(float), MemoryKind::weights);
  kernels_of(isa_).to_float32(tensor.data, tensor.dtype, n, static_cast<float*>(out.data.get()));
  return out;
}

std::shared_ptr<const LinearWeight> CpuBackend::pack_linear(const LinearSource& source, DType dtype) {
  check(source, dtype);
  const LinearKernels& kernels = kernels_of(isa_);
  std::vector<std::int64_t> starts;  // first stacked row of each weight
  std::int64_t rows = 0;
  for (const TensorView& w : source.weights) {
    starts.push_back(rows);
    rows += w.shape[0];
  }

  auto packed = std::make_shared<CpuLinearWeight>();
  CpuLinearWeight& w = *packed;
  w.k = source.weights[0].shape[1];
  w.n = source.gated ? rows / 2 : rows;
  w.dtype = dtype;
  w.activation = source.activation;
  w.gated = source.gated;
  w.panels = allocate(static_cast<std::size_t>(w.num_panels()) * w.panel_nbytes(), MemoryKind::weights);
  pool_->run(w.num_panels(), [&](std::int64_t panel, int) {
    PanelSource from{};
    for (int c = 0; c < kPanelColumns; ++c) {
      const std::int64_t row = row_of(w, panel, c);
      if (row < 0) continue;
      const auto i = static_cast<std::size_t>(std::upper_bound(starts.begin(), starts.end(), row) - starts.begin() - 1);
      const TensorView& view = source.weights[i];
      from.dtypes[c] = view.dtype;
      from.rows[c] = view.data + static_cast<std::size_t>((row - starts[i]) * w.k) * size_of(view.dtype);
    }
    kernels.pack_panel(from, w.k, dtype, w.panel(panel));
  });

  if (!source.biases.empty()) {
    std::vector<float> stacked(static_cast<std::size_t>(rows));
    for (std::size_t i = 0; i < starts.size(); ++i)
      kernels.to_float32(source.biases[i].data, source.biases[i].dtype, source.biases[i].shape[0],
                         stacked.data() + starts[i]);
    w.bias = allocate(static_cast<std::size_t>(w.num_panels()) * kPanelColumns * sizeof(float), MemoryKind::weights);
    auto* bias = static_cast<float*>(w.bias.data.get());
    for (std::int64_t panel = 0; panel < w.num_panels(); ++panel)
      for (int c = 0; c < kPanelColumns; ++c) {
        const std::int64_t row = row_of(w, panel, c);
        *bias++ = row < 0 ? 0.0f : stacked[static_cast<std::size_t>(row)];
      }
  }
  return packed;
}

void CpuBackend::embed(const LinearWeight& table, const backend::RaggedBatch& batch, const Matrix& r) {
  const CpuLinearWeight& w = cpu_weight(table);
  if (w.gated || r.dtype != DType::float32 || r.rows != batch.num_tokens() || r.cols != w.k)
    throw InvalidArgument("embed: found output " + describe(r) + ", expected float32 " +
                          shape_str({batch.num_tokens(), w.k}) + " from a table without gate");
  // The tokens given, and those that the sampler chose.
  std::span<const std::int32_t> tokens = batch.tokens;
  if (const auto* sampler = dynamic_cast<const CpuSampler*>(batch.chosen)) {
    const auto count = static_cast<std::size_t>(batch.num_tokens());
    auto* const fed = reinterpret_cast<std::int32_t*>(scratch(count * sizeof(std::int32_t)));
    if (tokens.empty())
      std::fill_n(fed, count, backend::kChosenToken);
    else
      std::ranges::copy(tokens, fed);
    for (std::size_t b = 0; b < batch.slots.size(); ++b) {
      std::int32_t& token = fed[batch.offsets[b]];
      if (token != backend::kChosenToken) continue;
      token = sampler->chosen(batch.slots[b]);
      if (token < 0)
        throw InvalidArgument("embed: sampler row " + std::to_string(batch.slots[b]) +
                              " has no token to go on from: none was sampled, or sampling it failed");
    }
    tokens = {fed, count};
  }
  for (const std::int32_t token : tokens)
    if (token < 0 || token >= w.n)
      throw InvalidArgument("token " + std::to_string(token) + " is not one of 0 … " + std::to_string(w.n - 1));
  const LinearKernels& kernels = kernels_of(isa_);
  pool_->run(r.rows, [&](std::int64_t i, int) {
    const std::int64_t token = tokens[static_cast<std::size_t>(i)];
    kernels.unpack_column(w.panel(token / kPanelColumns), w.dtype, w.k, static_cast<int>(token % kPanelColumns),
                          static_cast<float*>(r.data) + i * w.k);
  });
}

void CpuBackend::linear(const LinearWeight& weight, const Matrix& x, const Matrix& y, bool accumulate) {
  const CpuLinearWeight& w = cpu_weight(weight);
  const LinearKernels& kernels = kernels_of(isa_);
  const DType row_dtype = kernels.row_dtype(w.dtype);
  if (x.cols != w.k || (x.dtype != DType::float32 && x.dtype != row_dtype))
    throw InvalidArgument("linear: found x " + describe(x) + ", expected " + std::string(name_of(row_dtype)) +
                          " or float32, " + std::to_string(w.k) + " columns");
  if (y.rows != x.rows || y.cols != w.n || (y.dtype != DType::float32 && (accumulate || y.dtype != row_dtype)))
    throw InvalidArgument("linear: found y " + describe(y) + ", expected float32" +
                          (accumulate ? "" : " or " + std::string(name_of(row_dtype))) + " " +
                          shape_str({x.rows, w.n}));
  if (x.rows == 0) return;

  // Tiles of rows, as even as they can be.
  const std::int64_t tiles = (x.rows + kernels.max_rows - 1) / kernels.max_rows;
  const auto tile_start = [&](std::int64_t tile) { return x.rows * tile / tiles; };

  const std::size_t packed_row_nbytes = static_cast<std::size_t>(w.padded_k()) * size_of(row_dtype);
  const auto* packed = static_cast<const std::byte*>(x.data);
  if (x.rows > 1 || x.dtype != row_dtype || w.padded_k() != w.k) {
    std::byte* const out = scratch(static_cast<std::size_t>(x.rows) * packed_row_nbytes);
    packed = out;
    const std::size_t x_row_nbytes = static_cast<std::size_t>(x.cols) * size_of(x.dtype);
    pool_->run(tiles, [&](std::int64_t tile, int) {
      const auto row = static_cast<std::size_t>(tile_start(tile));
      const int num_rows = static_cast<int>(tile_start(tile + 1) - tile_start(tile));
      kernels.pack_rows(static_cast<const std::byte*>(x.data) + row * x_row_nbytes, x.dtype, num_rows, w.k, w.dtype,
                        out + row * packed_row_nbytes);
    });
  }

  const auto make_task = [&](std::int64_t tile, std::int64_t panel, std::int64_t num_panels) {
    const std::int64_t row = tile_start(tile);
    LinearTask task{};
    task.x = packed + static_cast<std::size_t>(row) * packed_row_nbytes;
    task.num_rows = static_cast<int>(tile_start(tile + 1) - row);
    task.weights = w.panel(panel);
    task.weight_dtype = w.dtype;
    task.in_features = w.k;
    task.num_panels = static_cast<int>(num_panels);
    task.prefetch = task.weights;
    task.bias = w.bias.data == nullptr ? nullptr : static_cast<const float*>(w.bias.data.get()) + panel * kPanelColumns;
    task.activation = w.activation;
    task.gated = w.gated;
    task.y = static_cast<std::byte*>(y.data) +
             static_cast<std::size_t>(row * y.cols + panel * w.panel_columns()) * size_of(y.dtype);
    task.y_dtype = y.dtype;
    task.y_stride = y.cols;
    task.num_columns = y.cols - panel * w.panel_columns();
    task.accumulate = accumulate;
    return task;
  };
  const std::int64_t panels = w.num_panels();
  const auto panels_in = [&](std::size_t nbytes) { return static_cast<std::int64_t>(nbytes / w.panel_nbytes()); };
  constexpr int kRowBytes = kPanelColumns * 4;

  if (tiles <= kStreamTiles) {
    const std::int64_t width =
        std::max<std::int64_t>(1, tiles == 1 ? panels_in(kStreamBytes) : panels / (6 * pool_->num_threads()));
    pool_->run((panels + width - 1) / width, [&](std::int64_t i, int) {
      const std::int64_t first = i * width, last = std::min(panels, first + width);
      for (std::int64_t panel = first; panel < last; ++panel)
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
          LinearTask task = make_task(tile, panel, 1);
          if (tile == 0 && (tiles == 1 || panel == first)) {
            task.prefetch = w.panel(panel) + kPrefetchBytes;
            task.prefetch_step = kRowBytes;
          } else if (tile >= tiles - 2 && panel + 1 < last) {
            // The last two tiles fetch half of the next panel each.
            task.prefetch = w.panel(panel + 1) + (tile == tiles - 1 ? w.panel_nbytes() / 2 : 0);
            task.prefetch_step = kRowBytes / 2;
          }
          kernels.multiply(task);
        }
    });
    return;
  }

  // A task: `width` panels times a share of the tiles.
  const std::int64_t width = std::clamp<std::int64_t>(panels_in(kResidentBytes), 1, kMaxTaskPanels);
  const std::int64_t widths = (panels + width - 1) / width;
  const std::int64_t shares = std::clamp<std::int64_t>((4 * pool_->num_threads() + widths - 1) / widths, 1, tiles);
  pool_->run(widths * shares, [&](std::int64_t i, int) {
    const std::int64_t panel = i / shares * width, share = i % shares;
    for (std::int64_t tile = tiles * share / shares; tile < tiles * (share + 1) / shares; ++tile)
      kernels.multiply(make_task(tile, panel, std::min(width, panels - panel)));
  });
}

}  // namespace based::cpu
