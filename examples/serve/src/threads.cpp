#include "threads.hpp"

#include <algorithm>

namespace serve {
namespace {

constexpr int64_t block = 24;  // Rows a task: four row tiles of the matrix kernel.

}  // namespace

Threads::Threads(int count) {
  for (int i = 1; i < count; ++i) workers_.emplace_back([this] { work(); });
}

Threads::~Threads() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Threads::for_rows(int64_t rows, const std::function<void(int64_t, int64_t)>& body) {
  // A decode step has few rows: waking somebody would cost more than the work.
  if (rows <= block || workers_.empty()) {
    body(0, rows);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    body_ = &body;
    rows_ = rows;
    next_ = 0;
    running_ = static_cast<int64_t>(workers_.size());
    ++generation_;
  }
  start_.notify_all();
  take_blocks();
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return running_ == 0; });
}

void Threads::work() {
  uint64_t seen = 0;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
    }
    take_blocks();
    std::lock_guard lock(mutex_);
    if (--running_ == 0) done_.notify_one();
  }
}

void Threads::take_blocks() {
  for (;;) {
    int64_t first;
    {
      std::lock_guard lock(mutex_);
      first = next_;
      next_ += block;
    }
    if (first >= rows_) return;
    (*body_)(first, std::min(first + block, rows_));
  }
}

}  // namespace serve
