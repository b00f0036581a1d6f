#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace based {

// Every failure of the library is one of these, or std::bad_alloc. A call that throws leaves its
// object as it was (but for DeviceError). Python sees the class named on the right.

namespace detail {
/// Control characters of names and texts from outside as \xNN: a message may be shown by a terminal, which would obey
/// them. Every class below does this to its message.
std::string message(std::string_view text);
}  // namespace detail

/// Base of the failures that are particular to this library.       based.Error
class Error : public std::runtime_error {
 public:
  explicit Error(std::string_view text) : std::runtime_error(detail::message(text)) {}
};

/// A file whose bytes contradict its format: weights, config, state. based.FormatError, a ValueError
class FormatError : public Error {
 public:
  using Error::Error;
};

/// A state or checkpoint that belongs to another model or shape.    based.StateError, a ValueError
class StateError : public Error {
 public:
  using Error::Error;
};

/// A session used by two threads at once.                           based.SessionBusyError
class SessionBusyError : public Error {
 public:
  using Error::Error;
};

/// A request for something that this build or machine cannot do.    based.UnsupportedError
class UnsupportedError : public Error {
 public:
  using Error::Error;
};

/// A device that failed: a fault in a kernel, a lost card. The process can use that device no more.
///                                                                   based.DeviceError
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// Memory that a device does not have: what() gives the bytes needed and free.   MemoryError
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string_view text) : message_(std::make_shared<const std::string>(detail::message(text))) {}
  const char* what() const noexcept override { return message_->c_str(); }

 private:
  std::shared_ptr<const std::string> message_;  // copying an exception must not throw
};

/// An argument outside its domain.                                  ValueError
class InvalidArgument : public std::invalid_argument {
 public:
  explicit InvalidArgument(std::string_view text) : std::invalid_argument(detail::message(text)) {}
};

/// The operating system refused: what() names the file, code() the errno.  OSError of that errno
class IoError : public std::system_error {
 public:
  IoError(int error_number, std::string_view action_and_path)
      : std::system_error(error_number, std::generic_category(), detail::message(action_and_path)) {}
};

}  // namespace based
