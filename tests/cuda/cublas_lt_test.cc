// Where cuBLASLt is looked for. Needs no GPU.

#include "../../cuda/cublas_lt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "temporary_folder.h"

namespace based::cuda {
namespace {

TEST(CublasLtSearch, AddedPathsComeFirst) {
  const test::TemporaryFolder dir;
  const auto folder = dir.path() / "my.software" / "lib";  // a folder, though ".so" is in its path
  std::filesystem::create_directories(folder);
  const std::string file = dir.path() / "libcublasLt.so.12.8";
  const std::vector<std::string> expected{folder.string() + "/libcublasLt.so.13",
                                          folder.string() + "/libcublasLt.so.12",
                                          file,
                                          "libcublasLt.so.13",
                                          "/opt/cuda/lib64/libcublasLt.so.13",
                                          "libcublasLt.so.12",
                                          "/opt/cuda/lib64/libcublasLt.so.12"};
  EXPECT_EQ(library_candidates({folder.string(), file}, {"/opt/cuda/lib64"}), expected);
}

}  // namespace
}  // namespace based::cuda
