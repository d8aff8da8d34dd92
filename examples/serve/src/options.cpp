#include "options.hpp"

#include <charconv>

#include "error.hpp"

namespace serve {
namespace {

int64_t integer(const std::string& option, const std::string& text, int64_t low, int64_t high) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < low || value > high) {
    throw UsageError(option + " takes a number from " + std::to_string(low) + " to " + std::to_string(high) +
                     ", not \"" + text + "\"");
  }
  return value;
}

}  // namespace

const char* const usage =
    R"(Serves a small DSA model on the CPU, with every layer Full and then with an IndexCache pattern, and compares the two.

usage: serve [options]

which layers share (default: the pattern in the model's config.json)
  --pattern FSSS…   one letter a layer: F selects, S reuses the selection of the F before it
  --freq N          one Full layer in N
  --config FILE     what another config.json says

load
  --requests N      concurrent requests, each its own window of the text   [4]
  --context N       bytes of prompt each                                   [what the model was trained for]
  --decode N        bytes to generate for each                             [48]
  --chunk N         prompt bytes a step                                    [256]
  --threads N       0: all cores                                           [0]
  --repeats N       measured passes of each run                            [2]

files and output
  --model DIR       folder of config.json and model.safetensors            [examples/tiny_dsa]
  --text FILE       text of the prompts                                    [heldout.txt of the model]
  --json            one JSON object on stdout instead of the table
  --help
)";

Options parse_options(const std::vector<std::string>& arguments, const std::string& default_model) {
  Options options;
  options.model = default_model;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& option = arguments[i];
    const auto value = [&]() -> const std::string& {
      if (i + 1 == arguments.size()) throw UsageError(option + " needs a value");
      return arguments[++i];
    };
    const auto number = [&](int64_t low, int64_t high) { return integer(option, value(), low, high); };
    if (option == "--pattern") {
      options.pattern = value();
    } else if (option == "--freq") {
      options.freq = number(1, 1024);
    } else if (option == "--config") {
      options.config = value();
    } else if (option == "--requests") {
      options.requests = number(1, 1024);
    } else if (option == "--context") {
      options.context = number(2, 1 << 24);
    } else if (option == "--decode") {
      options.decode = number(1, 1 << 16);
    } else if (option == "--chunk") {
      options.chunk = number(1, 1 << 16);
    } else if (option == "--threads") {
      options.threads = number(0, 1024);
    } else if (option == "--repeats") {
      options.repeats = number(1, 100);
    } else if (option == "--model") {
      options.model = value();
    } else if (option == "--text") {
      options.text = value();
    } else if (option == "--json") {
      options.json = true;
    } else if (option == "--help" || option == "-h") {
      options.help = true;
    } else {
      throw UsageError("unknown option \"" + option + "\"");
    }
  }
  if (options.pattern.has_value() + options.freq.has_value() + options.config.has_value() > 1) {
    throw UsageError("--pattern, --freq and --config exclude each other");
  }
  if (options.text.empty()) options.text = options.model + "/heldout.txt";
  return options;
}

}  // namespace serve
