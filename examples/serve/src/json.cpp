#include "json.hpp"

#include <charconv>
#include <cmath>
#include <stdexcept>

namespace serve {
namespace {

constexpr int max_depth = 32;  // The parser recurses: a file of brackets must not exhaust the stack.

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw std::runtime_error("not valid JSON at byte " + std::to_string(at_) + ": " + what);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size() && (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t')) ++at_;
  }

  void expect(char c, const char* what) {
    skip_space();
    if (peek() != c) fail(what);
    ++at_;
  }

  bool accept(char c) {
    skip_space();
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  bool accept_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse(int depth) {
    if (depth > max_depth) fail("nested too deeply");
    skip_space();
    Json value;
    const char c = peek();
    if (c == '{') {
      parse_object(value, depth);
    } else if (c == '[') {
      parse_array(value, depth);
    } else if (c == '"') {
      value.kind = Json::Kind::string;
      value.string = parse_string();
    } else if (c == '-' || (c >= '0' && c <= '9')) {
      value.kind = Json::Kind::number;
      value.number = parse_number();
    } else if (accept_word("true") || accept_word("false")) {
      value.kind = Json::Kind::boolean;
      value.boolean = c == 't';
    } else if (!accept_word("null")) {
      fail("expected a value");
    }
    return value;
  }

  void parse_object(Json& value, int depth) {
    value.kind = Json::Kind::object;
    ++at_;
    if (accept('}')) return;
    do {
      skip_space();
      if (peek() != '"') fail("expected a key");
      std::string key = parse_string();
      if (value.find(key)) fail("duplicate key");
      expect(':', "expected ':'");
      value.object.emplace_back(std::move(key), parse(depth + 1));
    } while (accept(','));
    expect('}', "expected ',' or '}'");
  }

  void parse_array(Json& value, int depth) {
    value.kind = Json::Kind::array;
    ++at_;
    if (accept(']')) return;
    do {
      value.array.push_back(parse(depth + 1));
    } while (accept(','));
    expect(']', "expected ',' or ']'");
  }

  double parse_number() {
    double number = 0;
    const char* first = text_.data() + at_;
    const char* last = text_.data() + text_.size();
    const auto [end, error] = std::from_chars(first, last, number);
    if (error != std::errc() || !std::isfinite(number)) fail("bad number");
    at_ += static_cast<size_t>(end - first);
    return number;
  }

  std::string parse_string() {
    std::string out;
    for (++at_; peek() != '"'; ++at_) {
      if (at_ >= text_.size() || static_cast<unsigned char>(peek()) < 0x20) fail("unterminated string");
      out += peek() == '\\' ? parse_escape() : peek();
    }
    ++at_;
    return out;
  }

  // The names and values we read are ASCII: \u above it is kept as '?'.
  char parse_escape() {
    constexpr std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
    ++at_;
    if (const size_t i = from.find(peek()); at_ < text_.size() && i != from.npos) return to[i];
    if (peek() != 'u' || text_.size() - at_ < 5) fail("bad escape");
    unsigned code = 0;
    const char* first = text_.data() + at_ + 1;
    if (std::from_chars(first, first + 4, code, 16).ptr != first + 4) fail("bad escape");
    at_ += 4;
    return code < 0x80 ? static_cast<char>(code) : '?';
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (const auto& [name, value] : object) {
    if (name == key) return &value;
  }
  return nullptr;
}

int64_t Json::integer(const std::string& what, int64_t low, int64_t high) const {
  const bool integral = kind == Kind::number && std::floor(number) == number;
  if (!integral || number < static_cast<double>(low) || number > static_cast<double>(high)) {
    throw std::runtime_error(what + " must be an integer from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return static_cast<int64_t>(number);
}

Json parse_json(std::string_view text) { return Parser(text).document(); }

}  // namespace serve
