#include "batch_upload.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cuda_error.h"

namespace based::cuda {

namespace {

// Host arrays one after the other, each aligned to 16 bytes; device pointers follow from the offsets.
class Blob {
 public:
  template <typename T>
  std::size_t add(std::span<const T> values) {
    const std::size_t at = bytes_.size();
    const std::span<const std::byte> bytes = std::as_bytes(values);
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    while (bytes_.size() % 16 != 0) bytes_.push_back({});
    return at;
  }
  template <typename T>
  std::size_t add(const std::vector<T>& values) {
    return add(std::span<const T>(values));
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

void cut(std::vector<Tile>& tiles, std::int32_t sequence, std::int32_t begin, std::int32_t end, std::int32_t step) {
  for (std::int32_t t = begin; t < end; t += step) tiles.push_back({sequence, t, std::min(step, end - t)});
}

}  // namespace

int segment_tokens(std::int64_t length) {
  // Cutting a sequence lets all of the card work on it, and costs a pass that makes what each segment adds: half as
  // long again. 4,096 tokens are not cut, for they seldom come alone; from there on 9 to 16 segments, until they would
  // be longer than that.
  constexpr std::int64_t kUncut = 4096, kLeast = 512, kTargetSegments = 16;
  if (length <= kUncut) return static_cast<int>(kUncut);
  const auto tokens = static_cast<std::uint64_t>((length + kTargetSegments - 1) / kTargetSegments);
  return static_cast<int>(std::clamp(static_cast<std::int64_t>(std::bit_ceil(tokens)), kLeast, kUncut));
}

void StagedCopies::copy(void* device, const void* host, std::size_t nbytes, const char* doing) {
  if (nbytes == 0) return;
  Stage& stage = stages_[next_stage_++ % kStages];
  stage.copied.wait(doing);
  if (nbytes > stage.nbytes) {
    constexpr std::size_t kLeast = std::size_t{64} << 10;  // growing waits for the device
    const std::size_t grown = std::bit_ceil(std::max(nbytes, kLeast));
    stage.nbytes = 0;
    stage.memory = allocate_pinned(grown);
    stage.nbytes = grown;
  }
  std::memcpy(stage.memory.get(), host, nbytes);
  check(cudaMemcpyAsync(device, stage.memory.get(), nbytes, cudaMemcpyHostToDevice, stream_->get()), doing);
  stage.copied.record(stream_->get(), doing);
}

DeviceBatch BatchUpload::upload(const backend::RaggedBatch& batch) {
  const std::int64_t n = batch.num_tokens();
  DeviceBatch out;
  out.num_tokens = static_cast<int>(n);
  out.num_sequences = static_cast<int>(batch.num_sequences());
  std::vector<std::int32_t> singles, longs, first_segments{0};
  std::vector<Tile> tiles, segments;
  if (n > out.num_sequences) {
    for (std::int32_t b = 0; b < out.num_sequences; ++b) {
      const std::int32_t begin = batch.offsets[static_cast<std::size_t>(b)];
      const std::int32_t end = batch.offsets[static_cast<std::size_t>(b) + 1];
      if (end - begin == 1) {
        singles.push_back(b);
        continue;
      }
      longs.push_back(b);
      cut(tiles, b, begin, end, kTileTokens);
      cut(segments, b, begin, end, segment_tokens(end - begin));
      first_segments.push_back(static_cast<std::int32_t>(segments.size()));
    }
    out.num_singles = static_cast<int>(singles.size());
  } else {
    out.num_singles = out.num_sequences;  // all, in order
  }
  out.num_tiles = static_cast<int>(tiles.size());
  out.num_longs = static_cast<int>(longs.size());
  out.num_segments = static_cast<int>(segments.size());

  std::vector<std::int32_t> fed(batch.tokens.begin(), batch.tokens.end());
  if (!fed.empty() && batch.chosen != nullptr)
    for (std::int32_t b = 0; b < out.num_sequences; ++b) {
      std::int32_t& token = fed[static_cast<std::size_t>(batch.offsets[static_cast<std::size_t>(b)])];
      if (token == backend::kChosenToken) token = static_cast<std::int32_t>(chosen_token(b));
    }

  Blob blob;
  const std::size_t slots = blob.add(batch.slots), positions = blob.add(batch.positions);
  const std::size_t offsets = blob.add(batch.offsets), tokens = blob.add(fed);
  const std::size_t logit_rows = blob.add(batch.logit_rows);
  const std::size_t singles_at = blob.add(singles), longs_at = blob.add(longs), tiles_at = blob.add(tiles);
  const std::size_t segments_at = blob.add(segments), first_segments_at = blob.add(first_segments);
  const std::size_t nbytes = blob.bytes().size();

  if (nbytes > device_nbytes_) {
    const std::size_t grown = std::bit_ceil(nbytes);
    device_ = {};
    device_nbytes_ = 0;
    device_ = stream_->allocate(grown);
    device_nbytes_ = grown;
    ++generation_;
  }
  staged_.copy(device_.get(), blob.bytes().data(), nbytes, "begin");

  const auto at = [this](std::size_t offset) { return static_cast<std::byte*>(device_.get()) + offset; };
  out.slots = reinterpret_cast<std::int32_t*>(at(slots));
  out.positions = reinterpret_cast<const std::int64_t*>(at(positions));
  out.offsets = reinterpret_cast<const std::int32_t*>(at(offsets));
  out.tokens = batch.tokens.empty() ? nullptr : reinterpret_cast<const std::int32_t*>(at(tokens));
  if (!batch.logit_rows.empty()) out.logit_rows = reinterpret_cast<const std::int32_t*>(at(logit_rows));
  out.singles = singles.empty() ? nullptr : reinterpret_cast<const std::int32_t*>(at(singles_at));
  out.longs = reinterpret_cast<const std::int32_t*>(at(longs_at));
  out.tiles = reinterpret_cast<const Tile*>(at(tiles_at));
  out.segments = reinterpret_cast<const Tile*>(at(segments_at));
  out.first_segments = reinterpret_cast<const std::int32_t*>(at(first_segments_at));
  return out;
}

}  // namespace based::cuda
