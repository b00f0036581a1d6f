// The header of a safetensors file, and that every tensor lies in the file.

#include <cstdlib>
#include <span>

#include "based/error.h"
#include "io/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto file = based::io::SafetensorsFile::parse(std::as_bytes(std::span(data, size)), "fuzz");
    std::size_t total = 0;
    for (const auto& [name, tensor] : file->tensors()) {
      for (std::size_t i = 0; i < tensor.nbytes(); ++i) total += std::to_integer<std::size_t>(tensor.data[i]) != 256;
    }
    if (total > size) std::abort();  // tensors overlap
  } catch (const based::FormatError&) {
  }
  return 0;
}
