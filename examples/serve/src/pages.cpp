#include "pages.hpp"

#include <algorithm>
#include <stdexcept>

#include "error.hpp"

namespace serve {

using indexcache::Tensor;

PageAllocator::PageAllocator(int64_t pages) {
  for (int64_t page = pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

int32_t PageAllocator::take() {
  if (free_.empty()) throw std::runtime_error("out of pages");
  const int32_t page = free_.back();
  free_.pop_back();
  return page;
}

BlockTable::BlockTable(int64_t requests, int64_t max_tokens)
    : requests_(requests), max_pages_((max_tokens + page_size - 1) / page_size) {
  table_.assign(static_cast<size_t>(requests_ * max_pages_), -1);
}

int64_t BlockTable::place(int64_t request, int64_t position, PageAllocator& allocator) {
  int32_t& page = table_.at(static_cast<size_t>(request * max_pages_ + position / page_size));
  if (page < 0) page = allocator.take();
  return page * page_size + position % page_size;
}

void BlockTable::release(int64_t request, PageAllocator& allocator) {
  const auto first = table_.begin() + request * max_pages_;
  for (auto page = first; page != first + max_pages_; ++page) {
    if (*page >= 0) allocator.give_back(*page);
    *page = -1;
  }
}

Stores::Stores(const Config& config, const indexcache::Plan& plan, int64_t pages)
    : pages_(pages), kv_row_(config.kv_row()), index_k_page_(page_size * (config.index_dim + 4)) {
  const size_t kv_elements = static_cast<size_t>(pages_ * page_size * kv_row_);
  kv_.assign(static_cast<size_t>(config.layers), std::vector<indexcache::bf16>(kv_elements));

  // The plan numbers the layers that own index K without gaps: allocate that many, none for Shared layers.
  const size_t slots = static_cast<size_t>(check(plan.info()).index_k_slots);
  index_k_.assign(slots, std::vector<uint8_t>(static_cast<size_t>(pages_ * index_k_page_)));
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    index_k_slot_.push_back(check(plan.layer_info(static_cast<int32_t>(layer))).index_k_slot);
  }
}

Tensor Stores::kv(int64_t layer) { return {kv_.at(static_cast<size_t>(layer)).data(), {pages_, page_size, kv_row_}}; }

Tensor Stores::index_k(int64_t layer) {
  const size_t slot = static_cast<size_t>(index_k_slot_.at(static_cast<size_t>(layer)));
  return {index_k_.at(slot).data(), {pages_, index_k_page_}};
}

int64_t Stores::index_k_bytes() const {
  int64_t bytes = 0;
  for (const auto& store : index_k_) bytes += static_cast<int64_t>(store.size());
  return bytes;
}

}  // namespace serve
