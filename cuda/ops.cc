// based/ops.h on the kernels: what a session holds for them (batches, slots of a state) is made here for one call.

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <tuple>
#include <vector>

#include "backend/cuda.h"
#include "batch_upload.h"
#include "cuda_error.h"
#include "kernels.h"
#include "stream.h"

namespace based::cuda {

namespace {

using ops::Array;

cudaStream_t handle(ops::StreamHandle stream) { return static_cast<cudaStream_t>(stream); }

std::size_t align_16(std::size_t nbytes) { return (nbytes + 15) / 16 * 16; }

std::size_t floats(std::int64_t count) { return static_cast<std::size_t>(count) * sizeof(float); }

// Batches of B fresh sequences of T tokens. They say nothing but B and T, so one that is on the device serves every
// later call, on any stream. A call whose stream is being captured leaves a batch's address in the caller's graph, so
// that batch stays for ever. Never destroyed: the driver may be gone before static objects are.
class Batches {
 public:
  static Batches& instance() {
    static auto& batches = *new Batches;
    return batches;
  }

  // Calls enqueue(batch), which enqueues kernels that read the batch on `stream`. The caller's device is the current
  // one.
  template <typename Enqueue>
  void use(int device, cudaStream_t stream, std::int64_t num_sequences, std::int64_t length, Enqueue&& enqueue) {
    const std::lock_guard lock(mutex_);
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capturing), "ops");
    Entry& entry = find(device, num_sequences, length);
    entry.last_use = ++num_uses_;
    const bool pinned = entry.pinned || capturing != cudaStreamCaptureStatusNone;
    entry.pinned = true;  // for ever, should what follows fail half-way
    enqueue(static_cast<const DeviceBatch&>(entry.batch));
    if (pinned) return;
    // Its memory is freed in the order of its own stream, which so comes after all that reads it.
    entry.used.record(stream, "ops");
    entry.used.hold(entry.stream->get(), "ops");
    entry.pinned = false;
  }

 private:
  using Key = std::tuple<int, std::int64_t, std::int64_t>;
  struct Entry {
    explicit Entry(int device) : stream(std::make_shared<Stream>(device)), upload(stream) {}
    std::shared_ptr<Stream> stream;
    BatchUpload upload;
    DeviceBatch batch;
    Event used;
    std::uint64_t last_use = 0;
    bool pinned = false;
  };
  static constexpr std::size_t kMaxEntries = 64;  // of a device, that are not pinned

  Entry& find(int device, std::int64_t num_sequences, std::int64_t length) {
    const Key key{device, num_sequences, length};
    if (const auto it = entries_.find(key); it != entries_.end()) return *it->second;
    const OutsideCapture outside;
    make_room(device);
    auto entry = std::make_unique<Entry>(device);
    std::vector<std::int32_t> offsets(static_cast<std::size_t>(num_sequences) + 1);
    std::vector<std::int32_t> slots(static_cast<std::size_t>(num_sequences));
    const std::vector<std::int64_t> positions(slots.size(), 0);
    for (std::size_t b = 0; b < offsets.size(); ++b)
      offsets[b] = static_cast<std::int32_t>(b) * static_cast<std::int32_t>(length);
    std::iota(slots.begin(), slots.end(), 0);
    entry->batch = entry->upload.upload({{}, offsets, slots, positions});
    entry->stream->synchronize("ops");
    return *entries_.emplace(key, std::move(entry)).first->second;
  }

  // Forgets the batch of a device that was used longest ago, when there are too many.
  void make_room(int device) {
    std::size_t count = 0;
    auto oldest = entries_.end();
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (std::get<0>(it->first) != device || it->second->pinned) continue;
      ++count;
      if (oldest == entries_.end() || it->second->last_use < oldest->second->last_use) oldest = it;
    }
    if (count >= kMaxEntries) entries_.erase(oldest);
  }

  std::mutex mutex_;
  std::map<Key, std::unique_ptr<Entry>> entries_;
  std::uint64_t num_uses_ = 0;
};

// Elements from a token of x (B, T, …) to the next on the packed axis of B · T tokens; 0 when there is none such.
std::int64_t packed_stride(const Array& x) {
  const std::int64_t b = x.shape[0], t = x.shape[1];
  if (t == 1) return b == 1 ? 1 : x.strides[0];
  return b == 1 || x.strides[0] == t * x.strides[1] ? x.strides[1] : 0;
}

std::int64_t token_stride(const Array& x) { return packed_stride(x) != 0 ? packed_stride(x) : x.strides[1]; }

const void* sequence(const Array& x, std::int64_t b) {
  return static_cast<const std::byte*>(x.data) + b * x.strides[0] * static_cast<std::int64_t>(size_of(x.dtype));
}

// Calls enqueue(batch, first sequence): once with all sequences when all arrays can be packed on one axis, otherwise
// once for each.
template <typename Enqueue>
void for_each_batch(int device, cudaStream_t stream, std::initializer_list<const Array*> arrays, Enqueue&& enqueue) {
  const Array& first = **arrays.begin();
  const std::int64_t b = first.shape[0], t = first.shape[1];
  const bool packed = std::ranges::all_of(arrays, [](const Array* x) { return packed_stride(*x) != 0; });
  Batches::instance().use(device, stream, packed ? b : 1, t, [&](const DeviceBatch& batch) {
    for (std::int64_t i = 0; i < (packed ? 1 : b); ++i) enqueue(batch, i);
  });
}

QkvView view_of(const Array& q, const Array& k, const Array& v, std::int64_t b) {
  return {sequence(q, b),  sequence(k, b), sequence(v, b),  token_stride(q), q.strides[2],
          token_stride(k), k.strides[2],   token_stride(v), v.strides[2]};
}

void copy_rows(cudaStream_t stream, void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
               std::size_t width, std::size_t height) {
  if (width == 0 || height == 0) return;
  check(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, cudaMemcpyDeviceToDevice, stream), "ops");
}

}  // namespace

void taylor_linear_attention(const LinearAttentionConfig& config, const Array& q, const Array& k, const Array& v,
                             const std::optional<Array>& initial_state, const Array& out,
                             const std::optional<Array>& final_state, ops::StreamHandle stream_handle) {
  const int device = q.device.index;
  const UseDevice use(device);
  const cudaStream_t stream = handle(stream_handle);
  const auto memory = std::make_shared<Stream>(device, stream);

  // A slot is S (rows, D), then z (rows); the saved form is [S | z] row by row.
  const std::int64_t num_sequences = q.shape[0], rows = config.num_heads * config.num_features(), d = config.head_dim;
  const std::size_t slot = align_16(floats(rows * (d + 1)));
  const auto states = memory->allocate(static_cast<std::size_t>(num_sequences) * slot);
  const StateView state{static_cast<std::byte*>(states.get()), slot};
  if (!initial_state)
    check(cudaMemsetAsync(states.get(), 0, static_cast<std::size_t>(num_sequences) * slot, stream), "ops");
  const std::size_t height = static_cast<std::size_t>(rows), pitch = floats(d + 1);
  for (std::int64_t b = 0; initial_state && b < num_sequences; ++b) {
    const auto* saved = static_cast<const float*>(initial_state->data) + b * rows * (d + 1);
    copy_rows(stream, state.slot(b), floats(d), saved, pitch, floats(d), height);
    copy_rows(stream, state.slot(b) + floats(rows * d), sizeof(float), saved + d, pitch, sizeof(float), height);
  }

  for_each_batch(device, stream, {&q, &k, &v, &out}, [&](const DeviceBatch& batch, std::int64_t b) {
    const auto scratch = memory->allocate(linear_attention_scratch(config, q.dtype, batch));
    linear_attention(stream, config, q.dtype, batch, view_of(q, k, v, b), {state.slot(b), slot}, {},
                     const_cast<void*>(sequence(out, b)), token_stride(out), out.strides[2], scratch.get());
  });

  for (std::int64_t b = 0; final_state && b < num_sequences; ++b) {
    auto* saved = static_cast<float*>(final_state->data) + b * rows * (d + 1);
    copy_rows(stream, saved, pitch, state.slot(b), floats(d), floats(d), height);
    copy_rows(stream, saved + d, pitch, state.slot(b) + floats(rows * d), sizeof(float), sizeof(float), height);
  }
}

void sliding_window_attention(const SlidingWindowConfig& config, const Array& q, const Array& k, const Array& v,
                              const Array& out, ops::StreamHandle stream_handle) {
  const int device = q.device.index;
  const UseDevice use(device);
  const cudaStream_t stream = handle(stream_handle);
  const auto memory = std::make_shared<Stream>(device, stream);
  const std::size_t slot =
      align_16(static_cast<std::size_t>(2 * config.window * config.num_kv_heads * config.head_dim) * size_of(q.dtype));
  const std::size_t nbytes = static_cast<std::size_t>(q.shape[0]) * slot;
  const auto rings = memory->allocate(nbytes);
  check(cudaMemsetAsync(rings.get(), 0, nbytes, stream), "ops");
  const StateView state{static_cast<std::byte*>(rings.get()), slot};
  // Without rotary pairs the kernels only read q and k.
  for_each_batch(device, stream, {&q, &k, &v, &out}, [&](const DeviceBatch& batch, std::int64_t b) {
    sliding_window(stream, config, q.dtype, batch, view_of(q, k, v, b), contiguous_ring(config, {state.slot(b), slot}),
                   const_cast<void*>(sequence(out, b)), token_stride(out));
  });
}

void gated_short_conv(const GatedConvConfig& config, const Array& u, const Array& weight,
                      const std::optional<Array>& initial_state, const Array& out,
                      const std::optional<Array>& final_state, ops::StreamHandle stream_handle) {
  const int device = u.device.index;
  const UseDevice use(device);
  const cudaStream_t stream = handle(stream_handle);
  const auto memory = std::make_shared<Stream>(device, stream);
  const std::int64_t num_taps = config.inner_size * config.kernel_size;
  const auto taps = memory->allocate(floats(num_taps));
  convert(stream, weight.dtype, weight.data, DType::float32, taps.get(), num_taps);

  // A slot is (K − 1, e) of u's dtype; the caller's form is float32.
  const std::int64_t per_slot = (config.kernel_size - 1) * config.inner_size, all = u.shape[0] * per_slot;
  const std::size_t width = static_cast<std::size_t>(per_slot) * size_of(u.dtype), slot = align_16(width);
  const auto height = static_cast<std::size_t>(u.shape[0]);
  const auto states = memory->allocate(height * slot), dense = memory->allocate(height * width);
  if (initial_state) {
    convert(stream, DType::float32, initial_state->data, u.dtype, dense.get(), all);
    copy_rows(stream, states.get(), slot, dense.get(), width, width, height);
  } else {
    check(cudaMemsetAsync(states.get(), 0, height * slot, stream), "ops");
  }
  for_each_batch(device, stream, {&u, &out}, [&](const DeviceBatch& batch, std::int64_t) {
    gated_conv(stream, config, u.dtype, static_cast<const float*>(taps.get()), batch, u.data,
               {static_cast<std::byte*>(states.get()), slot}, out.data);
  });
  if (!final_state) return;
  copy_rows(stream, dense.get(), width, states.get(), slot, width, height);
  convert(stream, u.dtype, dense.get(), DType::float32, final_state->data, all);
}

std::shared_ptr<void> allocate(int device, std::size_t nbytes, ops::StreamHandle stream) {
  return std::make_shared<Stream>(device, handle(stream))->allocate(nbytes);
}

void copy(int device, void* to, const void* from, std::size_t nbytes) {
  const UseDevice use(device);
  const std::lock_guard lock(recording_mutex());
  synchronize_device("copying a tensor");
  check(cudaMemcpy(to, from, nbytes, cudaMemcpyDefault), "copying a tensor");
  check(cudaStreamSynchronize(cudaStreamLegacy), "copying a tensor");  // within a device it is not waited for
}

}  // namespace based::cuda
