// Continues a prompt of token ids with a BASED model: the whole library from C++.
//
//   generate MODEL_DIRECTORY NUM_TOKENS ID [ID …]

#include <based/generation.h>
#include <based/model.h>

#include <charconv>
#include <cstdint>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace {

template <class Integer>
Integer parse(std::string_view text) {
  Integer value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    throw std::invalid_argument("expected an integer, found \"" + std::string(text) + "\"");
  }
  return value;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: generate MODEL_DIRECTORY NUM_TOKENS ID [ID …]\n";
    return 2;
  }
  try {
    const auto model = based::Model::load(argv[1]);
    based::GenerationRequest request;
    request.params.max_tokens = parse<std::int64_t>(argv[2]);
    request.params.temperature = 0;
    for (int i = 3; i < argc; ++i) request.prompt.push_back(parse<std::int32_t>(argv[i]));

    based::Generator generator(model, {request}, 1);
    while (!generator.done())
      for (const based::TokenEvent& event : generator.next()) std::cout << event.token << ' ' << std::flush;
    std::cout << '\n';

    std::cerr << model->num_parameters() << " parameters, " << model->state_nbytes() << " bytes of state per sequence, "
              << model->kernel_isa() << " kernels on " << model->num_threads() << " threads\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
