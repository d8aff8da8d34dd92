#include "bridge.hpp"

#include <string>
#include <vector>

#include "serve.hpp"

namespace serve {

int32_t run(const rust::Vec<rust::String>& arguments, rust::Str default_model) {
  std::vector<std::string> words;
  for (const rust::String& argument : arguments) words.emplace_back(argument);
  return serve_main(words, std::string(default_model));
}

}  // namespace serve
