// A search with indexcache.hpp alone, over a made-up loss: against a plain greedy loop, with its process killed every few
// losses, and with everything wrong that a host can get wrong. Last argument: a directory for journals. With LOADED,
// through dlopen of the first argument.
#ifdef LOADED
#include <indexcache/dynload.h>
const idxc_api* table();
#define INDEXCACHE_TABLE table()
#endif
#include <indexcache/indexcache.hpp>

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace ic = indexcache;

#ifdef LOADED
static idxc_library library;
const idxc_api* table() { return library.api; }
#endif

static_assert(!std::is_copy_constructible_v<ic::Search> && std::is_nothrow_move_constructible_v<ic::Search>);

[[noreturn]] static void fail(int line, const char* what, const char* text) {
  std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, line, what, text);
  std::exit(1);
}
#define NEED(condition) \
  if (!(condition)) fail(__LINE__, #condition, ic::last_error())
#define OK(call) NEED((call) == IDXC_OK)

// The status, and words that the error's text must have.
#define REFUSED(call, status, words) \
  NEED((call) == (status) && std::strstr(ic::last_error(), words))

constexpr std::size_t layers = 9;
constexpr std::int64_t rows[] = {2049, 4096};

static idxc_search_desc description() {
  idxc_search_desc desc = IDXC_SEARCH_DESC_INIT;
  desc.layers = static_cast<std::int32_t>(layers);
  desc.topk = 2048;
  desc.model = "model a";
  desc.calibration = "rows 0-1";
  desc.row_lengths = rows;
  desc.row_lengths_count = 2;
  return desc;
}

// A weight a layer, and layers 3 and 4 get dear together.
static double loss(const std::string& pattern) {
  double sum = 1.0 / 3;
  for (std::size_t l = 0; l < layers; ++l)
    if (pattern[l] == 'S') sum += 0.01 * static_cast<double>(l * 5 % layers) + (l == 4 && pattern[3] == 'S' ? 7.0 / 9 : 0);
  return sum;
}

static ic::Search begin(const idxc_search_desc& desc) {
  auto search = ic::Search::create(desc);
  NEED(search);
  return *std::move(search);
}

// Measures until the search is complete, or `most` losses are told.
static int drive(ic::Search& search, int most = 1 << 30) {
  int told = 0;
  while (told < most) {
    auto candidate = search.next();
    NEED(candidate);
    if (!candidate->pattern) {
      NEED(!candidate->base && candidate->first_changed_layer == -1 && candidate->evaluations == candidate->expected);
      break;
    }
    auto again = search.next();
    NEED(again && std::strcmp(again->pattern, candidate->pattern) == 0);
    const std::string pattern = candidate->pattern, base = candidate->base;
    const auto first = static_cast<std::size_t>(candidate->first_changed_layer);
    NEED(pattern.size() == layers && pattern.compare(0, first, base, 0, first) == 0);
    NEED(pattern == base ? candidate->evaluations == 0 : pattern[first] != base[first]);
    OK(search.report(candidate->pattern, loss(pattern)));
    ++told;
  }
  return told;
}

static std::string result(const ic::Search& search) {
  auto text = search.result();
  NEED(text);
  return *std::move(text);
}

// The trajectory as the text of the result spells it.
static void agrees_with_a_plain_loop(const std::string& json) {
  std::string pattern(layers, 'F');
  std::size_t at = 0;
  for (std::size_t step = 1; step < layers; ++step) {
    std::string best;
    for (std::size_t l = 1; l < layers; ++l) {
      if (pattern[l] == 'S') continue;
      std::string flipped = pattern;
      flipped[l] = 'S';
      if (best.empty() || loss(flipped) < loss(best)) best = flipped;
    }
    pattern = best;
    at = json.find("\"pattern\": \"" + pattern + "\"", at);
    NEED(at != std::string::npos);
  }
}

static void refusals(const std::string& path) {
  idxc_search_desc desc = description();
  auto search = begin(desc);
  const std::string all_full(layers, 'F');
  REFUSED(search.report(all_full.c_str(), std::nan("")), IDXC_ERR_INVALID, "idxc_search_report: loss: ");
  REFUSED(search.report(all_full.c_str(), -INFINITY), IDXC_ERR_INVALID, "loss: ");
  REFUSED(search.report("FSFFFFFFF", 1), IDXC_ERR_INVALID, "pattern: expected FFFFFFFFF, got FSFFFFFFF");
  REFUSED(search.report("full", 1), IDXC_ERR_CONFIG, "pattern: ");
  OK(search.report(all_full.c_str(), 1));
  OK(search.report(all_full.c_str(), 1));
  REFUSED(search.report(all_full.c_str(), 1.5), IDXC_ERR_INVALID, "loss: ");

  OK(search.save(path.c_str()));
  OK(search.save(path.c_str()));
  REFUSED(begin(desc).save(path.c_str()), IDXC_ERR_INVALID, "path: ");
  REFUSED(begin(desc).save((path + "/below a file").c_str()), IDXC_ERR_IO, "path: ");
  auto resume = [&] { return ic::Search::resume(desc, path.c_str()).status(); };
  REFUSED(resume(), IDXC_ERR_INVALID, "path: ");  // open in `search`
  search.reset();
  OK(resume());
  REFUSED(ic::Search::resume(desc, (path + ".no").c_str()).status(), IDXC_ERR_IO, "path: ");

#define CHANGED(field, value, words)                  \
  desc.field = value;                                 \
  REFUSED(resume(), IDXC_ERR_INVALID, words ": ");    \
  desc = description()
  CHANGED(model, "model b", "model");
  CHANGED(calibration, "rows 2-3", "calibration");
  CHANGED(row_lengths_count, 1, "calibration");
  CHANGED(topk, 1024, "topk");
  CHANGED(target_full_layers, 3, "target_full_layers");
  CHANGED(swap_full_layers, 3, "swap_full_layers");
  desc.few = 2;
  CHANGED(method, IDXC_SEARCH_LAZY, "method");

  auto create = [&] { return ic::Search::create(desc).status(); };
#define REFUSES(field, value, words)                  \
  desc.field = value;                                 \
  REFUSED(create(), IDXC_ERR_INVALID, words ": ");    \
  desc = description()
  const std::int32_t wrong[] = {3, 2}, below[] = {-1}, beyond[] = {layers};
  const std::int64_t short_rows[] = {4096, 2048}, negative_rows[] = {-1, 4096};
  REFUSES(layers, 1, "layers");
  REFUSES(layers, -5, "layers");
  REFUSES(topk, 0, "topk");
  REFUSES(topk, 4096, "row_lengths");
  REFUSES(model, nullptr, "model");
  REFUSES(model, "", "model");
  REFUSES(calibration, "\xff", "calibration");
  REFUSES(row_lengths, nullptr, "row_lengths");
  REFUSES(row_lengths, short_rows, "row_lengths");
  REFUSES(row_lengths, negative_rows, "row_lengths");
  REFUSES(row_lengths_count, 0, "row_lengths");
  REFUSES(pinned_count, 1, "pinned");
  REFUSES(method, 2, "method");
  REFUSES(few, 1, "few");
  REFUSES(few, -1, "few");
  REFUSES(method, IDXC_SEARCH_LAZY, "few");
  REFUSES(target_full_layers, 9, "target_full_layers");
  REFUSES(target_full_layers, -1, "target_full_layers");
  REFUSES(swap_full_layers, 1, "swap_full_layers");
  for (auto list : {wrong, below, beyond}) {
    desc.pinned = list, desc.pinned_count = list == wrong ? 2 : 1;
    REFUSED(create(), IDXC_ERR_INVALID, "pinned: ");
    desc = description();
    desc.stages = list, desc.stages_count = list == wrong ? 2 : 1;
    REFUSED(create(), IDXC_ERR_INVALID, "stages: ");
    desc = description();
  }

  ic::Search none;
  NEED(none.next().status() == IDXC_ERR_INVALID && none.result().status() == IDXC_ERR_INVALID);
  REFUSED(none.report(all_full.c_str(), 1), IDXC_ERR_INVALID, "search: ");
  REFUSED(none.save(path.c_str()), IDXC_ERR_INVALID, "search: ");
}

static void sizes(const ic::Search& search) {
  const std::string want = result(search);
  std::size_t size = 0;
  OK(search.result(nullptr, 0, &size));
  NEED(size == want.size() + 1);
  std::vector<char> buffer(size, '#');
  size = 0;
  NEED(search.result(buffer.data(), buffer.size() - 1, &size) == IDXC_ERR_BUFFER_TOO_SMALL);
  NEED(size == want.size() + 1 && buffer[0] == '#');
  OK(search.result(buffer.data(), buffer.size(), &size));
  NEED(want == buffer.data());
  NEED(search.result(nullptr, 8, &size) == IDXC_ERR_INVALID);
  NEED(search.result(buffer.data(), buffer.size(), nullptr) == IDXC_ERR_INVALID);
}

int main(int argc, char** argv) {
#ifdef LOADED
  NEED(argc == 3);
  if (!idxc_library_open(&library, argv[1])) fail(__LINE__, "open", library.error);
#endif
  const std::string path = std::string(argv[argc - 1]) + "/search.jsonl";
  const idxc_search_desc desc = description();
  constexpr int all = static_cast<int>(layers * (layers - 1) / 2) + 1;

  auto whole = begin(desc);
  NEED(whole.next()->expected == all && drive(whole) == all);
  const std::string want = result(whole);
  agrees_with_a_plain_loop(want);
  sizes(whole);

  // Every process tells four losses and dies with the fourth on the disk.
  int processes = 0, status = 0;
  std::remove(path.c_str());
  do {
    const pid_t child = fork();
    NEED(child >= 0);
    if (child == 0) {
      auto search = access(path.c_str(), F_OK) == 0 ? ic::Search::resume(desc, path.c_str()) : ic::Search::create(desc);
      NEED(search && search->next()->evaluations == 4 * processes);
      OK(search->save(path.c_str()));
      if (drive(*search, 4) == 4) std::raise(SIGKILL);
      std::_Exit(0);
    }
    NEED(waitpid(child, &status, 0) == child);
    ++processes;
  } while (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  NEED(WIFEXITED(status) && WEXITSTATUS(status) == 0 && processes == all / 4 + 1);
  auto resumed = ic::Search::resume(desc, path.c_str());
  NEED(resumed && drive(*resumed) == 0 && result(*resumed) == want);
  resumed->reset();
  std::remove(path.c_str());

  // Lazy, in three stages, down to five Full layers.
  const std::int32_t stages[] = {3, 6}, pinned[] = {7};
  idxc_search_desc staged = desc;
  staged.method = IDXC_SEARCH_LAZY, staged.few = 1;
  staged.stages = stages, staged.stages_count = 2;
  staged.pinned = pinned, staged.pinned_count = 1;
  staged.target_full_layers = 5, staged.swap_full_layers = 6;
  auto lazy = begin(staged);
  drive(lazy);
  NEED(result(lazy).find("\"full_layers\": 5") != std::string::npos);

  refusals(path);
  std::remove(path.c_str());
  return 0;
}
