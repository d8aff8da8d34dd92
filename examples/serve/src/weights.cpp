#include "weights.hpp"

#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "json.hpp"

namespace serve {
namespace {

constexpr int64_t max_file = int64_t{1} << 40;

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t extent : shape) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + text + "]";
}

// Bytes of a bf16 tensor, or -1 if that many cannot be in any file.
int64_t bf16_bytes(const std::vector<int64_t>& shape) {
  int64_t bytes = 2;
  for (const int64_t extent : shape) {
    if (extent != 0 && bytes > max_file / extent) return -1;
    bytes *= extent;
  }
  return bytes;
}

float bf16_to_float(const char* p) {
  const uint32_t bits =
      (uint32_t{static_cast<unsigned char>(p[1])} << 24) | (uint32_t{static_cast<unsigned char>(p[0])} << 16);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (!in) throw std::runtime_error("cannot read " + path);
  return bytes;
}

Weights::Weights(const std::string& path) : path_(path), data_(read_file(path)) {
  const auto fail = [&](const std::string& what) -> std::runtime_error {
    return std::runtime_error(path + ": " + what);
  };
  if (data_.size() < 8) throw fail("shorter than a safetensors header");
  uint64_t header_size = 0;
  for (int i = 7; i >= 0; --i)
    header_size = header_size << 8 | static_cast<unsigned char>(data_[static_cast<size_t>(i)]);
  if (header_size > data_.size() - 8) throw fail("its header is longer than the file: truncated, or not safetensors");

  Json header;
  try {
    header = parse_json(std::string_view(data_).substr(8, header_size));
  } catch (const std::runtime_error& error) {
    throw fail(std::string("header ") + error.what());
  }
  data_.erase(0, 8 + header_size);

  for (const auto& [name, value] : header.object) {
    if (name == "__metadata__") continue;
    const Json* dtype = value.find("dtype");
    const Json* shape = value.find("shape");
    const Json* offsets = value.find("data_offsets");
    if (!dtype || !shape || !offsets || offsets->array.size() != 2) throw fail("tensor " + name + " is not described");
    Entry entry{name, dtype->string, {}, 0, 0};
    for (const Json& extent : shape->array) entry.shape.push_back(extent.integer(name + ": extent", 0, max_file));
    entry.begin = static_cast<size_t>(offsets->array[0].integer(name + ": offset", 0, max_file));
    entry.end = static_cast<size_t>(offsets->array[1].integer(name + ": offset", 0, max_file));
    if (entry.begin > entry.end || entry.end > data_.size())
      throw fail("tensor " + name + " ends past the file: truncated");
    entries_.push_back(std::move(entry));
  }
}

const Weights::Entry& Weights::entry(std::string_view name) const {
  for (const Entry& entry : entries_) {
    if (entry.name == name) return entry;
  }
  throw std::runtime_error(path_ + ": no tensor " + std::string(name));
}

std::vector<float> Weights::tensor(std::string_view name, const std::vector<int64_t>& shape) const {
  const Entry& e = entry(name);
  const auto fail = [&](const std::string& what) {
    throw std::runtime_error(path_ + ": tensor " + e.name + " " + what);
  };
  if (e.dtype != "BF16") fail("is " + e.dtype + ", expected BF16");
  if (e.shape != shape) fail("has shape " + shape_text(e.shape) + ", expected " + shape_text(shape));
  if (bf16_bytes(shape) != static_cast<int64_t>(e.end - e.begin)) fail("has a size that is not its shape's");
  std::vector<float> values((e.end - e.begin) / 2);
  for (size_t i = 0; i < values.size(); ++i) values[i] = bf16_to_float(data_.data() + e.begin + 2 * i);
  return values;
}

}  // namespace serve
