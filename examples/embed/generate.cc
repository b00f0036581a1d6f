// Continues a prompt of token ids with a BASED model: the whole library from C++.
//
//   generate MODEL_DIRECTORY NUM_TOKENS ID [ID …]

#include <based/generation.h>
#include <based/model.h>

#include <exception>
#include <iostream>
#include <string>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: generate MODEL_DIRECTORY NUM_TOKENS ID [ID …]\n";
    return 2;
  }
  try {
    const auto model = based::Model::load(argv[1]);
    based::GenerationRequest request;
    request.params.max_tokens = std::stoll(argv[2]);
    request.params.temperature = 0;
    for (int i = 3; i < argc; ++i) request.prompt.push_back(std::stoi(argv[i]));

    based::Generator generator(model, {request}, 1);
    while (!generator.done())
      for (const based::TokenEvent& event : generator.next()) std::cout << event.token << ' ' << std::flush;
    std::cout << '\n';

    std::cerr << model->num_parameters() << " parameters, " << model->state_nbytes() << " bytes of state per sequence, "
              << model->kernel_isa() << " kernels on " << model->num_threads() << " threads\n";
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << '\n';
    return 1;
  }
}
