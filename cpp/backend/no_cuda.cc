// What takes the place of cuda/ in a build without CUDA, the only file that knows: it has no device, and every use of
// one is refused.

#include "backend/cuda.h"
#include "based/error.h"

namespace based::cuda {

namespace {

constexpr const char* kNoCuda =
    "this build has no CUDA (it was made where there was no GPU or no nvcc; BASED_CUDA=ON compiles it all the same)";

[[noreturn]] void refuse() { throw UnsupportedError(kNoCuda); }

}  // namespace

using MaybeArray = std::optional<ops::Array>;

std::unique_ptr<backend::Backend> make_cuda_backend(int, bool) { refuse(); }
std::vector<DeviceDescription> cuda_devices() { return {}; }
std::string cuda_problem() { return kNoCuda; }
void synchronize(int) { refuse(); }
void release(Tensor, bool) noexcept {}
void add_library_path(std::string) {}  // where to look for libraries that only CUDA needs

void taylor_linear_attention(const LinearAttentionConfig&, const ops::Array&, const ops::Array&, const ops::Array&,
                             const MaybeArray&, const ops::Array&, const MaybeArray&, ops::StreamHandle) {
  refuse();
}
void sliding_window_attention(const SlidingWindowConfig&, const ops::Array&, const ops::Array&, const ops::Array&,
                              const ops::Array&, ops::StreamHandle) {
  refuse();
}
void gated_short_conv(const GatedConvConfig&, const ops::Array&, const ops::Array&, const MaybeArray&,
                      const ops::Array&, const MaybeArray&, ops::StreamHandle) {
  refuse();
}
std::shared_ptr<void> allocate(int, std::size_t, ops::StreamHandle) { refuse(); }
void copy(int, void*, const void*, std::size_t) { refuse(); }

}  // namespace based::cuda
