// Paged memory: one page is 64 tokens of one request, under the same number in every layer's store.
#pragma once

#include <cstdint>
#include <vector>

#include "indexcache/indexcache.hpp"
#include "model.hpp"

namespace serve {

constexpr int64_t page_size = 64;

// Hands out page numbers, the last returned first.
class PageAllocator {
 public:
  explicit PageAllocator(int64_t pages);
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  // Throws std::runtime_error if none is left; the scheduler admits no request that could need it.
  int32_t take();
  void give_back(int32_t page) { free_.push_back(page); }

 private:
  std::vector<int32_t> free_;
};

// The pages of each request, as the library reads them: int32 [requests, max_pages].
class BlockTable {
 public:
  BlockTable(int64_t requests, int64_t max_tokens);

  // Where the token lives, `page * page_size + offset`; takes a page when the token is the first of one.
  int64_t place(int64_t request, int64_t position, PageAllocator& allocator);
  void release(int64_t request, PageAllocator& allocator);

  indexcache::Tensor tensor() const { return {table_.data(), {requests_, max_pages_}}; }

 private:
  int64_t requests_, max_pages_;
  std::vector<int32_t> table_;  // -1: no page yet.
};

// What every layer keeps of each token: a bf16 KV row. And on Full layers only: index K, fp8 with a scale.
class Stores {
 public:
  Stores(const Config& config, const indexcache::Plan& plan, int64_t pages);

  // bf16 [pages, page_size, kv_row]
  indexcache::Tensor kv(int64_t layer);
  // uint8 [pages, page_size * (index_dim + 4)]. Full layers only: there is no other to give.
  indexcache::Tensor index_k(int64_t layer);

  // What was really allocated for index K.
  int64_t index_k_bytes() const;

 private:
  int64_t pages_, kv_row_, index_k_page_;
  std::vector<std::vector<indexcache::bf16>> kv_;  // One a layer.
  std::vector<std::vector<uint8_t>> index_k_;      // One a Full layer, in the order of the plan's slots.
  std::vector<int32_t> index_k_slot_;              // Of each layer; -1 on Shared layers.
};

}  // namespace serve
