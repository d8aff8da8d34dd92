#include "server.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace serve {
namespace {

// A request is on its way while the one before it is half through its prompt, so that prefill and decode meet.
int64_t arrival_step(const Workload& workload, int64_t request) {
  const int64_t prompt = static_cast<int64_t>(workload.prompts.front().size());
  return request * ((prompt + workload.chunk - 1) / workload.chunk) / 2;
}

struct Request {
  int64_t id = 0;
  int64_t arrival = 0;
  std::string_view prompt;
  int64_t position = 0;  // Tokens computed.
  int64_t pages = 0;     // Reserved, taken or not.
  bool admitted = false;
  bool done = false;
  double nats = 0;  // Of the prompt's bytes, each predicted from those before it.
  std::string generated;

  int64_t prompt_left() const { return std::max<int64_t>(static_cast<int64_t>(prompt.size()) - position, 0); }
};

// -log softmax(logits)[byte]
double surprise(const float* logits, int64_t vocab, uint8_t byte) {
  const float top = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[i] - top));
  return std::log(sum) - static_cast<double>(logits[byte] - top);
}

class Scheduler {
 public:
  Scheduler(Engine& engine, Threads& threads, const Workload& workload);
  Outcome run(const std::function<void(int64_t)>& progress);

 private:
  void admit(int64_t step);
  void schedule_decode();
  void schedule_prefill();
  void add_row(Request& request);
  void score();
  void advance(Outcome& outcome, bool prefill);

  Engine& engine_;
  Threads& threads_;
  const Workload& workload_;
  PageAllocator allocator_;
  int64_t reserved_ = 0;
  BlockTable table_;
  std::vector<Request> requests_;
  Batch batch_;
  std::vector<double> surprise_;  // Of each row's next prompt byte.
  std::vector<uint8_t> next_;     // The likeliest byte after each row.
};

Scheduler::Scheduler(Engine& engine, Threads& threads, const Workload& workload)
    : engine_(engine),
      threads_(threads),
      workload_(workload),
      allocator_(engine.size().pages),
      table_(engine.size().requests, engine.size().max_tokens) {
  for (const std::string_view prompt : workload.prompts) {
    Request request;
    request.id = static_cast<int64_t>(requests_.size());
    request.arrival = arrival_step(workload, request.id);
    request.prompt = prompt;
    request.pages = (static_cast<int64_t>(prompt.size()) + workload.decode + page_size - 1) / page_size;
    requests_.push_back(request);
  }
  surprise_.resize(static_cast<size_t>(engine.size().max_rows));
  next_.resize(surprise_.size());
}

// A request enters when pages for its whole life are left, so that none has to be thrown out half way.
void Scheduler::admit(int64_t step) {
  for (Request& request : requests_) {
    if (request.admitted || request.arrival > step) continue;
    if (reserved_ + request.pages > engine_.size().pages) return;  // First come, first served.
    reserved_ += request.pages;
    request.admitted = true;
  }
}

void Scheduler::add_row(Request& request) {
  const int64_t at = request.position++;
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  const char byte =
      at < prompt ? request.prompt[static_cast<size_t>(at)] : request.generated[static_cast<size_t>(at - prompt)];
  batch_.add(static_cast<uint8_t>(byte), at, table_.place(request.id, at, allocator_), request.id);
}

// One row for each request that is past its prompt: nobody's next token waits for somebody else's prompt.
void Scheduler::schedule_decode() {
  for (Request& request : requests_) {
    if (request.admitted && !request.done && request.prompt_left() == 0) add_row(request);
  }
}

// Up to `chunk` prompt rows, in order of arrival; the end of one prompt and the start of the next may meet.
void Scheduler::schedule_prefill() {
  int64_t budget = workload_.chunk;
  for (Request& request : requests_) {
    if (!request.admitted) continue;
    const int64_t rows = std::min(budget, request.prompt_left());
    for (int64_t i = 0; i < rows; ++i) add_row(request);
    budget -= rows;
  }
}

void Scheduler::score() {
  const int64_t vocab = engine_.config().vocab;
  threads_.for_rows(batch_.rows(), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const size_t at = static_cast<size_t>(row);
      const float* logits = engine_.logits() + row * vocab;
      const std::string_view prompt = requests_[static_cast<size_t>(batch_.request[at])].prompt;
      const size_t following = static_cast<size_t>(batch_.position[at]) + 1;
      next_[at] = static_cast<uint8_t>(std::max_element(logits, logits + vocab) - logits);
      surprise_[at] = following < prompt.size() ? surprise(logits, vocab, static_cast<uint8_t>(prompt[following])) : 0;
    }
  });
}

void Scheduler::advance(Outcome& outcome, bool prefill) {
  for (int64_t row = 0; row < batch_.rows(); ++row) {
    const size_t at = static_cast<size_t>(row);
    Request& request = requests_[static_cast<size_t>(batch_.request[at])];
    request.nats += surprise_[at];  // In order of position, whatever the chunks.
    if (batch_.position[at] + 1 < static_cast<int64_t>(request.prompt.size())) continue;
    if (!prefill) ++outcome.decode_only_tokens;
    request.generated += static_cast<char>(next_[at]);
    if (static_cast<int64_t>(request.generated.size()) < workload_.decode) continue;
    request.done = true;
    reserved_ -= request.pages;
    table_.release(request.id, allocator_);
  }
}

Outcome Scheduler::run(const std::function<void(int64_t)>& progress) {
  using Clock = std::chrono::steady_clock;
  Outcome outcome;
  const auto unfinished = [](const Request& request) { return !request.done; };
  for (int64_t step = 0; std::any_of(requests_.begin(), requests_.end(), unfinished); ++step) {
    const Clock::time_point start = Clock::now();
    batch_.clear();
    admit(step);
    schedule_decode();
    const int64_t decode_rows = batch_.rows();
    schedule_prefill();
    if (batch_.rows() == 0) continue;  // Waiting for the next arrival.

    const bool prefill = batch_.rows() > decode_rows;
    Times& times = prefill ? outcome.prefill : outcome.decode;
    engine_.forward(batch_, table_, times);
    score();
    advance(outcome, prefill);
    times.total += std::chrono::duration<double, std::milli>(Clock::now() - start).count();
    outcome.steps += 1;
    outcome.mixed_steps += prefill && decode_rows > 0;
    outcome.tokens += batch_.rows();
    progress(batch_.rows());
  }
  for (const Request& request : requests_) {
    outcome.bits.push_back(request.nats / std::log(2.0) / static_cast<double>(request.prompt.size() - 1));
    outcome.generated.push_back(request.generated);
  }
  return outcome;
}

}  // namespace

double Outcome::bits_per_byte() const {
  return std::accumulate(bits.begin(), bits.end(), 0.0) / static_cast<double>(bits.size());
}

Outcome serve_all(Engine& engine, Threads& threads, const Workload& workload,
                  const std::function<void(int64_t)>& progress) {
  return Scheduler(engine, threads, workload).run(progress);
}

int64_t workload_rows(const Workload& workload) {
  int64_t rows = 0;
  for (const std::string_view prompt : workload.prompts)
    rows += static_cast<int64_t>(prompt.size()) + workload.decode - 1;
  return rows;
}

EngineSize workload_size(const Workload& workload) {
  EngineSize size;
  size.requests = static_cast<int64_t>(workload.prompts.size());
  size.max_rows = workload.chunk + size.requests;
  for (const std::string_view prompt : workload.prompts) {
    size.max_tokens = std::max(size.max_tokens, static_cast<int64_t>(prompt.size()) + workload.decode);
  }
  size.pages = size.requests * ((size.max_tokens + page_size - 1) / page_size);
  return size;
}

}  // namespace serve
