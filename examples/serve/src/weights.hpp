// Reads a safetensors file: 8 bytes of header size, a JSON header, then the data.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace serve {

class Weights {
 public:
  // Reads and checks the whole file; throws std::runtime_error, so that nothing later can read past its end.
  explicit Weights(const std::string& path);

  // One bf16 tensor as float32. Throws if it is missing or has another dtype or shape.
  std::vector<float> tensor(std::string_view name, const std::vector<int64_t>& shape) const;

 private:
  struct Entry {
    std::string name;
    std::string dtype;
    std::vector<int64_t> shape;
    size_t begin = 0;
    size_t end = 0;
  };

  const Entry& entry(std::string_view name) const;

  std::string path_;
  std::string data_;  // Everything after the header.
  std::vector<Entry> entries_;
};

// A whole file, or throws with its name.
std::string read_file(const std::string& path);

}  // namespace serve
