// A fixed set of worker threads. Work is cut into tasks whose results do not depend on who runs them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace serve {

class Threads {
 public:
  // `count` threads in all, the caller's among them.
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  // Calls `body(first, last)` for blocks that cover rows 0 .. rows - 1, and returns when all are done.
  // `body` must not throw.
  void for_rows(int64_t rows, const std::function<void(int64_t, int64_t)>& body);

 private:
  void work();
  void take_blocks();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int64_t, int64_t)>* body_ = nullptr;
  int64_t rows_ = 0, next_ = 0, running_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
};

}  // namespace serve
