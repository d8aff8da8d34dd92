// The two ways this program fails.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "indexcache/indexcache.hpp"

namespace serve {

// The command line asks for something that cannot be: exit code 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A library call failed: its status, and the library's text about it. Exit code 1.
struct LibraryError : std::runtime_error {
  LibraryError(idxc_status status, const char* text)
      : std::runtime_error(std::string(indexcache::status_name(status)) + ": " + text) {}
};

inline void check(idxc_status status) {
  if (status != IDXC_OK) throw LibraryError(status, indexcache::last_error());
}

template <class T>
T check(indexcache::Result<T> result) {
  if (!result) throw LibraryError(result.status(), result.error());
  return *std::move(result);
}

}  // namespace serve
