#include "io/safetensors.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "based/error.h"
#include "io/file.h"
#include "io/json.h"
#include "io/text.h"

namespace based::io {

// A safetensors file: 8 bytes n (little-endian), n bytes of JSON, the tensors' bytes.
//   {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {"key": "value"}}

namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kMaxHeader = std::size_t{16} << 20;  // of 160,000 tensors
constexpr std::string_view kMetadata = "__metadata__";
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kBlock = std::size_t{8} << 20;  // of a tensor that is read while it is written

constexpr std::pair<std::string_view, DType> kFileDTypes[] = {
    {"F32", DType::float32},         {"BF16", DType::bfloat16},       {"F16", DType::float16}, {"F64", DType::float64},
    {"I64", DType::int64},           {"I32", DType::int32},           {"I16", DType::int16},   {"I8", DType::int8},
    {"U64", DType::uint64},          {"U32", DType::uint32},          {"U16", DType::uint16},  {"U8", DType::uint8},
    {"F8_E4M3", DType::float8_e4m3}, {"F8_E5M2", DType::float8_e5m2}, {"BOOL", DType::boolean}};

std::optional<DType> dtype_of(std::string_view file_name) {
  for (const auto& [name, dtype] : kFileDTypes) {
    if (name == file_name) return dtype;
  }
  return std::nullopt;
}

std::string_view file_name_of(DType dtype) {
  return std::find_if(std::begin(kFileDTypes), std::end(kFileDTypes),
                      [&](const auto& entry) { return entry.second == dtype; })
      ->first;
}

/// Bytes of such a tensor; none when they overflow int64.
std::optional<std::int64_t> checked_nbytes(const std::vector<std::int64_t>& shape, DType dtype) {
  std::int64_t n = 0;
  try {
    n = num_elements(shape);
  } catch (const InvalidArgument&) {
    return std::nullopt;
  }
  if (__builtin_mul_overflow(n, static_cast<std::int64_t>(size_of(dtype)), &n)) return std::nullopt;
  return n;
}

struct Entry {
  std::string name;
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0;  // bytes from the start of the data
  std::int64_t end = 0;
};

std::vector<std::int64_t> read_sizes(JsonObject& object, std::string_view key) {
  std::vector<std::int64_t> sizes;
  for (const Json& item : object.array(key)) {
    const auto size = item.as_integer();
    if (!size || *size < 0) object.fail(key, item.describe(), "integers >= 0");
    sizes.push_back(*size);
  }
  return sizes;
}

Entry read_entry(const Json::Member& member, const std::string& where) {
  JsonObject object(member.value, where, concat("tensor ", in_quotes(member.key)));
  Entry entry;
  entry.name = member.key;
  const std::string& dtype = object.string("dtype");
  const auto known = dtype_of(dtype);
  if (!known) {
    std::string names;
    for (const auto& [name, _] : kFileDTypes) append_item(names, name);
    object.fail("dtype", in_quotes(dtype), concat("one of ", names));
  }
  entry.dtype = *known;
  entry.shape = read_sizes(object, "shape");
  const auto offsets = read_sizes(object, "data_offsets");
  if (offsets.size() != 2) object.fail("data_offsets", concat(offsets.size(), " numbers"), "begin and end");
  entry.begin = offsets[0];
  entry.end = offsets[1];
  object.finish();

  const auto nbytes = checked_nbytes(entry.shape, entry.dtype);
  if (!nbytes) object.fail("shape", shape_str(entry.shape), "fewer than 2^63 bytes");
  if (entry.end < entry.begin || entry.end - entry.begin != *nbytes) {
    object.fail("data_offsets", concat("[", entry.begin, ", ", entry.end, "]"),
                concat(*nbytes, " bytes, as ", dtype, " ", shape_str(entry.shape), " has"));
  }
  return entry;
}

/// Every byte of the data belongs to exactly one tensor.
void check_coverage(std::vector<Entry>& entries, std::int64_t data_nbytes, const std::string& where) {
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  std::int64_t covered = 0;
  for (const Entry& entry : entries) {
    const auto fail = [&](const std::string& text) {
      throw FormatError(concat(where, ": tensor ", in_quotes(entry.name), ": ", text));
    };
    if (entry.begin != covered) {
      fail(concat("found ", entry.begin < covered ? "an overlap" : "a hole", ": data from byte ", entry.begin,
                  ", expected from byte ", covered));
    }
    if (entry.end > data_nbytes) {
      fail(concat("found ", data_nbytes, " bytes of data in the file, expected at least ", entry.end,
                  " (file truncated?)"));
    }
    covered = entry.end;
  }
  if (covered != data_nbytes) {
    throw FormatError(
        concat(where, ": found ", data_nbytes, " bytes of data, expected the ", covered, " that the tensors have"));
  }
}

struct Header {
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;
  std::size_t data_begin = 0;  // byte of the file
};

/// `read(offset, out)` reads bytes of a file of `size` bytes.
template <class Read>
Header read_header(std::size_t size, const Read& read, const std::string& where) {
  std::string start(std::min<std::size_t>(size, 64), '\0');
  read(0, std::as_writable_bytes(std::span<char>(start)));
  refuse_lfs_pointer(start, where);
  if (size < kLengthBytes) {
    throw FormatError(concat(where, ": found ", size,
                             " bytes, expected a safetensors file (8 bytes of header length, header, data)"));
  }
  std::byte length[kLengthBytes];
  read(0, std::span<std::byte>(length));
  std::uint64_t header_nbytes = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) header_nbytes |= std::to_integer<std::uint64_t>(length[i]) << (8 * i);
  if (const std::size_t limit = parse_limit(kMaxHeader); header_nbytes > limit) {
    throw FormatError(concat(where, ": found a header length of ", header_nbytes, " bytes, expected at most ", limit,
                             " (is it a safetensors file?)"));
  }
  if (header_nbytes > size - kLengthBytes) {
    throw FormatError(concat(where, ": found ", size - kLengthBytes,
                             " bytes behind the header length, expected a header of ", header_nbytes,
                             " (file truncated?)"));
  }
  std::string text(static_cast<std::size_t>(header_nbytes), '\0');
  read(kLengthBytes, std::as_writable_bytes(std::span(text)));
  if (!text.starts_with('{')) {
    throw FormatError(concat(where, ": found a header that starts with ",
                             in_quotes(std::string_view(text).substr(0, 8)), ", expected {"));
  }
  const Json root = Json::parse(text, where);  // an object, or the parser had thrown

  Header header;
  header.entries.reserve(root.as_object()->size());
  for (const Json::Member& member : *root.as_object()) {
    if (member.key != kMetadata) {
      header.entries.push_back(read_entry(member, where));
      continue;
    }
    JsonObject object(member.value, where, std::string(kMetadata));
    for (const Json::Member& item : *member.value.as_object()) {
      header.metadata.emplace(item.key, object.string(item.key));
    }
  }
  header.data_begin = kLengthBytes + text.size();
  check_coverage(header.entries, static_cast<std::int64_t>(size - header.data_begin), where);
  return header;
}

}  // namespace

class SafetensorsFile::Impl {
 public:
  Impl(const std::filesystem::path& path, bool in_memory) : file_(path) {
    read_header_from([this](std::size_t offset, std::span<std::byte> out) { file_->read(offset, out); }, path,
                     file_->size());
    if (in_memory) {
      bytes_.resize(file_->size() - data_begin_);
      file_->read(data_begin_, bytes_);
      file_.reset();
      set_views(bytes_.data());
    } else {
      map_.emplace(*file_);
      set_views(map_->bytes().data() + data_begin_);
    }
  }

  Impl(std::span<const std::byte> bytes, const std::string& where) {
    read_header_from(
        [&](std::size_t offset, std::span<std::byte> out) {
          std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(offset), out.size(), out.begin());
        },
        where, bytes.size());
    bytes_.assign(bytes.begin() + static_cast<std::ptrdiff_t>(data_begin_), bytes.end());
    set_views(bytes_.data());
  }

  void read(const TensorView& tensor, std::size_t offset, std::span<std::byte> out) const {
    const std::byte* const begin = map_ ? map_->bytes().data() : bytes_.data();
    const auto position = static_cast<std::size_t>(tensor.data - begin) + offset;
    if (file_)
      file_->read(position, out);
    else
      std::copy_n(begin + position, out.size(), out.begin());
  }

  std::filesystem::path path_;
  std::optional<InputFile> file_;  // of a mapped file
  std::optional<MappedFile> map_;
  std::vector<std::byte> bytes_;  // the data, of a file in memory
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> metadata_;

 private:
  template <class Read>
  void read_header_from(const Read& read, const std::filesystem::path& path, std::size_t size) {
    path_ = path;
    Header header = read_header(size, read, path.string());
    metadata_ = std::move(header.metadata);
    entries_ = std::move(header.entries);
    data_begin_ = header.data_begin;
  }

  void set_views(const std::byte* data) {
    for (Entry& entry : entries_) {
      tensors_.emplace(std::move(entry.name), TensorView{entry.dtype, std::move(entry.shape), data + entry.begin});
    }
    entries_ = {};
  }

  std::vector<Entry> entries_;
  std::size_t data_begin_ = 0;
};

SafetensorsFile::SafetensorsFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SafetensorsFile::~SafetensorsFile() = default;

std::shared_ptr<const SafetensorsFile> SafetensorsFile::open(const std::filesystem::path& path) {
  return std::shared_ptr<const SafetensorsFile>(new SafetensorsFile(std::make_unique<Impl>(path, false)));
}

std::shared_ptr<const SafetensorsFile> SafetensorsFile::read(const std::filesystem::path& path) {
  return std::shared_ptr<const SafetensorsFile>(new SafetensorsFile(std::make_unique<Impl>(path, true)));
}

std::shared_ptr<const SafetensorsFile> SafetensorsFile::parse(std::span<const std::byte> bytes,
                                                              const std::string& where) {
  return std::shared_ptr<const SafetensorsFile>(new SafetensorsFile(std::make_unique<Impl>(bytes, where)));
}

const std::filesystem::path& SafetensorsFile::path() const { return impl_->path_; }
const std::map<std::string, TensorView>& SafetensorsFile::tensors() const { return impl_->tensors_; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const { return impl_->metadata_; }

void SafetensorsFile::read(const TensorView& tensor, std::size_t offset, std::span<std::byte> out) const {
  if (offset > tensor.nbytes() || out.size() > tensor.nbytes() - offset)
    throw InvalidArgument("found bytes outside of the tensor");
  impl_->read(tensor, offset, out);
}

void write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                       const std::map<std::string, std::string>& metadata, const BlockReader& read) {
  const std::string where = concat(path.string(), ": ");
  std::string header = "{";
  if (!metadata.empty()) {
    std::string items;
    for (const auto& [key, value] : metadata) {
      items += concat(items.empty() ? "" : ",", json_string(key), ":", json_string(value));
    }
    header += concat(json_string(kMetadata), ":{", items, "}");
  }
  std::set<std::string_view> names;
  std::int64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    if (name == kMetadata || !names.insert(name).second) {
      throw InvalidArgument(
          concat(where, "found the tensor name ", in_quotes(name), " twice or reserved, expected unique names"));
    }
    const auto nbytes = checked_nbytes(tensor.shape, tensor.dtype);
    std::int64_t end = 0;
    if (!nbytes || __builtin_add_overflow(offset, *nbytes, &end)) {
      throw InvalidArgument(concat(where, "tensor ", in_quotes(name), ": found shape ", shape_str(tensor.shape),
                                   ", expected extents >= 0 and fewer than 2^63 bytes"));
    }
    std::string shape;
    for (const std::int64_t extent : tensor.shape) shape += concat(shape.empty() ? "" : ",", extent);
    header += concat(header.size() > 1 ? "," : "", json_string(name), ":{\"dtype\":\"", file_name_of(tensor.dtype),
                     "\",\"shape\":[", shape, "],\"data_offsets\":[", offset, ",", end, "]}");
    offset = end;
  }
  header += '}';
  header.resize((kLengthBytes + header.size() + kAlignment - 1) / kAlignment * kAlignment - kLengthBytes, ' ');
  if (const std::size_t limit = parse_limit(kMaxHeader); header.size() > limit) {
    throw InvalidArgument(concat(where, "found a header of ", header.size(), " bytes, expected at most ", limit));
  }

  unsigned char length[kLengthBytes];
  for (std::size_t i = 0; i < kLengthBytes; ++i) length[i] = static_cast<unsigned char>(header.size() >> (8 * i));
  AtomicFile file(path);
  file.write(length, sizeof length);
  file.write(header.data(), header.size());
  std::vector<std::byte> block;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& tensor = tensors[i].tensor;
    const std::size_t nbytes = tensor.nbytes();
    if (tensor.data != nullptr) file.write(tensor.data, nbytes);
    for (std::size_t begin = 0; tensor.data == nullptr && begin < nbytes; begin += block.size()) {
      block.resize(std::min(nbytes - begin, kBlock));
      read(i, begin, block);
      file.write(block.data(), block.size());
    }
  }
  file.commit();
}

}  // namespace based::io
