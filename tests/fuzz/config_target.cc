// config.json of a model directory: what is accepted is written and read back equal.

#include <cstdlib>
#include <string_view>

#include "based/config.h"
#include "based/error.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto config = based::ModelConfig::from_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    if (!(based::ModelConfig::from_json(config.to_json(), "again") == config)) std::abort();
    if (config.num_parameters() < 1) std::abort();
  } catch (const based::FormatError&) {
  }
  return 0;
}
