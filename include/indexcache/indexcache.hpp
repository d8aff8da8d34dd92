/* indexcache for C++17: handles that free themselves, tensors that own their shape, results with a text.
 *
 * Header-only, over indexcache.h, whose comments are the reference: every C function is here under its own name, and
 * arguments are the C structs themselves. Nothing throws and nothing needs exceptions or RTTI; only Plan::export_text
 * and Search::result allocate on the C++ side of a successful call. Handles are move-only. An empty handle (default-made, moved from, or
 * out of a failed Result) is a NULL handle: every call refuses it with IDXC_ERR_INVALID.
 *
 *   auto context = indexcache::Context::create();
 *   if (!context) return fail(context.error());
 *
 * A host that loads the library with dlopen defines INDEXCACHE_TABLE, before this header, as an expression of type
 * `const idxc_api*` that is valid wherever a call is made; all calls then go through that table (see dynload.h). */

#ifndef INDEXCACHE_INDEXCACHE_HPP
#define INDEXCACHE_INDEXCACHE_HPP

#include "indexcache.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#ifdef INDEXCACHE_TABLE
#define INDEXCACHE_CALL(name) (INDEXCACHE_TABLE)->name
#define INDEXCACHE_LINKAGE loaded
#else
#define INDEXCACHE_CALL(name) ::name
#define INDEXCACHE_LINKAGE linked
#endif

namespace indexcache {
// Two namespaces, so that a program may have sources of both kinds.
inline namespace INDEXCACHE_LINKAGE {

/// ABI version of the library.
inline std::uint32_t version() noexcept { return INDEXCACHE_CALL(idxc_version)(); }

/// Short name of a status; static.
inline const char* status_name(idxc_status status) noexcept { return INDEXCACHE_CALL(idxc_status_name)(status); }

/// Text of this thread's last error; valid until this thread's next failing call.
inline const char* last_error() noexcept { return INDEXCACHE_CALL(idxc_last_error)(); }

/// Sends the library's log lines to `callback`; nullptr sends them to nobody.
[[nodiscard]] inline idxc_status set_log_callback(idxc_log_callback callback, void* user) noexcept {
  return INDEXCACHE_CALL(idxc_set_log_callback)(callback, user);
}

/// A value, or a status with the text of the error. The text is a copy: later calls do not change it.
///
/// The value of a failed result is an empty one: an empty handle, a zero, an empty string.
template <class T>
class [[nodiscard]] Result {
 public:
  /// What a call returned, and what it gave. Takes this thread's error text if it failed.
  Result(idxc_status status, T value) noexcept : value_(std::move(value)), status_(status) {
    if (status_ != IDXC_OK) keep_text(last_error());
  }

  bool ok() const noexcept { return status_ == IDXC_OK; }
  explicit operator bool() const noexcept { return ok(); }
  idxc_status status() const noexcept { return status_; }

  /// Why it failed; "" if it did not. Lives as long as the result.
  const char* error() const noexcept {
    if (ok()) return "";
    return text_ ? text_.get() : status_name(status_);
  }

  T& operator*() & noexcept { return value_; }
  const T& operator*() const& noexcept { return value_; }
  T&& operator*() && noexcept { return std::move(value_); }
  T* operator->() noexcept { return &value_; }
  const T* operator->() const noexcept { return &value_; }

 private:
  struct Free {
    void operator()(char* text) const noexcept { std::free(text); }
  };

  // malloc, because it may fail without throwing: error() then has the status's name.
  void keep_text(const char* text) noexcept {
    const std::size_t size = std::strlen(text) + 1;
    text_.reset(static_cast<char*>(std::malloc(size)));
    if (text_) std::memcpy(text_.get(), text, size);
  }

  T value_;
  idxc_status status_;
  std::unique_ptr<char, Free> text_;
};

/// Storage of a bfloat16. Any type with the same bits serves: see `DType`.
struct bf16 {
  std::uint16_t bits;
};

/// Storage of an fp8 e4m3 (finite).
struct fp8_e4m3 {
  std::uint8_t bits;
};

/// The element type behind a C++ type. A host adds its own:
/// `template <> struct indexcache::DType<__nv_bfloat16> : indexcache::DType<indexcache::bf16> {};`
template <class T>
struct DType;
template <>
struct DType<std::int32_t> {
  static constexpr idxc_dtype value = {IDXC_DTYPE_INT, 32, 1};
};
template <>
struct DType<std::int64_t> {
  static constexpr idxc_dtype value = {IDXC_DTYPE_INT, 64, 1};
};
template <>
struct DType<std::uint8_t> {
  static constexpr idxc_dtype value = {IDXC_DTYPE_UINT, 8, 1};
};
template <>
struct DType<float> {
  static constexpr idxc_dtype value = {IDXC_DTYPE_FLOAT, 32, 1};
};
template <>
struct DType<bf16> {
  static constexpr idxc_dtype value = {IDXC_DTYPE_BFLOAT, 16, 1};
};
template <>
struct DType<fp8_e4m3> {
  static constexpr idxc_dtype value = {IDXC_DTYPE_FLOAT8_E4M3FN, 8, 1};
};

inline constexpr idxc_device host_device = {IDXC_DEVICE_CPU, 0};
inline constexpr idxc_device cuda_device(std::int32_t id) noexcept { return {IDXC_DEVICE_CUDA, id}; }

/// A view of the caller's memory that holds its own shape and strides, so that only the memory has to outlive it.
///
/// Passes wherever the C API takes a `const idxc_tensor*`, as itself or as a field of a descriptor; a temporary does
/// not, because the descriptor would outlive it.
class Tensor {
 public:
  /// The library's limit; of a longer shape only the count is kept, and the library refuses it.
  static constexpr std::size_t max_dims = 5;

  /// Nothing: no memory, no dimensions.
  Tensor() noexcept { point(); }

  /// Dense, row-major. Memory that is only read may be const.
  template <class T>
  Tensor(T* data, std::initializer_list<std::int64_t> shape, idxc_device device = host_device) noexcept
      : Tensor(data, DType<std::remove_cv_t<T>>::value, shape.begin(), nullptr, shape.size(), device) {}

  /// With strides, in elements, one for each dimension.
  template <class T>
  Tensor(T* data, std::initializer_list<std::int64_t> shape, std::initializer_list<std::int64_t> strides,
         idxc_device device = host_device) noexcept
      : Tensor(data, DType<std::remove_cv_t<T>>::value, shape.begin(), strides.begin(),
               // Lists of two lengths describe nothing: let the library say so.
               shape.size() == strides.size() ? shape.size() : max_dims + 1, device) {}

  /// With everything known at run time. `strides` may be nullptr: dense, row-major.
  Tensor(const void* data, idxc_dtype dtype, const std::int64_t* shape, const std::int64_t* strides, std::size_t ndim,
         idxc_device device = host_device) noexcept {
    // The C struct has no const; inputs are not written.
    c_.data = const_cast<void*>(data);
    c_.device = device;
    c_.dtype = dtype;
    c_.ndim = ndim <= max_dims ? static_cast<std::int32_t>(ndim) : static_cast<std::int32_t>(max_dims) + 1;
    strided_ = strides != nullptr;
    for (std::size_t i = 0; i < ndim && i < max_dims; ++i) {
      shape_[i] = shape[i];
      strides_[i] = strided_ ? strides[i] : 0;
    }
    point();
  }

  /// The same view as a C tensor (or a DLTensor), with a copy of its shape and strides.
  explicit Tensor(const idxc_tensor& other) noexcept
      : Tensor(other.data, other.dtype, other.shape, other.strides,
               other.ndim < 0 ? max_dims + 1 : static_cast<std::size_t>(other.ndim), other.device) {
    c_.byte_offset = other.byte_offset;
  }

  Tensor(const Tensor& other) noexcept { *this = other; }
  Tensor& operator=(const Tensor& other) noexcept {
    c_ = other.c_;
    strided_ = other.strided_;
    for (std::size_t i = 0; i < max_dims; ++i) {
      shape_[i] = other.shape_[i];
      strides_[i] = other.strides_[i];
    }
    point();
    return *this;
  }

  const idxc_tensor* get() const& noexcept { return &c_; }
  const idxc_tensor* get() const&& = delete;
  operator const idxc_tensor*() const& noexcept { return &c_; }
  operator const idxc_tensor*() const&& = delete;

  std::size_t ndim() const noexcept { return static_cast<std::size_t>(c_.ndim); }
  std::int64_t dim(std::size_t i) const noexcept { return i < max_dims ? shape_[i] : 0; }

  /// The first element, if the elements are `T`; else nullptr.
  template <class T>
  T* data() const noexcept {
    constexpr idxc_dtype want = DType<std::remove_cv_t<T>>::value;
    if (c_.data == nullptr || c_.dtype.code != want.code || c_.dtype.bits != want.bits) return nullptr;
    return reinterpret_cast<T*>(static_cast<char*>(c_.data) + c_.byte_offset);
  }

 private:
  void point() noexcept {
    c_.shape = shape_;
    c_.strides = strided_ ? strides_ : nullptr;
  }

  idxc_tensor c_ = {};
  std::int64_t shape_[max_dims] = {};
  std::int64_t strides_[max_dims] = {};
  bool strided_ = false;
};

namespace detail {
struct Destroy {
  void operator()(idxc_context* p) const noexcept { INDEXCACHE_CALL(idxc_context_destroy)(p); }
  void operator()(idxc_plan* p) const noexcept { INDEXCACHE_CALL(idxc_plan_destroy)(p); }
  void operator()(idxc_cache* p) const noexcept { INDEXCACHE_CALL(idxc_cache_destroy)(p); }
  void operator()(idxc_search* p) const noexcept { INDEXCACHE_CALL(idxc_search_destroy)(p); }
};
}  // namespace detail

/// What `Context`, `Plan`, `Cache` and `Search` have in common: sole ownership of a C handle.
template <class C>
class Handle {
 public:
  Handle() noexcept = default;
  /// Takes over a handle of the C API.
  explicit Handle(C* handle) noexcept : handle_(handle) {}

  explicit operator bool() const noexcept { return handle_ != nullptr; }
  C* get() const noexcept { return handle_.get(); }
  /// Gives the handle up; the caller destroys it.
  [[nodiscard]] C* release() noexcept { return handle_.release(); }
  void reset() noexcept { handle_.reset(); }

 private:
  std::unique_ptr<C, detail::Destroy> handle_;
};

/// One backend on one device, and the operations without a cache. Any number of threads at once.
class Context : public Handle<idxc_context> {
 public:
  using Handle::Handle;

  static Result<Context> create(const idxc_context_desc& desc = IDXC_CONTEXT_DESC_INIT) noexcept {
    idxc_context* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_context_create)(&desc, &out);
    return {status, Context(out)};
  }

  Result<idxc_context_info> info() const noexcept {
    idxc_context_info info = IDXC_CONTEXT_INFO_INIT;
    const idxc_status status = INDEXCACHE_CALL(idxc_context_get_info)(get(), &info);
    return {status, info};
  }

  [[nodiscard]] idxc_status index_k_write(const idxc_index_k_write_desc& desc, void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_index_k_write)(get(), &desc, stream);
  }

  [[nodiscard]] idxc_status index_q_quantize(const idxc_index_q_quantize_desc& desc,
                                             void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_index_q_quantize)(get(), &desc, stream);
  }

  [[nodiscard]] idxc_status indexer_logits(const idxc_indexer_desc& desc, const idxc_tensor* logits,
                                           void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_indexer_logits)(get(), &desc, logits, stream);
  }

  [[nodiscard]] idxc_status paged_indexer_logits(const idxc_indexer_desc& desc, const idxc_tensor* logits,
                                                 void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_paged_indexer_logits)(get(), &desc, logits, stream);
  }

  Result<std::size_t> topk_workspace(const idxc_topk_desc& desc) const noexcept {
    std::size_t size = 0;
    const idxc_status status = INDEXCACHE_CALL(idxc_topk_workspace)(get(), &desc, &size);
    return {status, size};
  }

  [[nodiscard]] idxc_status topk(const idxc_topk_desc& desc, void* workspace, std::size_t workspace_size,
                                 void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_topk)(get(), &desc, workspace, workspace_size, stream);
  }

  [[nodiscard]] idxc_status indices_to_slots(const idxc_indices_to_slots_desc& desc,
                                             void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_indices_to_slots)(get(), &desc, stream);
  }

  [[nodiscard]] idxc_status kv_write(const idxc_kv_write_desc& desc, void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_kv_write)(get(), &desc, stream);
  }

  Result<std::size_t> sparse_attention_workspace(const idxc_attention_desc& desc, const idxc_tensor* indices,
                                                 std::int32_t form) const noexcept {
    std::size_t size = 0;
    const idxc_status status =
        INDEXCACHE_CALL(idxc_sparse_attention_workspace)(get(), &desc, indices, form, &size);
    return {status, size};
  }

  [[nodiscard]] idxc_status sparse_attention(const idxc_attention_desc& desc, const idxc_tensor* indices,
                                             std::int32_t form, void* workspace, std::size_t workspace_size,
                                             void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_sparse_attention)(get(), &desc, indices, form, workspace, workspace_size, stream);
  }

  [[nodiscard]] idxc_status indices_overlap(const idxc_tensor* a, const idxc_tensor* b, const idxc_tensor* overlap,
                                            void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_indices_overlap)(get(), a, b, overlap, stream);
  }

  Result<std::size_t> distill_workspace(const idxc_distill_desc& desc) const noexcept {
    std::size_t size = 0;
    const idxc_status status = INDEXCACHE_CALL(idxc_distill_workspace)(get(), &desc, &size);
    return {status, size};
  }

  [[nodiscard]] idxc_status distill(const idxc_distill_desc& desc, void* workspace, std::size_t workspace_size,
                                    void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_distill)(get(), &desc, workspace, workspace_size, stream);
  }
};

/// A resolved pattern and what follows from it. Immutable; any number of threads.
class Plan : public Handle<idxc_plan> {
 public:
  using Handle::Handle;

  static Result<Plan> from_pattern(const idxc_model_desc& model, const char* pattern) noexcept {
    idxc_plan* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_plan_from_pattern)(&model, pattern, &out);
    return {status, Plan(out)};
  }

  static Result<Plan> from_indexer_types(const idxc_model_desc& model, const char* const* types,
                                         std::size_t count) noexcept {
    idxc_plan* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_plan_from_indexer_types)(&model, types, count, &out);
    return {status, Plan(out)};
  }

  /// Without `offset`: the dialect's default.
  static Result<Plan> from_freq(const idxc_model_desc& model, std::int32_t dialect, std::int64_t freq,
                                std::optional<std::int64_t> offset = std::nullopt) noexcept {
    idxc_plan* out = nullptr;
    const idxc_status status =
        INDEXCACHE_CALL(idxc_plan_from_freq)(&model, dialect, freq, offset ? &*offset : nullptr, &out);
    return {status, Plan(out)};
  }

  static Result<Plan> from_source_layers(const idxc_model_desc& model, const std::int64_t* layers,
                                         std::size_t count) noexcept {
    idxc_plan* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_plan_from_source_layers)(&model, layers, count, &out);
    return {status, Plan(out)};
  }

  static Result<Plan> from_hf_config(std::string_view json) noexcept {
    idxc_plan* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_plan_from_hf_config)(json.data(), json.size(), &out);
    return {status, Plan(out)};
  }

  Result<Plan> slice(std::int32_t first, std::int32_t end, std::uint32_t flags = 0) const noexcept {
    idxc_plan* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_plan_slice)(get(), first, end, flags, &out);
    return {status, Plan(out)};
  }

  Result<idxc_plan_info> info() const noexcept {
    idxc_plan_info info = IDXC_PLAN_INFO_INIT;
    const idxc_status status = INDEXCACHE_CALL(idxc_plan_get_info)(get(), &info);
    return {status, info};
  }

  /// `IDXC_ROLE_…`, -1 for a layer that is not the plan's.
  std::int32_t layer_role(std::int32_t layer) const noexcept {
    return INDEXCACHE_CALL(idxc_plan_layer_role)(get(), layer);
  }

  Result<idxc_layer_info> layer_info(std::int32_t layer) const noexcept {
    idxc_layer_info info = IDXC_LAYER_INFO_INIT;
    const idxc_status status = INDEXCACHE_CALL(idxc_plan_layer_get_info)(get(), layer, &info);
    return {status, info};
  }

  /// `idxc_plan_export` as a string. May throw std::bad_alloc where exceptions are on.
  Result<std::string> export_text(std::int32_t format, std::int32_t dialect = IDXC_DIALECT_HF) const {
    std::size_t size = 0;
    std::string text;
    idxc_status status = export_text(format, dialect, nullptr, 0, &size);
    if (status == IDXC_OK) {
      text.resize(size);
      status = export_text(format, dialect, text.data(), text.size(), &size);
      text.resize(status == IDXC_OK ? size - 1 : 0);
    }
    return {status, std::move(text)};
  }

  /// The same into the caller's buffer; `*size` receives the bytes needed, NUL included.
  [[nodiscard]] idxc_status export_text(std::int32_t format, std::int32_t dialect, char* buffer, std::size_t capacity,
                                        std::size_t* size) const noexcept {
    return INDEXCACHE_CALL(idxc_plan_export)(get(), format, dialect, buffer, capacity, size);
  }
};

/// Index-cache buffers and the calls of the per-layer loop. One thread at a time.
class Cache : public Handle<idxc_cache> {
 public:
  using Handle::Handle;

  /// Bytes of device memory that such a cache holds.
  static Result<std::size_t> size(const Plan& plan, const idxc_cache_desc& desc) noexcept {
    std::size_t size = 0;
    const idxc_status status = INDEXCACHE_CALL(idxc_cache_size)(plan.get(), &desc, &size);
    return {status, size};
  }

  static Result<Cache> create(const Context& context, const Plan& plan, const idxc_cache_desc& desc) noexcept {
    idxc_cache* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_cache_create)(context.get(), plan.get(), &desc, &out);
    return {status, Cache(out)};
  }

  [[nodiscard]] idxc_status step_begin(std::int32_t lane, std::int32_t rows, std::uint64_t step_id) noexcept {
    return INDEXCACHE_CALL(idxc_step_begin)(get(), lane, rows, step_id);
  }

  [[nodiscard]] idxc_status step_carry(std::int32_t lane, const idxc_tensor* from, std::uint64_t step_id,
                                       void* stream = nullptr) noexcept {
    return INDEXCACHE_CALL(idxc_step_carry)(get(), lane, from, step_id, stream);
  }

  Result<std::size_t> select_workspace(const idxc_indexer_desc& desc) const noexcept {
    std::size_t size = 0;
    const idxc_status status = INDEXCACHE_CALL(idxc_select_workspace)(get(), &desc, &size);
    return {status, size};
  }

  /// `desc` may be nullptr on a Shared layer.
  [[nodiscard]] idxc_status select(std::int32_t lane, std::int32_t layer, const idxc_indexer_desc* desc,
                                   void* workspace, std::size_t workspace_size, void* stream = nullptr) noexcept {
    return INDEXCACHE_CALL(idxc_select)(get(), lane, layer, desc, workspace, workspace_size, stream);
  }

  /// The lane's buffer for this step, to write before `publish` without indices.
  Result<Tensor> slot(std::int32_t lane) const noexcept {
    idxc_tensor out = {};
    const idxc_status status = INDEXCACHE_CALL(idxc_slot)(get(), lane, &out);
    return {status, Tensor(out)};
  }

  [[nodiscard]] idxc_status publish(std::int32_t lane, std::int32_t layer, const idxc_tensor* indices,
                                    std::int32_t form, std::uint64_t table_id = 0, void* stream = nullptr) noexcept {
    return INDEXCACHE_CALL(idxc_publish)(get(), lane, layer, indices, form, table_id, stream);
  }

  /// The indices that the layer uses; the memory is the cache's, and the next Full layer overwrites it.
  Result<Tensor> indices(std::int32_t lane, std::int32_t layer) const noexcept {
    idxc_tensor out = {};
    const idxc_status status = INDEXCACHE_CALL(idxc_indices)(get(), lane, layer, &out);
    return {status, Tensor(out)};
  }

  /// `idxc_export`; `export` is a word of the language.
  [[nodiscard]] idxc_status export_indices(std::int32_t lane, std::int32_t layer, const idxc_tensor* out,
                                           void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_export)(get(), lane, layer, out, stream);
  }

  Result<idxc_lane_info> lane_info(std::int32_t lane) const noexcept {
    idxc_lane_info info = IDXC_LANE_INFO_INIT;
    const idxc_status status = INDEXCACHE_CALL(idxc_lane_get_info)(get(), lane, &info);
    return {status, info};
  }

  Result<std::size_t> attend_workspace(const idxc_attention_desc& desc) const noexcept {
    std::size_t size = 0;
    const idxc_status status = INDEXCACHE_CALL(idxc_attend_workspace)(get(), &desc, &size);
    return {status, size};
  }

  [[nodiscard]] idxc_status attend(std::int32_t lane, std::int32_t layer, const idxc_attention_desc& desc,
                                   void* workspace, std::size_t workspace_size, void* stream = nullptr) const noexcept {
    return INDEXCACHE_CALL(idxc_attend)(get(), lane, layer, &desc, workspace, workspace_size, stream);
  }
};

/// A search for the layers that keep their indexer, and its journal. One thread at a time.
class Search : public Handle<idxc_search> {
 public:
  using Handle::Handle;

  static Result<Search> create(const idxc_search_desc& desc) noexcept {
    idxc_search* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_search_create)(&desc, &out);
    return {status, Search(out)};
  }

  static Result<Search> resume(const idxc_search_desc& desc, const char* path) noexcept {
    idxc_search* out = nullptr;
    const idxc_status status = INDEXCACHE_CALL(idxc_search_resume)(&desc, path, &out);
    return {status, Search(out)};
  }

  /// What to measure; `pattern` is nullptr when the search is complete. Its strings are valid until the next report.
  Result<idxc_search_candidate> next() const noexcept {
    idxc_search_candidate candidate = IDXC_SEARCH_CANDIDATE_INIT;
    const idxc_status status = INDEXCACHE_CALL(idxc_search_next)(get(), &candidate);
    return {status, candidate};
  }

  [[nodiscard]] idxc_status report(const char* pattern, double loss) noexcept {
    return INDEXCACHE_CALL(idxc_search_report)(get(), pattern, loss);
  }

  [[nodiscard]] idxc_status save(const char* path) noexcept {
    return INDEXCACHE_CALL(idxc_search_save)(get(), path);
  }

  /// `idxc_search_result` as a string. May throw std::bad_alloc where exceptions are on.
  Result<std::string> result() const {
    std::size_t size = 0;
    std::string text;
    idxc_status status = result(nullptr, 0, &size);
    if (status == IDXC_OK) {
      text.resize(size);
      status = result(text.data(), text.size(), &size);
      text.resize(status == IDXC_OK ? size - 1 : 0);
    }
    return {status, std::move(text)};
  }

  /// The same into the caller's buffer; `*size` receives the bytes needed, NUL included.
  [[nodiscard]] idxc_status result(char* buffer, std::size_t capacity, std::size_t* size) const noexcept {
    return INDEXCACHE_CALL(idxc_search_result)(get(), buffer, capacity, size);
  }
};

}  // namespace INDEXCACHE_LINKAGE
}  // namespace indexcache

#undef INDEXCACHE_CALL
#undef INDEXCACHE_LINKAGE

#endif  // INDEXCACHE_INDEXCACHE_HPP
