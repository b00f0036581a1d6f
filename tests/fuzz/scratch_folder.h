#pragma once

#include <filesystem>

/// Where a target keeps its file: in memory where the system has such a folder, so that no disk is waited for.
inline std::filesystem::path scratch_folder() {
  return std::filesystem::is_directory("/dev/shm") ? "/dev/shm" : std::filesystem::temp_directory_path();
}
