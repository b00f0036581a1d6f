// Runs a fuzz target on the files of a corpus, then on mutations of them, with libFuzzer's spelling of options:
//   fuzz_X [-max_total_time=SECONDS | -runs=0] [-seed=N] [-timeout=SECONDS] [-artifact_prefix=PREFIX] FILE_OR_FOLDER…
// Where the code under test is compiled with -fsanitize-coverage=trace-pc, inputs that reach new code join the corpus.
// A crash or an input that takes too long is written to PREFIX-crash, and the process ends by a signal.

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

constexpr std::size_t kMapSize = 1 << 16;
std::uint8_t seen_now[kMapSize];
bool seen_ever[kMapSize];

}  // namespace

extern "C" __attribute__((no_sanitize("all"))) void __sanitizer_cov_trace_pc() {
  const auto pc = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
  seen_now[(pc ^ pc >> 16) % kMapSize] = 1;
}

namespace {

using Bytes = std::vector<std::uint8_t>;
constexpr std::size_t kMaxBytes = 1 << 16;

// What a signal handler may touch.
const std::uint8_t* current_data = nullptr;
std::size_t current_size = 0;
char artifact[4096] = "fuzz-crash";

void save_input(int signal) {
  const int fd = open(artifact, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd >= 0) {
    [[maybe_unused]] const ssize_t n = write(fd, current_data, current_size);
    close(fd);
  }
  const char* const text = signal == SIGALRM ? "\nfuzz: timeout; the input is in " : "\nfuzz: crash; the input is in ";
  [[maybe_unused]] ssize_t n = write(2, text, std::strlen(text));
  n = write(2, artifact, std::strlen(artifact));
  n = write(2, "\n", 1);
  ::signal(signal, SIG_DFL);
  raise(signal);
}

/// Runs one input; true when it reached code that none before it had.
bool run(const Bytes& input, unsigned timeout) {
  current_data = input.data();
  current_size = input.size();
  std::memset(seen_now, 0, sizeof seen_now);
  alarm(timeout);
  LLVMFuzzerTestOneInput(input.data(), input.size());
  alarm(0);
  bool is_new = false;
  for (std::size_t i = 0; i < kMapSize; ++i) {
    if (seen_now[i] == 0 || seen_ever[i]) continue;
    is_new = seen_ever[i] = true;
  }
  return is_new;
}

constexpr std::string_view kWords[] = {"{",
                                       "}",
                                       "[",
                                       "]",
                                       ":",
                                       ",",
                                       "\"",
                                       "null",
                                       "true",
                                       "false",
                                       "0",
                                       "-1",
                                       "1e308",
                                       "2147483647",
                                       "9223372036854775807",
                                       "18446744073709551616",
                                       "\\u0000",
                                       "\\ud800",
                                       "\x1b[31m",
                                       "\xff",
                                       "\"F32\"",
                                       "\"BF16\"",
                                       "\"shape\"",
                                       "\"dtype\"",
                                       "\"data_offsets\"",
                                       "\"__metadata__\"",
                                       "\"layers\"",
                                       "\"mixer\"",
                                       "\"window\"",
                                       "../",
                                       "model.safetensors"};

void mutate(Bytes& bytes, const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % std::max<std::size_t>(n, 1)); };
  const auto at = [&](std::size_t i) { return bytes.begin() + static_cast<std::ptrdiff_t>(i); };
  for (std::size_t n = 1 + below(6); n > 0; --n) {
    const std::size_t size = bytes.size(), i = below(size), length = 1 + below(std::min<std::size_t>(size - i, 64));
    switch (below(8)) {
      case 0:  // a bit
        if (size > 0) bytes[i] = static_cast<std::uint8_t>(bytes[i] ^ 1u << below(8));
        break;
      case 1:  // a byte
        if (size > 0) bytes[i] = static_cast<std::uint8_t>(random());
        break;
      case 2:  // a part goes
        if (size > 0) bytes.erase(at(i), at(i + length));
        break;
      case 3: {  // a part comes twice
        if (size == 0) break;
        const Bytes part(at(i), at(i + length));
        bytes.insert(at(below(size)), part.begin(), part.end());
        break;
      }
      case 4: {  // a word comes in
        const std::string_view word = kWords[below(std::size(kWords))];
        bytes.insert(at(i), word.begin(), word.end());
        break;
      }
      case 5: {  // a word over what is there
        const std::string_view word = kWords[below(std::size(kWords))];
        if (size - i >= word.size()) std::copy(word.begin(), word.end(), at(i));
        break;
      }
      case 6: {  // a number becomes another
        const auto digit = std::find_if(at(i), bytes.end(), [](std::uint8_t c) { return c >= '0' && c <= '9'; });
        if (digit != bytes.end()) *digit = static_cast<std::uint8_t>('0' + below(10));
        break;
      }
      default: {  // the end of another input
        const Bytes& other = corpus[below(corpus.size())];
        const std::size_t from = below(other.size());
        bytes.resize(i);
        bytes.insert(bytes.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
      }
    }
  }
  if (bytes.size() > kMaxBytes) bytes.resize(kMaxBytes);
}

Bytes read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 0;
  std::uint64_t seed = 1;
  unsigned timeout = 10;
  std::vector<Bytes> corpus;
  for (int i = 1; i < argc; ++i) {
    const std::string text = argv[i];
    const auto value = [&](std::string_view option) -> const char* {
      return text.starts_with(option) ? argv[i] + option.size() : nullptr;
    };
    if (const char* x = value("-max_total_time=")) {
      seconds = std::atof(x);
    } else if (const char* number = value("-seed=")) {
      seed = std::strtoull(number, nullptr, 10);
    } else if (const char* limit = value("-timeout=")) {
      timeout = static_cast<unsigned>(std::atoi(limit));
    } else if (const char* prefix = value("-artifact_prefix=")) {
      std::snprintf(artifact, sizeof artifact, "%scrash", prefix);
    } else if (text == "-runs=0") {  // the corpus only, as without a time
    } else if (text.starts_with('-')) {
      std::fprintf(stderr, "fuzz: unknown option %s\n", argv[i]);
      return 2;
    } else if (std::filesystem::is_directory(text)) {
      for (const auto& entry : std::filesystem::directory_iterator(text)) corpus.push_back(read_file(entry.path()));
    } else if (std::filesystem::is_regular_file(text)) {
      corpus.push_back(read_file(text));
    } else {
      std::fprintf(stderr, "fuzz: no such file or folder: %s\n", argv[i]);
      return 2;
    }
  }
  for (const int number : {SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGALRM}) signal(number, save_input);
  std::sort(corpus.begin(), corpus.end());
  for (const Bytes& input : corpus) run(input, timeout);
  const std::size_t kept = corpus.size();
  if (corpus.empty()) corpus.push_back({});

  std::mt19937_64 random(seed);
  std::uint64_t runs = 0;
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  while (Clock::now() < end) {
    Bytes input = corpus[random() % corpus.size()];
    mutate(input, corpus, random);
    if (run(input, timeout)) corpus.push_back(std::move(input));
    ++runs;
  }
  std::printf("%zu files of the corpus, %llu mutations, %zu of them reached new code\n", kept,
              static_cast<unsigned long long>(runs), corpus.size() - std::max<std::size_t>(kept, 1));
  return 0;
}
