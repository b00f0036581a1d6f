#include "model/weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <future>
#include <numeric>
#include <span>
#include <system_error>
#include <thread>

#include "based/error.h"
#include "io/crc32c.h"
#include "io/hash.h"
#include "io/text.h"

namespace based {

namespace {

bool is_float(DType dtype) { return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16; }

// splitmix64: one multiply-xor chain per number.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr std::size_t kBlockBytes = std::size_t{1} << 20;

// Calls body(block) for every block, on some threads where that pays.
template <class Body>
void for_blocks(std::size_t num_blocks, const Body& body) {
  constexpr std::size_t kBlocksPerThread = 8, kMaxThreads = 4;
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t block; (block = next.fetch_add(1)) < num_blocks;) body(block);
  };
  const std::size_t useful = std::min(kMaxThreads, num_blocks / kBlocksPerThread);
  std::vector<std::future<void>> others;  // their destructors wait, their get() throws what they threw
  try {
    while (others.size() + 1 < std::min<std::size_t>(useful, std::thread::hardware_concurrency()))
      others.push_back(std::async(std::launch::async, work));
  } catch (const std::system_error&) {  // no more threads: this one does their work
  }
  work();
  for (std::future<void>& other : others) other.get();
}

// What the fingerprints of older versions saw of a tensor.
std::string sample_of(std::span<const std::byte> bytes) {
  constexpr std::size_t kBlocks = 64, kSampleBytes = 64;
  const auto text = [&](std::size_t begin, std::size_t n) {
    return std::string(reinterpret_cast<const char*>(bytes.data()) + begin, n);
  };
  if (bytes.size() <= kBlocks * kSampleBytes) return text(0, bytes.size());
  std::string sample;
  for (std::size_t i = 0; i < kBlocks; ++i)
    sample += text((bytes.size() - kSampleBytes) / (kBlocks - 1) * i, kSampleBytes);
  return sample;
}

}  // namespace

const TensorView& FileWeights::find(const std::string& name, const std::vector<std::int64_t>& shape) const {
  const auto it = files_.tensors().find(name);
  if (it == files_.tensors().end())
    throw FormatError(where_ + ": tensor " + name + " " + shape_str(shape) + " is missing");
  const TensorView& tensor = it->second;
  if (tensor.shape != shape)
    throw FormatError(where_ + ": tensor " + name + " has shape " + shape_str(tensor.shape) + ", the config makes it " +
                      shape_str(shape));
  if (!is_float(tensor.dtype))
    throw FormatError(where_ + ": tensor " + name + " has dtype " + std::string(name_of(tensor.dtype)) +
                      ", expected float32, bfloat16 or float16");
  return tensor;
}

DType FileWeights::dtype_of(const std::string& name, const std::vector<std::int64_t>& shape) const {
  return find(name, shape).dtype;
}

TensorView FileWeights::take(const std::string& name, const std::vector<std::int64_t>& shape) {
  const TensorView& tensor = find(name, shape);
  const std::size_t nbytes = tensor.nbytes();
  std::byte* const data = allocate(nbytes);
  Digest digest;
  digest.blocks.resize((nbytes + kBlockBytes - 1) / kBlockBytes);
  for_blocks(digest.blocks.size(), [&](std::size_t block) {
    const std::size_t begin = block * kBlockBytes;
    const std::span<std::byte> part(data + begin, std::min(kBlockBytes, nbytes - begin));
    files_.read(name, begin, part);
    io::Crc32c crc;
    crc.add(part.data(), part.size());
    digest.blocks[block] = crc.value();
  });
  digest.sample = sample_of({data, nbytes});
  digests_[name] = std::move(digest);
  return {tensor.dtype, tensor.shape, data};
}

// Memory that was used before costs no page faults.
std::byte* FileWeights::allocate(std::size_t nbytes) {
  const auto fits = std::ranges::find_if(spare_, [&](const Memory& memory) { return memory.capacity >= nbytes; });
  if (fits != spare_.end()) {
    held_.push_back(std::move(*fits));
    spare_.erase(fits);
  } else {
    spare_.clear();
    held_.push_back({std::make_unique_for_overwrite<std::byte[]>(nbytes), nbytes});
  }
  return held_.back().bytes.get();
}

void FileWeights::release() {
  for (Memory& memory : held_) spare_.push_back(std::move(memory));
  held_.clear();
}

void FileWeights::check_all_taken() const {
  std::string extra;
  int count = 0;
  for (const auto& [name, tensor] : files_.tensors()) {
    if (digests_.contains(name)) continue;
    if (++count <= 5) extra += (count > 1 ? ", " : "") + io::printable(name);
  }
  if (count > 0)
    throw FormatError(where_ + ": " + std::to_string(count) + " tensors that the config has no place for: " + extra +
                      (count > 5 ? ", …" : ""));
}

Fingerprints FileWeights::fingerprints(const ModelConfig& config) const {
  io::Fnv1a all, sampled;
  for (io::Fnv1a* hash : {&all, &sampled}) hash->add(config.to_json());
  for (const auto& [name, digest] : digests_) {
    const TensorView& tensor = files_.tensors().at(name);
    for (io::Fnv1a* hash : {&all, &sampled}) {
      hash->add(name);
      hash->add(name_of(tensor.dtype));
      hash->add(shape_str(tensor.shape));
    }
    all.add(digest.blocks.data(), digest.blocks.size() * sizeof(std::uint32_t));
    sampled.add(digest.sample);
  }
  return {all.hex(), sampled.hex()};
}

TensorView RandomWeights::take(const std::string& name, const std::vector<std::int64_t>& shape) {
  Tensor tensor = Tensor::empty(DType::float32, shape);
  auto* x = tensor.data_as<float>();
  const std::int64_t n = tensor.size();
  io::Fnv1a hash;
  hash.add(name);
  const std::uint64_t key = mix(seed_ ^ hash.value());
  const bool norm_weight = shape.size() == 1 && name.find("norm") != std::string::npos && name.ends_with(".weight");
  if (norm_weight) {
    std::fill(x, x + n, 1.0f);
  } else {
    // Uniform on ±√3·std; std = 1/√fan_in, biases small.
    const double std_dev = shape.size() == 2 ? 1.0 / std::sqrt(static_cast<double>(shape[1])) : 0.02;
    const float scale = static_cast<float>(std::sqrt(3.0) * std_dev * 0x1p-31);
    for (std::int64_t i = 0; i < n; i += 2) {
      const std::uint64_t bits = mix(key + static_cast<std::uint64_t>(i));
      x[i] = scale * static_cast<float>(static_cast<std::int32_t>(bits));
      if (i + 1 < n) x[i + 1] = scale * static_cast<float>(static_cast<std::int32_t>(bits >> 32));
    }
  }
  held_.push_back(tensor);
  return tensor.view();
}

std::shared_ptr<const backend::LinearWeight> WeightLoader::linear(const std::vector<Matrix>& stacked,
                                                                  std::int64_t in_features, bool bias,
                                                                  Activation activation, bool gated) {
  backend::LinearSource parts;
  parts.activation = activation;
  parts.gated = gated;
  for (const auto& [name, rows] : stacked) {
    parts.weights.push_back(source.take(name + ".weight", {rows, in_features}));
    if (bias) parts.biases.push_back(source.take(name + ".bias", {rows}));
  }
  auto packed = backend.pack_linear(parts, dtype);
  source.release();
  nbytes += packed->nbytes();
  return packed;
}

std::vector<std::shared_ptr<const backend::LinearWeight>> WeightLoader::rows_of(const std::string& name,
                                                                                const std::vector<std::int64_t>& rows,
                                                                                std::int64_t in_features) {
  const std::int64_t all = std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
  TensorView rest = source.take(name + ".weight", {all, in_features});
  std::vector<std::shared_ptr<const backend::LinearWeight>> parts;
  for (const std::int64_t count : rows) {
    backend::LinearSource part;
    part.weights.push_back({rest.dtype, {count, in_features}, rest.data});
    rest.data += part.weights[0].nbytes();
    parts.push_back(backend.pack_linear(part, dtype));
    nbytes += parts.back()->nbytes();
  }
  source.release();
  return parts;
}

backend::Buffer WeightLoader::vector(const std::string& name, const std::vector<std::int64_t>& shape) {
  auto packed = backend.pack_float32(source.take(name, shape));
  source.release();
  nbytes += packed.nbytes;
  return packed;
}

}  // namespace based
