#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>

namespace based {

// Every failure of the library is one of these, or std::bad_alloc. A call that throws leaves its
// object as it was. Python sees the class named on the right.

/// Base of the failures that are particular to this library.       based.Error
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
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

/// An argument outside its domain.                                  ValueError
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// The operating system refused: what() names the file, code() the errno.  OSError of that errno
class IoError : public std::system_error {
 public:
  IoError(int error_number, const std::string& action_and_path)
      : std::system_error(error_number, std::generic_category(), action_and_path) {}
};

}  // namespace based
