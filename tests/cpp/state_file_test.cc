#include "io/state_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "based/error.h"
#include "io/crc32c.h"
#include "io/hash.h"
#include "temporary_folder.h"

namespace based::io {
namespace {

using test::read_bytes;
using test::write_bytes;

constexpr const char* kFingerprint = "0123456789abcdef";

TEST(Fnv1a, KnownValues) {
  EXPECT_EQ(Fnv1a().hex(), "cbf29ce484222325");
  Fnv1a a, foobar;
  a.add("a");
  EXPECT_EQ(a.value(), 0xaf63dc4c8601ec8cu);
  foobar.add("foo");
  foobar.add("bar");
  EXPECT_EQ(foobar.hex(), "85944171f73967e8");
}

class StateFiles : public testing::Test {
 protected:
  StateFiles() {
    for (std::size_t i = 0; i < std::size(numbers_); ++i) numbers_[i] = static_cast<float>(i);
  }

  TensorView floats(std::vector<std::int64_t> shape) const {
    return {DType::float32, std::move(shape), reinterpret_cast<const std::byte*>(numbers_)};
  }

  std::vector<SavedState> states() const {
    const TensorView empty{DType::bfloat16, {0, 1, 2}, nullptr};
    return {{70000000000,
             {{"layers.2.conv", floats({2, 4})},
              {"layers.10.taylor", floats({1, 2, 3})},
              {"layers.11.keys", floats({1, 1, 2})},
              {"layers.11.values", floats({1, 1, 2})}}},
            {0,
             {{"layers.2.conv", floats({2, 4})},
              {"layers.10.taylor", floats({1, 2, 3})},
              {"layers.11.keys", empty},
              {"layers.11.values", empty}}}};
  }

  StateFile open() const { return StateFile::open(path_, {kFingerprint}); }

  /// The sample file with other metadata or tensors.
  void write_raw(std::map<std::string, std::string> changes, std::vector<TensorToWrite> more = {}) const {
    write_state_file(path_, kFingerprint, states());
    const auto file = SafetensorsFile::open(path_);
    auto metadata = file->metadata();
    for (const auto& [key, value] : changes) metadata[key] = value;
    std::erase_if(metadata, [](const auto& item) { return item.second == "(none)"; });
    for (const auto& [name, tensor] : file->tensors()) more.push_back({name, tensor});
    write_safetensors(path_, more, metadata);
  }

  float numbers_[64];
  test::TemporaryFolder folder_;
  const std::filesystem::path path_ = folder_ / "s.safetensors";
};

TEST_F(StateFiles, ReadsWhatItWrites) {
  write_state_file(path_, kFingerprint, states());
  const StateFile file = open();
  const auto expected = states();
  ASSERT_EQ(file.states.size(), expected.size());
  for (std::size_t b = 0; b < expected.size(); ++b) {
    EXPECT_EQ(file.states[b].num_tokens, expected[b].num_tokens);
    ASSERT_EQ(file.states[b].tensors.size(), expected[b].tensors.size());
    for (std::size_t i = 0; i < expected[b].tensors.size(); ++i) {  // in the order of the layers
      const TensorToWrite& found = file.states[b].tensors[i];
      EXPECT_EQ(found.name, expected[b].tensors[i].name);
      EXPECT_EQ(found.tensor.shape, expected[b].tensors[i].tensor.shape);
      EXPECT_EQ(found.tensor.dtype, expected[b].tensors[i].tensor.dtype);
      if (found.tensor.nbytes() > 0) {
        EXPECT_EQ(std::memcmp(found.tensor.data, numbers_, found.tensor.nbytes()), 0);
      }
    }
  }
  EXPECT_EQ(file.file->metadata().at("num_tokens"), "70000000000,0");
  EXPECT_EQ(file.file->tensors().count("sequences.1.layers.10.taylor"), 1u);
}

TEST_F(StateFiles, IndependentOfTheOrderOfTensors) {
  auto shuffled = states();
  std::swap(shuffled[0].tensors[0], shuffled[0].tensors[3]);
  write_state_file(path_, kFingerprint, shuffled);
  EXPECT_EQ(open().states[0].tensors[0].name, "layers.2.conv");
}

TEST_F(StateFiles, RefusesForeignAndOtherFiles) {
  write_state_file(path_, kFingerprint, states());
  EXPECT_THROW_WITH(StateFile::open(path_, {"fedcba9876543210"}), StateError,
                    "a state of another model: found the state of the model \"0123456789abcdef\", expected that of the "
                    "model \"fedcba9876543210\"");
  for (const char* version : {"0", "4", "", "2.0", "01"}) {
    write_raw({{"format_version", version}});
    EXPECT_THROW_WITH(open(), StateError,
                      std::string("format_version: found \"") + version + "\", expected \"1\", \"2\" or \"3\"");
  }
  write_raw({{"format", "pt"}});
  EXPECT_THROW_WITH(open(), FormatError, "format: found \"pt\", expected \"based-state\"");
  for (const char* key : {"format", "format_version", "fingerprint", "num_tokens", "checksum"}) {
    write_raw({{key, "(none)"}});
    EXPECT_THROW_WITH(open(), FormatError, std::string("found no ") + key + " in the metadata");
  }
  write_raw({{"extra", "1"}});
  EXPECT_THROW_WITH(open(), FormatError, "unknown keys");
  EXPECT_THROW(StateFile::open(folder_ / "none", {kFingerprint}), IoError);
}

// The checksum of versions 1 and 2, written out for the two states of states().
std::string fnv1a_of(const std::vector<SavedState>& states) {
  Fnv1a hash;
  for (const SavedState& state : states) {
    hash.add(std::to_string(state.num_tokens) + ";");
    for (const auto& [name, tensor] : state.tensors) {
      hash.add(name + ";" + std::string(name_of(tensor.dtype)) + ";" + shape_str(tensor.shape) + ";");
      hash.add(tensor.data, tensor.nbytes());
    }
  }
  return hash.hex();
}

TEST_F(StateFiles, ChecksumOfTheNewestVersionIsACrc32c) {
  write_state_file(path_, kFingerprint, states());
  Crc32c crc;
  const auto add = [&](const std::string& header, std::size_t count) {
    crc.add(header);
    crc.add(numbers_, count * sizeof(float));
  };
  add("70000000000;layers.2.conv;float32;(2, 4);", 8);
  add("layers.10.taylor;float32;(1, 2, 3);", 6);
  add("layers.11.keys;float32;(1, 1, 2);", 2);
  add("layers.11.values;float32;(1, 1, 2);", 2);
  add("0;layers.2.conv;float32;(2, 4);", 8);
  add("layers.10.taylor;float32;(1, 2, 3);", 6);
  add("layers.11.keys;bfloat16;(0, 1, 2);", 0);
  add("layers.11.values;bfloat16;(0, 1, 2);", 0);
  EXPECT_EQ(open().file->metadata().at("checksum"), crc.hex());
  EXPECT_EQ(open().file->metadata().at("format_version"), "3");
}

TEST_F(StateFiles, ReadsOlderVersionsWithTheirChecksum) {
  const std::string checksum = fnv1a_of(states());
  for (const char* version : {"1", "2"}) {
    write_raw({{"format_version", version}, {"checksum", checksum}});
    EXPECT_EQ(open().states.size(), 2u);
    write_raw({{"format_version", version}});  // the checksum of version 3
    EXPECT_THROW_WITH(open(), FormatError, "found data with the checksum " + checksum);
  }
  write_raw({{"checksum", checksum}});
  EXPECT_THROW_WITH(open(), FormatError, ", expected \"" + checksum + "\" (damaged file)");
}

TEST_F(StateFiles, PendingTokensCameWithTheSecondVersion) {
  for (const char* name : {"pending_keys", "pending_values"}) {
    auto with_pending = states();  // in the order of their names
    with_pending[1].tensors.insert(with_pending[1].tensors.begin() + 1,
                                   {std::string("layers.10.") + name, floats({3, 1, 2})});
    write_state_file(path_, kFingerprint, with_pending);
    EXPECT_EQ(open().states[1].tensors.size(), 5u);
    const auto file = SafetensorsFile::open(path_);
    auto metadata = file->metadata();
    std::vector<TensorToWrite> tensors;
    for (const auto& [tensor_name, tensor] : file->tensors()) tensors.push_back({tensor_name, tensor});
    metadata["checksum"] = fnv1a_of(with_pending);
    metadata["format_version"] = "2";
    write_safetensors(path_, tensors, metadata);
    EXPECT_EQ(open().states[1].tensors.size(), 5u);
    metadata["format_version"] = "1";
    write_safetensors(path_, tensors, metadata);
    EXPECT_THROW_WITH(open(), FormatError,
                      std::string("found the tensor \"sequences.1.layers.10.") + name +
                          "\", expected none such in format_version \"1\"");
  }
}

TEST_F(StateFiles, RefusesBadTokenCounts) {
  for (const char* counts : {"", ",", "1,", ",1", "1,,2", "-1,0", "+1,0", " 1,0", "1, 0", "01,0", "1.0,0", "1e3,0",
                             "x,0", "9007199254740993,0", "9223372036854775808,0"}) {
    write_raw({{"num_tokens", counts}});
    EXPECT_THROW_WITH(open(), FormatError, "expected integers from 0 to 2^53, separated by commas");
  }
  write_raw({{"num_tokens", "70000000000,1"}});
  EXPECT_THROW_WITH(open(), FormatError, "checksum");
  write_raw({{"num_tokens", "70000000000,0,0"}});
  EXPECT_THROW_WITH(open(), FormatError, "checksum");
  write_raw({{"num_tokens", "70000000000"}});
  EXPECT_THROW_WITH(open(), FormatError, "expected sequences.{0 to 0}.{name}");
}

TEST_F(StateFiles, RefusesForeignTensors) {
  for (const char* name :
       {"x", "sequences", "sequences.", "sequences.0", "sequences.0.", "sequences.2.x", "sequences.-1.x",
        "sequences.00.x", "sequences.x.y", "sequence.0.x", "sequences.99999999999999999999.x"}) {
    write_raw({}, {{name, floats({1})}});
    EXPECT_THROW_WITH(open(), FormatError,
                      std::string("found the tensor \"") + name + "\", expected sequences.{0 to 1}");
  }
  write_raw({}, {{"sequences.0.more", floats({1})}});
  EXPECT_THROW_WITH(open(), FormatError, "checksum");
}

TEST_F(StateFiles, RefusesEveryTruncationAndEveryDamagedByte) {
  write_state_file(path_, kFingerprint, states());
  const std::string bytes = read_bytes(path_);
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    write_bytes(path_, bytes.substr(0, n));
    EXPECT_THROW(open(), FormatError) << n;
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (const int bit : {0, 3, 6}) {
      std::string damaged = bytes;
      damaged[i] = static_cast<char>(damaged[i] ^ (1 << bit));
      write_bytes(path_, damaged);
      EXPECT_THROW(open(), Error) << "byte " << i << " bit " << bit;
    }
  }
}

TEST_F(StateFiles, SurvivesRandomDamage) {
  write_state_file(path_, kFingerprint, states());
  const std::string bytes = read_bytes(path_);
  std::mt19937 random(9);
  for (int i = 0; i < 3000; ++i) {
    std::string damaged = bytes;
    for (auto n = random() % 4 + 1; n > 0; --n)
      damaged[random() % bytes.size()] = "0123456789-,[]\"{}sx "[random() % 20];
    write_bytes(path_, damaged);
    try {
      for (const SavedState& state : open().states) EXPECT_EQ(state.tensors.size(), 4u);
    } catch (const Error&) {
    }
  }
}

}  // namespace
}  // namespace based::io
