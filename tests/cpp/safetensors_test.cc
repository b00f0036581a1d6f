#include "io/safetensors.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "based/error.h"
#include "io/file.h"
#include "temporary_folder.h"

namespace based::io {
namespace {

using test::read_bytes;
using test::TemporaryFolder;
using test::write_bytes;

TensorView view(DType dtype, std::vector<std::int64_t> shape, const void* data) {
  return {dtype, std::move(shape), static_cast<const std::byte*>(data)};
}

/// A file of this header and this many bytes of data.
std::string file_of(const std::string& header, std::size_t data_nbytes) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i));
  bytes += header;
  for (std::size_t i = 0; i < data_nbytes; ++i) bytes += static_cast<char>('A' + i);
  return bytes;
}

class Safetensors : public testing::Test {
 protected:
  std::shared_ptr<const SafetensorsFile> open(const std::string& bytes) {
    write_bytes(path_, bytes);
    return SafetensorsFile::open(path_);
  }

  /// A small file with several dtypes, misaligned data, and tensors without elements.
  std::string sample() {
    const float floats[] = {1, -2, 3.5f, 0, 5, 6};
    const std::uint8_t byte = 7;
    const std::int64_t integers[] = {-1, 1};
    write_safetensors(path_,
                      {{"byte", view(DType::uint8, {1}, &byte)},
                       {"none", view(DType::float32, {0, 3}, nullptr)},
                       {"floats", view(DType::float32, {2, 3}, floats)},
                       {"scalar", view(DType::int64, {}, integers)},
                       {"integers", view(DType::int64, {2}, integers)},
                       {"nothing", view(DType::bfloat16, {0}, nullptr)}},
                      {{"format", "test"}, {"quote\"", "line\nénd"}});
    return read_bytes(path_);
  }

  TemporaryFolder folder_;
  const std::filesystem::path path_ = folder_ / "x.safetensors";
};

TEST_F(Safetensors, WritesWhatItReads) {
  const std::string bytes = sample();
  const auto file = SafetensorsFile::open(path_);
  ASSERT_EQ(file->tensors().size(), 6u);
  const TensorView& floats = file->tensors().at("floats");
  EXPECT_EQ(floats.dtype, DType::float32);
  EXPECT_EQ(floats.shape, (std::vector<std::int64_t>{2, 3}));
  float values[6];
  std::memcpy(values, floats.data, sizeof values);
  EXPECT_EQ(values[2], 3.5f);
  EXPECT_EQ(file->tensors().at("scalar").shape, std::vector<std::int64_t>{});
  EXPECT_EQ(file->tensors().at("none").nbytes(), 0u);
  EXPECT_EQ(std::to_integer<int>(*file->tensors().at("byte").data), 7);
  EXPECT_EQ(file->metadata(), (std::map<std::string, std::string>{{"format", "test"}, {"quote\"", "line\nénd"}}));
  EXPECT_EQ(file->path(), path_);
  EXPECT_EQ((bytes.size() - 1 - 24 - 8 - 16) % 64, 0u);  // the data starts aligned
  EXPECT_EQ(folder_.num_files(), 1);
}

TEST_F(Safetensors, KnowsEveryDType) {
  const std::vector<std::byte> data(8);
  std::vector<TensorToWrite> tensors;
  for (int i = 0; i <= static_cast<int>(DType::float8_e5m2); ++i) {
    tensors.push_back({std::to_string(i), view(static_cast<DType>(i), {1}, data.data())});
  }
  write_safetensors(path_, tensors, {});
  const auto file = SafetensorsFile::open(path_);
  for (const auto& [name, tensor] : file->tensors()) EXPECT_EQ(static_cast<int>(tensor.dtype), std::stoi(name));
  EXPECT_NE(read_bytes(path_).find(R"("13":{"dtype":"F8_E4M3","shape":[1])"), std::string::npos);
}

TEST_F(Safetensors, ReadsLegalOddities) {
  EXPECT_TRUE(open(file_of("{}", 0))->tensors().empty());
  EXPECT_TRUE(open(file_of("{}      ", 0))->tensors().empty());
  // Misaligned, out of order, scalar, empty tensors at borders.
  const auto file = open(file_of(R"({"b":{"dtype":"F32","shape":[],"data_offsets":[1,5]},)"
                                 R"("z":{"dtype":"F64","shape":[7,0],"data_offsets":[5,5]},)"
                                 R"("a":{"dtype":"BOOL","shape":[1,1],"data_offsets":[0,1]}})",
                                 5));
  EXPECT_EQ(std::memcmp(file->tensors().at("b").data, "BCDE", 4), 0);
  EXPECT_EQ(std::memcmp(file->tensors().at("a").data, "A", 1), 0);
}

TEST_F(Safetensors, RefusesDamagedFraming) {
  EXPECT_THROW_WITH(open(""), FormatError, "x.safetensors: found 0 bytes, expected a safetensors file");
  EXPECT_THROW_WITH(open("1234567"), FormatError, "found 7 bytes");
  EXPECT_THROW_WITH(open("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n"), FormatError,
                    "x.safetensors: found a Git LFS pointer, expected the file that it stands for: run `git lfs pull`");
  EXPECT_THROW_WITH(open(std::string(8, '\0')), FormatError, "header that starts with \"\", expected {");
  EXPECT_THROW_WITH(open(std::string(8, '\xff')), FormatError, "header length of 18446744073709551615 bytes");
  EXPECT_THROW_WITH(open(std::string("\x01\xe1\xf5\x05\0\0\0\0{}", 10)), FormatError,
                    "header length of 100000001 bytes, expected at most 16777216");
  EXPECT_THROW_WITH(open(std::string("\x03\0\0\0\0\0\0\0{}", 10)), FormatError,
                    "found 2 bytes behind the header length, expected a header of 3");
  EXPECT_THROW_WITH(open(file_of(" {}", 0)), FormatError, "header that starts with \" {}\"");
  EXPECT_THROW_WITH(open(file_of("[]", 0)), FormatError, "header that starts with \"[]\"");
  EXPECT_THROW_WITH(open(file_of("{", 0)), FormatError, "expected JSON");
  EXPECT_THROW_WITH(open(file_of("{}{}", 0)), FormatError, "expected JSON");
  EXPECT_THROW_WITH(open(file_of("{\"\xff\":1}", 0)), FormatError, "ill-formed UTF-8");
  EXPECT_THROW_WITH(open("PK\x03\x04 not safetensors at all"), FormatError, "is it a safetensors file?");
}

TEST_F(Safetensors, RefusesBadEntries) {
  const auto refused = [&](const std::string& entry, std::size_t data_nbytes, const std::string& text) {
    EXPECT_THROW_WITH(open(file_of("{\"t\":" + entry + "}", data_nbytes)), FormatError, "x.safetensors: " + text);
  };
  refused("3", 0, "tensor \"t\": found 3, expected an object");
  refused(R"({"shape":[1],"data_offsets":[0,4]})", 4, "tensor \"t\".dtype: found no such key");
  refused(R"({"dtype":"F32","data_offsets":[0,4]})", 4, "tensor \"t\".shape: found no such key");
  refused(R"({"dtype":"F32","shape":[1]})", 4, "tensor \"t\".data_offsets: found no such key");
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":0})", 4, "tensor \"t\".x: found an unknown key");
  refused(R"({"dtype":"F4","shape":[1],"data_offsets":[0,4]})", 4,
          "tensor \"t\".dtype: found \"F4\", expected one of F32");
  refused(R"({"dtype":"f32","shape":[1],"data_offsets":[0,4]})", 4, "tensor \"t\".dtype: found \"f32\"");
  refused(R"({"dtype":1,"shape":[1],"data_offsets":[0,4]})", 4, "tensor \"t\".dtype: found 1, expected a string");
  refused(R"({"dtype":"F32","shape":1,"data_offsets":[0,4]})", 4, "tensor \"t\".shape: found 1, expected an array");
  refused(R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})", 4,
          "tensor \"t\".shape: found -1, expected integers >= 0");
  refused(R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})", 4, "tensor \"t\".shape: found 1.0");
  refused(R"({"dtype":"F32","shape":["1"],"data_offsets":[0,4]})", 4, "tensor \"t\".shape: found \"1\"");
  refused(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]})", 4,
          "tensor \"t\".shape: found 1844");
  refused(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0,
          "tensor \"t\".shape: found (4294967296, 4294967296), expected fewer than 2^63 bytes");
  refused(R"({"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]})", 0, "tensor \"t\".shape: found (23");
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[0]})", 4, "tensor \"t\".data_offsets: found 1 numbers");
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})", 4, "tensor \"t\".data_offsets: found 3 numbers");
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})", 4,
          "tensor \"t\".data_offsets: found [4, 0], expected 4 bytes");
  refused(R"({"dtype":"F32","shape":[2],"data_offsets":[0,4]})", 4,
          "tensor \"t\".data_offsets: found [0, 4], expected 8 bytes, as F32 (2) has");
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", 3,
          "tensor \"t\": found 3 bytes of data in the file, expected at least 4");
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", 5,
          "found 5 bytes of data, expected the 4 that the tensors have");
  refused(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})", 8, "tensor \"t\": found a hole: data from byte 4");
}

TEST_F(Safetensors, RefusesOverlapHolesAndDuplicates) {
  const std::string first = R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)";
  EXPECT_THROW_WITH(open(file_of(first + R"("b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}})", 7)), FormatError,
                    "tensor \"b\": found an overlap: data from byte 3, expected from byte 4");
  EXPECT_THROW_WITH(open(file_of(first + R"("b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4)), FormatError,
                    "found an overlap");
  EXPECT_THROW_WITH(open(file_of(first + R"("b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})", 4)), FormatError,
                    "tensor \"b\": found an overlap");
  EXPECT_THROW_WITH(open(file_of(first + R"("b":{"dtype":"U8","shape":[0],"data_offsets":[9,9]}})", 4)), FormatError,
                    "tensor \"b\": found a hole");
  EXPECT_THROW_WITH(open(file_of(first + R"("b":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}})", 6)), FormatError,
                    "tensor \"b\": found a hole: data from byte 5, expected from byte 4");
  EXPECT_THROW_WITH(open(file_of(first + R"("a":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}})", 5)), FormatError,
                    "found the key \"a\" twice");
  EXPECT_THROW_WITH(open(file_of(first + R"("b":{"dtype":"U8","shape":[9223372036854775807],)"
                                         R"("data_offsets":[4,9223372036854775807]}})",
                                 5)),
                    FormatError, "tensor \"b\".data_offsets");
}

TEST_F(Safetensors, RefusesMetadataOtherThanStrings) {
  EXPECT_THROW_WITH(open(file_of(R"({"__metadata__":{"a":1}})", 0)), FormatError,
                    "__metadata__.a: found 1, expected a string");
  EXPECT_THROW_WITH(open(file_of(R"({"__metadata__":["a"]})", 0)), FormatError, "__metadata__: found an array of 1");
  EXPECT_THROW_WITH(open(file_of(R"({"__metadata__":{"a":"1","a":"2"}})", 0)), FormatError, "the key \"a\" twice");
}

TEST_F(Safetensors, RefusesEveryTruncation) {
  const std::string bytes = sample();
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_THROW(open(bytes.substr(0, n)), FormatError) << n << " of " << bytes.size();
  }
  EXPECT_THROW(open(bytes + '\0'), FormatError);
}

TEST_F(Safetensors, SurvivesRandomDamage) {
  const std::string bytes = sample();
  std::mt19937 random(5);
  int accepted = 0;
  for (int i = 0; i < 5000; ++i) {
    std::string damaged = bytes;
    // Half of them by a bit, half by digits and signs: those come further.
    for (auto n = random() % 3 + 1; n > 0; --n) {
      char& c = damaged[random() % (bytes.size() - 49)];
      c = i % 2 ? "0123456789-,[]\"{}e. "[random() % 20] : static_cast<char>(c ^ (1 << random() % 8));
    }
    try {
      const auto file = open(damaged);
      ++accepted;
      std::size_t nbytes = 8;
      for (int k = 0; k < 8; ++k) nbytes += static_cast<std::size_t>(static_cast<unsigned char>(damaged[k])) << (8 * k);
      const std::string data = damaged.substr(nbytes);
      for (const auto& [name, tensor] : file->tensors()) {  // inside the file: equal to a part of its data
        const std::string part(reinterpret_cast<const char*>(tensor.data), tensor.nbytes());
        EXPECT_NE(data.find(part), std::string::npos) << name;
        nbytes += part.size();
      }
      EXPECT_EQ(nbytes, damaged.size());
    } catch (const FormatError&) {
    }
  }
  EXPECT_GT(accepted, 0);  // a letter of a name changed, for one
}

TEST_F(Safetensors, SaysWhyAFileCannotBeRead) {
  const auto code_of = [](const std::filesystem::path& path) {
    try {
      SafetensorsFile::open(path);
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find(path.string()), std::string::npos);
      return error.code().value();
    }
    return 0;
  };
  EXPECT_EQ(code_of(path_), ENOENT);
  EXPECT_EQ(code_of(folder_.path()), EISDIR);
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(code_of(folder_ / "pipe"), EINVAL);
}

// A file that another program shortens after it was opened is an error for whoever reads it, and no signal.
TEST_F(Safetensors, ReadsWithoutTheMapping) {
  std::vector<std::uint32_t> numbers(1 << 18);
  std::iota(numbers.begin(), numbers.end(), 0u);
  const auto* const bytes = reinterpret_cast<const std::byte*>(numbers.data());
  const std::uint8_t byte = 1;
  write_safetensors(path_,
                    {{"a", view(DType::uint8, {1}, &byte)}, {"b", view(DType::uint32, {1 << 18}, numbers.data())}}, {});
  const auto mapped = SafetensorsFile::open(path_), in_memory = SafetensorsFile::read(path_);
  std::vector<std::byte> part(5000);
  for (const auto& file : {mapped, in_memory}) {
    const TensorView& tensor = file->tensors().at("b");
    file->read(tensor, 4097, part);
    EXPECT_EQ(std::memcmp(part.data(), bytes + 4097, part.size()), 0);
    EXPECT_THROW(file->read(tensor, tensor.nbytes() - 4999, part), InvalidArgument);
    EXPECT_THROW(file->read(tensor, tensor.nbytes() + 1, {}), InvalidArgument);
  }
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) - 2);
  const TensorView& tensor = mapped->tensors().at("b");
  mapped->read(tensor, tensor.nbytes() - 5002, part);
  EXPECT_THROW_WITH(mapped->read(tensor, tensor.nbytes() - 5000, part), FormatError,
                    "x.safetensors: found " + std::to_string(std::filesystem::file_size(path_)) + " bytes, expected");
  EXPECT_EQ(std::memcmp(in_memory->tensors().at("b").data, bytes, numbers.size() * 4), 0);
}

// [0, 0, …] of 16 MB takes a second and 100 MB of memory, not 600; what is refused is not quoted whole.
TEST_F(Safetensors, BoundsWhatAHeaderMayHold) {
  std::string zeros = "{\"a\":[0";
  while (zeros.size() < (15u << 20)) zeros += ",0";
  EXPECT_THROW_WITH(open(file_of(zeros + "]}", 0)), FormatError, "JSON of more than 2000000 values");
  std::string key(15u << 20, 'k');
  const std::string text = test::message_of<FormatError>([&] { open(file_of("{\"" + key + "\":1}", 0)); });
  EXPECT_LT(text.size(), 1000u);
  const std::string bytes = file_of("{}" + std::string(17u << 20, ' '), 0);
  EXPECT_THROW_WITH(open(bytes), FormatError, "expected at most 16777216");
  ASSERT_EQ(::setenv("BASED_PARSE_LIMIT", "2", 1), 0);
  EXPECT_TRUE(open(bytes)->tensors().empty());
  ASSERT_EQ(::setenv("BASED_PARSE_LIMIT", "none", 1), 0);
  EXPECT_THROW_WITH(open(bytes), InvalidArgument, "BASED_PARSE_LIMIT: found \"none\", expected an integer from 1");
  ASSERT_EQ(::unsetenv("BASED_PARSE_LIMIT"), 0);
}

TEST_F(Safetensors, OutlivesItsReplacement) {
  sample();
  const auto file = SafetensorsFile::open(path_);
  const std::uint8_t byte = 1;
  write_safetensors(path_, {{"other", view(DType::uint8, {1}, &byte)}}, {});
  float first;
  std::memcpy(&first, file->tensors().at("floats").data, sizeof first);
  EXPECT_EQ(first, 1);
  EXPECT_EQ(SafetensorsFile::open(path_)->tensors().count("other"), 1u);
}

TEST_F(Safetensors, WriterRefusesBadArguments) {
  const std::uint8_t byte = 1;
  const TensorView tensor = view(DType::uint8, {1}, &byte);
  EXPECT_THROW_WITH(write_safetensors(path_, {{"a", tensor}, {"a", tensor}}, {}), InvalidArgument, "\"a\" twice");
  EXPECT_THROW_WITH(write_safetensors(path_, {{"__metadata__", tensor}}, {}), InvalidArgument, "reserved");
  EXPECT_THROW_WITH(write_safetensors(path_, {{"\xff", tensor}}, {}), InvalidArgument, "expected UTF-8");
  EXPECT_THROW_WITH(write_safetensors(path_, {{"a", view(DType::uint8, {-1}, &byte)}}, {}), InvalidArgument, "(-1)");
  EXPECT_EQ(folder_.num_files(), 0);
}

TEST_F(Safetensors, FailedWriteLeavesTheOldFileAndNoTrace) {
  const std::string old = sample();
  const std::vector<std::byte> data(1 << 20);
  const TensorView tensor = view(DType::uint8, {1 << 20}, data.data());

  // A full disk, as a limit of this process.
  rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1 << 16, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  int code = 0;
  try {
    write_safetensors(path_, {{"a", tensor}}, {});
  } catch (const IoError& error) {
    code = error.code().value();
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  ::signal(SIGXFSZ, handler);
  EXPECT_EQ(code, EFBIG);
  EXPECT_EQ(read_bytes(path_), old);
  EXPECT_EQ(folder_.num_files(), 1);

  EXPECT_THROW_WITH(write_safetensors(folder_ / "none/x", {{"a", tensor}}, {}), IoError, "none/x: No such file");
  std::filesystem::create_directory(folder_ / "folder");
  EXPECT_THROW(write_safetensors(folder_ / "folder", {{"a", tensor}}, {}), IoError);
  EXPECT_EQ(folder_.num_files(), 2);
}

TEST_F(Safetensors, ConcurrentWritersDoNotMix) {
  std::vector<std::thread> threads;
  for (std::uint8_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const std::vector<std::uint8_t> data(50000, t);
      for (int i = 0; i < 5; ++i) write_safetensors(path_, {{"a", view(DType::uint8, {50000}, data.data())}}, {});
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto file = SafetensorsFile::open(path_);
  const std::byte* data = file->tensors().at("a").data;
  for (int i = 1; i < 50000; ++i) ASSERT_EQ(data[i], data[0]);
  EXPECT_EQ(folder_.num_files(), 1);
}

TEST(ReadFile, LimitsSize) {
  TemporaryFolder folder;
  write_bytes(folder / "a", "12345");
  EXPECT_EQ(read_file(folder / "a", 5), "12345");
  EXPECT_THROW_WITH(read_file(folder / "a", 4), FormatError, "found 5 bytes, expected at most 4");
  write_bytes(folder / "empty", "");
  EXPECT_EQ(read_file(folder / "empty", 0), "");
  EXPECT_THROW(read_file(folder / "none", 1), IoError);
}

// ---- WeightFiles ----------------------------------------------------------------------------------------------------

class Weights : public testing::Test {
 protected:
  void write(const std::string& file, const std::vector<std::string>& names) {
    std::vector<TensorToWrite> tensors;
    for (const std::string& name : names) tensors.push_back({name, view(DType::uint8, {1}, &byte_)});
    write_safetensors(folder_ / file, tensors, {});
  }
  void index(const std::string& text) { write_bytes(folder_ / "model.safetensors.index.json", text); }
  WeightFiles open() const { return WeightFiles::open(folder_.path()); }

  const std::uint8_t byte_ = 9;
  TemporaryFolder folder_;
};

TEST_F(Weights, OneFile) {
  write("model.safetensors", {"a", "b"});
  const WeightFiles weights = open();
  EXPECT_EQ(weights.tensors().size(), 2u);
  EXPECT_EQ(std::to_integer<int>(*weights.tensors().at("b").data), 9);
  std::byte byte{};
  weights.read("b", 0, {&byte, 1});
  EXPECT_EQ(std::to_integer<int>(byte), 9);
}

TEST_F(Weights, Shards) {
  write("s1.safetensors", {"a", "b"});
  write("s2.safetensors", {"c"});
  index(
      R"({"metadata": {"total_size": 3}, "weight_map": {"a": "s1.safetensors", "c": "s2.safetensors", "b": "s1.safetensors"}})");
  const WeightFiles weights = open();
  EXPECT_EQ(weights.tensors().size(), 3u);
  std::byte byte{};
  weights.read("c", 0, {&byte, 1});
  EXPECT_EQ(std::to_integer<int>(byte), 9);
}

TEST_F(Weights, RefusesNeitherAndBoth) {
  EXPECT_THROW_WITH(open(), IoError, "model.safetensors: No such file");
  EXPECT_THROW(WeightFiles::open(folder_ / "none"), IoError);
  write("model.safetensors", {"a"});
  index("{}");
  EXPECT_THROW_WITH(open(), FormatError, "found both model.safetensors and model.safetensors.index.json");
}

TEST_F(Weights, RefusesBadIndexes) {
  write("s1", {"a"});
  const std::pair<const char*, const char*> cases[] = {
      {"", "index.json: expected JSON"},
      {"[]", "found an array of 0, expected an object"},
      {R"({"metadata": {}})", "weight_map: found no such key"},
      {R"({"metadata": 1, "weight_map": {"a": "s1"}})", "metadata: found 1, expected an object"},
      {R"({"metadata": {}, "weight_map": ["a"]})", "weight_map: found an array of 1"},
      {R"({"metadata": {}, "weight_map": {"a": "s1"}, "x": 1})", "x: found an unknown key"},
      {R"({"metadata": {}, "weight_map": {"a": 1}})", "weight_map.a: found 1, expected a string"},
      {R"({"metadata": {}, "weight_map": {"a": "s1", "a": "s1"}})", "weight_map: found the key \"a\" twice"},
      {R"({"metadata": {}, "weight_map": {"a": "../s1"}})",
       "weight_map.a: found \"../s1\", expected the name of a file"},
      {R"({"metadata": {}, "weight_map": {"a": "/etc/passwd"}})", "expected the name of a file in the same folder"},
      {R"({"metadata": {}, "weight_map": {"a": ".."}})", "expected the name of a file in the same folder"},
      {R"({"metadata": {}, "weight_map": {"a": ""}})", "expected the name of a file in the same folder"},
      {R"({"metadata": {}, "weight_map": {"a": "s1\u0000"}})", "expected the name of a file in the same folder"},
  };
  for (const auto& [text, message] : cases) {
    index(text);
    EXPECT_THROW_WITH(open(), FormatError, message);
  }
}

TEST_F(Weights, RefusesShardsThatContradictTheIndex) {
  write("s1", {"a", "b"});
  write("s2", {"c"});
  index(R"({"metadata": {}, "weight_map": {"a": "s1", "b": "s1", "c": "s2", "d": "s3"}})");
  EXPECT_THROW_WITH(open(), IoError, "s3: No such file");
  index(R"({"metadata": {}, "weight_map": {"a": "s1", "b": "s1", "c": "s2", "d": "s2"}})");
  EXPECT_THROW_WITH(open(), FormatError, "s2: found no tensor \"d\", expected it, as the index says");
  index(R"({"metadata": {}, "weight_map": {"a": "s1", "c": "s2"}})");
  EXPECT_THROW_WITH(open(), FormatError, "s1: found the tensor \"b\", expected it in no shard, as the index says");
  index(R"({"metadata": {}, "weight_map": {"a": "s1", "b": "s2", "c": "s2"}})");
  EXPECT_THROW_WITH(open(), FormatError, "s1: found the tensor \"b\", expected it in \"s2\", as the index says");
  write("s2", {"b", "c"});
  index(R"({"metadata": {}, "weight_map": {"a": "s1", "b": "s1", "c": "s2"}})");
  EXPECT_THROW_WITH(open(), FormatError, "s2: found the tensor \"b\", expected it in \"s1\", as the index says");
}

}  // namespace
}  // namespace based::io
