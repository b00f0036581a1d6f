// A state file: as it is, and once more with its fingerprint and checksum made right, so that what lies behind them is
// reached. A file that is refused leaves the session as it was.

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>

#include "based/error.h"
#include "based/session.h"
#include "io/state_file.h"
#include "scratch_folder.h"

namespace {

using namespace based;

ModelConfig config() {
  ModelConfig c;
  c.vocab_size = c.padded_vocab_size = 7;
  c.hidden_size = 4;
  c.norm_eps = 1e-5;
  SlidingWindowConfig window;
  window.num_heads = window.num_kv_heads = 2;
  window.head_dim = 2;
  window.window = 3;
  window.scale = 0.5;
  c.layers = {GatedConvConfig{4, 3, true}, LinearAttentionConfig{2, 2, 2, 1e-12}, window};
  return c;
}

struct Target {
  Target() {
    LoadOptions options;
    options.num_threads = 1;
    model = Model::random(config(), 1, options);
    session = std::make_unique<Session>(model, 2);
    const std::vector<std::int32_t> prompts[] = {{1, 2, 3, 4}, {5}};
    session->prefill(prompts);
    path = scratch_folder() / ("based-fuzz-state-" + std::to_string(getpid()));
    static std::filesystem::path removed_at_exit = path;
    std::atexit([] { std::filesystem::remove(removed_at_exit); });
  }

  void load() const {
    const std::vector<std::int64_t> before = session->num_tokens();
    try {
      session->load_state(path);
    } catch (const Error&) {
      if (session->num_tokens() != before) std::abort();
      return;
    }
    try {
      session->step(std::vector<std::int32_t>{1, 1});
    } catch (const Error&) {  // a state without a finite number
      session->reset();
    }
  }

  std::shared_ptr<const Model> model;
  std::unique_ptr<Session> session;
  std::filesystem::path path;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Target target;
  std::ofstream(target.path, std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  target.load();
  try {
    const auto file = io::SafetensorsFile::parse(std::as_bytes(std::span(data, size)), "fuzz");
    std::vector<io::SavedState> states(2);
    const auto found = file->metadata().find("num_tokens");
    std::string_view counts = found == file->metadata().end() ? std::string_view() : std::string_view(found->second);
    for (io::SavedState& state : states) {
      const auto end = std::from_chars(counts.data(), counts.data() + counts.size(), state.num_tokens).ptr;
      counts.remove_prefix(std::min(counts.size(), static_cast<std::size_t>(end - counts.data()) + 1));
    }
    for (const auto& [name, tensor] : file->tensors()) {
      for (std::size_t b = 0; b < states.size(); ++b) {
        const std::string prefix = "sequences." + std::to_string(b) + ".";
        if (name.starts_with(prefix)) states[b].tensors.push_back({name.substr(prefix.size()), tensor});
      }
    }
    io::write_state_file(target.path, target.model->fingerprint(), states);
    target.load();
  } catch (const FormatError&) {
  } catch (const InvalidArgument&) {  // names that are not UTF-8
  }
  return 0;
}
