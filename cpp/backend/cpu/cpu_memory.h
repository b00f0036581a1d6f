#pragma once

#include <cstddef>
#include <filesystem>

namespace based::cpu {

/// Bytes that this process may still take without swapping, by /proc/meminfo and the limits of its control groups; all
/// of the machine's where the system does not say. `root`: where /proc and /sys are.
std::size_t available_memory(const std::filesystem::path& root = "/");

}  // namespace based::cpu
