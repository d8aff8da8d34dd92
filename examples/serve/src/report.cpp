#include "report.hpp"

#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>

namespace serve {
namespace {

__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

// Printable ASCII as it is, everything else as an escape.
std::string printable(const std::string& bytes) {
  std::string out;
  for (const char c : bytes) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (c == '\n')
      out += "\\n";
    else if (c == '\t')
      out += "\\t";
    else if (c == '\\')
      out += "\\\\";
    else if (byte >= 0x20 && byte < 0x7f)
      out += c;
    else
      out += format("\\x%02x", byte);
  }
  return out;
}

std::string time_text(double ms) { return format(ms < 10 ? "%.1f ms" : "%.0f ms", ms); }

std::string with_share(double part, double whole) {
  return time_text(part) + format(", %.0f %%", whole > 0 ? 100 * part / whole : 0);
}

std::string faster(double before, double after) { return after > 0 ? format("%.2fx", before / after) : ""; }

std::string row(const char* name, const std::string& a, const std::string& b, const std::string& change) {
  std::string line = format("  %-24s", name);
  line += a + std::string(a.size() < 20 ? 20 - a.size() : 2, ' ');
  line += b + std::string(b.size() < 20 ? 20 - b.size() : 2, ' ') + change;
  while (!line.empty() && line.back() == ' ') line.pop_back();
  return line + "\n";
}

template <class Value>
std::string compare(const char* name, const Report& report, Value value, const std::string& change = "") {
  return row(name, value(report.runs[0]), value(report.runs[1]), change);
}

// JSON: text is bytes, not UTF-8; byte b becomes character U+00b.
std::string json_text(const std::string& bytes) {
  std::string out = "\"";
  for (const char c : bytes) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      out += std::string("\\") + c;
    else if (byte >= 0x20 && byte < 0x7f)
      out += c;
    else
      out += format("\\u%04x", byte);
  }
  return out + "\"";
}

// 17 digits, so that a reader gets the same bits back. JSON has no NaN.
std::string json_number(double value) { return std::isfinite(value) ? format("%.17g", value) : "null"; }

template <class Range, class Value>
std::string json_list(const Range& range, Value value) {
  std::string out;
  for (const auto& element : range) out += (out.empty() ? "" : ", ") + value(element);
  return "[" + out + "]";
}

// The members of one JSON object, in order.
class Object {
 public:
  Object& text(const char* key, const std::string& value) { return raw(key, json_text(value)); }
  Object& number(const char* key, double value) { return raw(key, json_number(value)); }
  Object& count(const char* key, int64_t value) { return raw(key, std::to_string(value)); }
  Object& raw(const char* key, const std::string& value) {
    out_ += (out_.empty() ? "\"" : ", \"") + std::string(key) + "\": " + value;
    return *this;
  }
  std::string done() const { return "{" + out_ + "}"; }

 private:
  std::string out_;
};

std::string run_json(const Run& run, const Run& full) {
  Object object;
  object.text("name", run.name)
      .text("pattern", run.pattern)
      .text("fingerprint", format("%016" PRIx64, run.fingerprint));
  object.count("full_layers", run.full_layers).count("shared_layers", run.shared_layers).count("passes", run.passes);
  object.number("bits_per_byte", run.bits_per_byte).raw("bits_per_byte_by_request", json_list(run.bits, json_number));
  object.number("prefill_ms", run.prefill.total).number("decode_ms", run.decode.total).number("total_ms", run.total());
  object.number("indexer_ms", run.indexer()).number("indexer_share", run.indexer() / run.total());
  object.number("prefill_indexer_ms", run.prefill.indexer).number("decode_indexer_ms", run.decode.indexer);
  object.number("attention_ms", run.attention());
  object.number("prefill_attention_ms", run.prefill.attention).number("decode_attention_ms", run.decode.attention);
  object.number("tokens_per_s", run.tokens_per_s());
  object.number("decode_tokens_per_s", static_cast<double>(run.decode_only_tokens) / run.decode.total * 1e3);
  object.number("speedup", full.total() / run.total());
  object.count("steps", run.steps).count("mixed_steps", run.mixed_steps).count("tokens", run.tokens);
  object.number("index_k_bytes_per_token", run.index_k_bytes_per_token).count("index_k_bytes", run.index_k_bytes);
  object.raw("generated", json_list(run.generated, json_text));
  return object.done();
}

std::string coverage_json(const Coverage& coverage) {
  Object object;
  object.count("layer", coverage.layer).count("source", coverage.source);
  object.raw("covered", coverage.share ? json_number(*coverage.share) : "null");
  return object.done();
}

std::string coverage_lines(const Report& report) {
  if (report.coverage.empty()) return "";
  std::string out = "\nof each Shared layer's own selection, the one it reuses covers\n";
  double sum = 0;
  for (const Coverage& c : report.coverage) {
    if (!c.share) return out + "  all of it: no row sees more than top-k tokens\n";
    out += format("  layer %2" PRId64 " reuses %2" PRId64 "  %5.1f %%\n", c.layer, c.source, 100 * *c.share);
    sum += *c.share;
  }
  return out + format("  mean               %5.1f %%\n", 100 * sum / static_cast<double>(report.coverage.size()));
}

std::string title(const Report& report) {
  return format("%" PRId64 " requests of %" PRId64 " bytes, %" PRId64 " generated each; %" PRId64
                " layers, top-k %" PRId64 "; chunks of %" PRId64 ", %" PRId64 " threads, %s; mean of %" PRId64
                " passes",
                report.requests, report.context, report.decode, report.layers, report.topk, report.chunk,
                report.threads, report.isa.c_str(), report.repeats);
}

}  // namespace

std::string as_table(const Report& report) {
  const Run& full = report.runs[0];
  const Run& shared = report.runs[1];
  const auto line = [&](const char* name, auto value, const std::string& change) {
    return row(name, value(full), value(shared), change);
  };
  const auto timed = [&](const char* name, auto of) {
    return line(name, [&](const Run& run) { return time_text(of(run)); }, faster(of(full), of(shared)));
  };
  const auto part = [&](const char* name, auto of, auto whole) {
    const auto value = [&](const Run& run) { return with_share(of(run), whole(run)); };
    return line(name, value, faster(of(full), of(shared)));
  };
  const auto prefill = [](const Run& run) { return run.prefill.total; };
  const auto decode = [](const Run& run) { return run.decode.total; };

  std::string out = title(report) + "\n\n";
  out += row("", full.name, shared.name, "");
  out += line("pattern", [](const Run& run) { return run.pattern; }, "");
  out += line("Full layers", [](const Run& run) { return std::to_string(run.full_layers); }, "");
  out += timed("prefill", prefill);
  out += part("  in the indexer", [](const Run& run) { return run.prefill.indexer; }, prefill);
  out += part("  in attention", [](const Run& run) { return run.prefill.attention; }, prefill);
  out += timed("decode", decode);
  out += part("  in the indexer", [](const Run& run) { return run.decode.indexer; }, decode);
  out += part("  in attention", [](const Run& run) { return run.decode.attention; }, decode);
  out += line(
      "tokens/s", [](const Run& run) { return format("%.0f", run.tokens_per_s()); },
      faster(full.total(), shared.total()));
  out += line(
      "bits per byte", [](const Run& run) { return format("%.4f", run.bits_per_byte); },
      format("%+.4f", shared.bits_per_byte - full.bits_per_byte));
  out += line(
      "index K", [](const Run& run) { return format("%.0f B a token", run.index_k_bytes_per_token); },
      format("%.2fx", shared.index_k_bytes_per_token / full.index_k_bytes_per_token));
  out += coverage_lines(report);
  for (const Run& run : report.runs) {
    out += "\nrequest 0 goes on, " + run.name + ":\n  " + printable(run.generated[0]) + "\n";
  }
  return out;
}

std::string as_json(const Report& report) {
  Object object;
  object.text("model", report.model).text("isa", report.isa).count("layers", report.layers).count("topk", report.topk);
  object.count("requests", report.requests).count("context", report.context).count("decode", report.decode);
  object.count("chunk", report.chunk).count("threads", report.threads).count("repeats", report.repeats);
  object.raw("runs", json_list(report.runs, [&](const Run& run) { return run_json(run, report.runs[0]); }));
  object.raw("coverage", json_list(report.coverage, coverage_json));
  return object.done() + "\n";
}

Progress::Progress(int64_t total) : terminal_(isatty(STDERR_FILENO) == 1), total_(total) {}

Progress::~Progress() {
  if (terminal_) std::fputs("\r\x1b[K", stderr);
}

void Progress::advance(int64_t rows) {
  constexpr int64_t width = 40;
  done_ += rows;
  const int64_t percent = 100 * done_ / std::max<int64_t>(total_, 1);
  if (!terminal_ || percent == shown_) return;
  shown_ = percent;
  const size_t filled = static_cast<size_t>(std::min(width, width * done_ / std::max<int64_t>(total_, 1)));
  const std::string bar = std::string(filled, '#') + std::string(width - filled, '.');
  std::fprintf(stderr, "\r\x1b[K[%s] %3d %%  %s", bar.c_str(), static_cast<int>(percent), name_.c_str());
}

}  // namespace serve
