// What main.rs calls. Part of the cargo build only.
#pragma once

#include <cstdint>

#include "rust/cxx.h"

namespace serve {

int32_t run(const rust::Vec<rust::String>& arguments, rust::Str default_model);

}  // namespace serve
