// model.safetensors.index.json, beside a shard "a" with the tensor "x" and a shard "b" with "y".

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "based/error.h"
#include "io/safetensors.h"
#include "scratch_folder.h"

namespace {

std::filesystem::path make_folder() {
  const auto folder = scratch_folder() / ("based-fuzz-index-" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  const std::byte byte{7};
  for (const auto& [file, name] : {std::pair("a", "x"), {"b", "y"}}) {
    based::io::write_safetensors(folder / file, {{name, {based::DType::uint8, {1}, &byte}}}, {});
  }
  static std::filesystem::path removed_at_exit = folder;
  std::atexit([] { std::filesystem::remove_all(removed_at_exit); });
  return folder;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::filesystem::path folder = make_folder();
  std::ofstream(folder / "model.safetensors.index.json", std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const auto weights = based::io::WeightFiles::open(folder);
    for (const auto& [name, tensor] : weights.tensors()) {
      std::byte byte{};
      weights.read(name, 0, {&byte, 1});
      if (byte != std::byte{7}) std::abort();
    }
  } catch (const based::FormatError&) {
  } catch (const based::IoError&) {  // a shard that is not there
  }
  return 0;
}
