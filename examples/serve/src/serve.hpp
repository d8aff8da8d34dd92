// The program, less the way it is started.
#pragma once

#include <string>
#include <vector>

namespace serve {

// `arguments` without the program's name. Returns the exit code: 0, 1 (something failed) or 2 (bad arguments).
int serve_main(const std::vector<std::string>& arguments, const std::string& default_model);

}  // namespace serve
