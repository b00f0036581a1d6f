#include "cublas_lt.h"

#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include "backend/cuda.h"
#include "based/error.h"
#include "cuda_error.h"

namespace based::cuda {
namespace {

// The part of cuBLASLt's ABI that is used here. It is the same in its major versions 12 and 13.
using Status = int;
constexpr Status kSuccess = 0, kNotSupported = 15;
constexpr int kCompute32f = 68;
constexpr std::int32_t kTranspose = 1;
enum DescAttribute : int { kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8 };
enum Epilogue : std::uint32_t { kEpilogueDefault = 1, kEpilogueBias = 4 };
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kReductionSchemeMask = 3,
  kMinAlignmentA = 5,
  kMinAlignmentD = 8
};
enum AlgorithmAttribute : int { kSplitK = 2, kReductionScheme = 3 };
constexpr std::uint32_t kNoReduction = 0;

struct HeuristicResult {
  std::uint64_t algorithm[8];
  std::size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96);

constexpr std::size_t kMinVersion = 120000;  // 10000 · major + 100 · minor + patch

struct Library {
  std::size_t (*version)();
  const char* (*status_string)(Status);
  Status (*create)(void**);
  Status (*destroy)(void*);
  Status (*desc_create)(void**, int compute_type, cudaDataType_t scale_type);
  Status (*desc_destroy)(void*);
  Status (*desc_set)(void*, int attribute, const void*, std::size_t);
  Status (*layout_create)(void**, cudaDataType_t, std::uint64_t rows, std::uint64_t cols, std::int64_t ld);
  Status (*layout_destroy)(void*);
  Status (*preference_create)(void**);
  Status (*preference_destroy)(void*);
  Status (*preference_set)(void*, int attribute, const void*, std::size_t);
  Status (*heuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int requested,
                      HeuristicResult*, int* found);
  Status (*algorithm_check)(void* handle, void* desc, void* a, void* b, void* c, void* d, const void* algorithm,
                            HeuristicResult*);
  Status (*algorithm_get)(const void* algorithm, int attribute, void*, std::size_t, std::size_t* written);
  Status (*matmul)(void* handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b,
                   void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                   const void* algorithm, void* workspace, std::size_t workspace_bytes, cudaStream_t);
};

std::mutex& paths_mutex() {
  static std::mutex mutex;
  return mutex;
}

std::vector<std::string>& added_paths() {
  static std::vector<std::string> paths;
  return paths;
}

const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

/// What to give to dlopen, in order.
std::vector<std::string> candidates() {
  if (const char* only = environment("BASED_CUBLASLT")) return {only};
  std::vector<std::string> added, folders;
  {
    const std::lock_guard lock(paths_mutex());
    added = added_paths();
  }
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* root = environment(variable)) {
      folders.push_back(std::string(root) + "/lib64");
      folders.push_back(std::string(root) + "/lib");
    }
  }
  for (const char* root : {"/usr/local/cuda", "/usr/local/cuda-13", "/usr/local/cuda-12"})
    folders.push_back(std::string(root) + "/lib64");

  return library_candidates(added, folders);
}

/// Null when a function is missing.
template <typename Function>
bool resolve(void* module, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(module, name));
  return function != nullptr;
}

bool resolve_all(void* module, Library& library) {
  return resolve(module, "cublasLtGetVersion", library.version) &&
         resolve(module, "cublasLtGetStatusString", library.status_string) &&
         resolve(module, "cublasLtCreate", library.create) && resolve(module, "cublasLtDestroy", library.destroy) &&
         resolve(module, "cublasLtMatmulDescCreate", library.desc_create) &&
         resolve(module, "cublasLtMatmulDescDestroy", library.desc_destroy) &&
         resolve(module, "cublasLtMatmulDescSetAttribute", library.desc_set) &&
         resolve(module, "cublasLtMatrixLayoutCreate", library.layout_create) &&
         resolve(module, "cublasLtMatrixLayoutDestroy", library.layout_destroy) &&
         resolve(module, "cublasLtMatmulPreferenceCreate", library.preference_create) &&
         resolve(module, "cublasLtMatmulPreferenceDestroy", library.preference_destroy) &&
         resolve(module, "cublasLtMatmulPreferenceSetAttribute", library.preference_set) &&
         resolve(module, "cublasLtMatmulAlgoGetHeuristic", library.heuristic) &&
         resolve(module, "cublasLtMatmulAlgoCheck", library.algorithm_check) &&
         resolve(module, "cublasLtMatmulAlgoConfigGetAttribute", library.algorithm_get) &&
         resolve(module, "cublasLtMatmul", library.matmul);
}

std::string version_text(std::size_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

Library load_library() {
  std::string tried;
  for (const std::string& path : candidates()) {
    tried += "\n  " + path + ": ";
    void* module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (module == nullptr) {
      const char* why = dlerror();
      const std::string reason = why == nullptr ? "" : why;
      tried += reason.find("No such file") != std::string::npos ? "not found" : reason;
      continue;
    }
    Library library{};
    if (!resolve_all(module, library)) {
      tried += "has not all of cuBLASLt's functions";
    } else if (library.version() < kMinVersion) {
      tried += "version " + version_text(library.version()) + " is too old, 12.0 or later is needed";
    } else {
      return library;  // stays loaded: plans and handles live as long as the process may
    }
    dlclose(module);
  }
  const bool chosen = environment("BASED_CUBLASLT") != nullptr;
  throw UnsupportedError(
      std::string("the CUDA device needs NVIDIA's cuBLASLt, which ") +
      (chosen ? "BASED_CUBLASLT does not name" : "was not found") + "; install it with\n" +
      "  pip install \"based[cuda13]\"\nor set BASED_CUBLASLT to the path of libcublasLt.so. Tried:" + tried);
}

/// Loaded once per process; a failure is thrown again to each caller, after a new search.
const Library& library() {
  static const Library loaded = load_library();
  return loaded;
}

void check_status(Status status, const char* doing) {
  if (status != kSuccess) throw DeviceError(std::string(doing) + ": cuBLASLt: " + library().status_string(status));
}

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::bfloat16 ? CUDA_R_16BF : dtype == DType::float16 ? CUDA_R_16F : CUDA_R_32F;
}

template <typename T>
void set(Status (*setter)(void*, int, const void*, std::size_t), void* object, int attribute, T value) {
  check_status(setter(object, attribute, &value, sizeof value), "linear");
}

/// An opaque object of the library, with the function that ends it.
class Handle {
 public:
  explicit Handle(Status (*destroy)(void*)) : destroy_(destroy) {}
  ~Handle() {
    if (object_ != nullptr) destroy_(object_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  void** out() { return &object_; }
  void* get() const { return object_; }

 private:
  Status (*destroy_)(void*);
  void* object_ = nullptr;
};

}  // namespace

void add_library_path(std::string path) {
  const std::lock_guard lock(paths_mutex());
  added_paths().push_back(std::move(path));
}

void require_cublas_lt() { library(); }

std::vector<std::string> library_candidates(const std::vector<std::string>& added,
                                            const std::vector<std::string>& folders) {
  constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  std::vector<std::string> all;
  for (const std::string& path : added) {
    std::error_code unknown;  // a path that cannot be looked at is tried as a file, and dlopen says what is wrong
    if (std::filesystem::is_directory(path, unknown))
      for (const char* name : kNames) all.push_back(path + "/" + name);
    else
      all.push_back(path);
  }
  for (const char* name : kNames) {
    all.emplace_back(name);  // wherever the system's loader looks
    for (const std::string& folder : folders) all.push_back(folder + "/" + name);
  }
  return all;
}

// Row-major y = x Wᵀ is column-major D (rows, M) = Aᵀ B with A = W (k, rows) and B = x (k, M).
struct CublasLt::Plan {
  Handle desc{library().desc_destroy};
  Handle a{library().layout_destroy}, b{library().layout_destroy}, d{library().layout_destroy};
  Algorithm algorithm{};
};

namespace {

// Of which size of m an algorithm serves m rows: the next of eight for each power of two. Prompts of every length and
// steps with prompts would have an algorithm for each size otherwise, and a kernel costs milliseconds when it is
// loaded. The numbers of rows that steps are rounded to (Backend::step_rows) are among these sizes.
std::int64_t sized_rows(std::int64_t m) {
  const auto step = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(m)) / 8);
  return step <= 1 ? m : (m + step - 1) / step * step;
}

// At most `wanted` algorithms for the product that `plan` describes, likeliest to be fast first; `whole`: of those that
// sum over k in one piece.
template <typename Plan>
std::vector<HeuristicResult> propose(const Library& lt, void* handle, const Plan& plan, std::size_t workspace_bytes,
                                     int wanted, bool whole) {
  Handle preference{lt.preference_destroy};
  check_status(lt.preference_create(preference.out()), "linear");
  set(lt.preference_set, preference.get(), kMaxWorkspaceBytes, workspace_bytes);
  if (whole) set(lt.preference_set, preference.get(), kReductionSchemeMask, kNoReduction);
  for (int operand = kMinAlignmentA; operand <= kMinAlignmentD; ++operand)
    set(lt.preference_set, preference.get(), operand, std::uint32_t{16});
  std::vector<HeuristicResult> results(static_cast<std::size_t>(wanted));
  int found = 0;
  const Status status = lt.heuristic(handle, plan.desc.get(), plan.a.get(), plan.b.get(), plan.d.get(), plan.d.get(),
                                     preference.get(), wanted, results.data(), &found);
  if (status == kNotSupported) return {};  // none
  check_status(status, "linear");
  results.resize(static_cast<std::size_t>(found));
  std::erase_if(results, [](const HeuristicResult& result) { return result.state != kSuccess; });
  return results;
}

}  // namespace

CublasLt::CublasLt(void* workspace, std::size_t workspace_bytes, bool row_invariant)
    : workspace_(workspace), workspace_bytes_(workspace_bytes), row_invariant_(row_invariant) {
  check_status(library().create(&handle_), "cublasLtCreate");
}

CublasLt::~CublasLt() {
  plans_.clear();
  library().destroy(handle_);  // nothing uses the handle any more: a failure can only leave it where it is
}

bool CublasLt::takes(const Product& product) {
  const auto fills = [](std::int64_t n, DType dtype) {
    return n * static_cast<std::int64_t>(size_of(dtype)) % 16 == 0;
  };
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return product.rows > 0 && product.k > 0 && product.m > 0 && fills(product.k, product.dtype) &&
         fills(product.rows, product.dtype) && aligned(product.weight) && aligned(product.x) && aligned(product.y) &&
         aligned(product.bias) && (!row_invariant_ || invariant_algorithm(product));
}

const CublasLt::Plan& CublasLt::plan_for(const Product& product) {
  constexpr std::size_t kMaxPlans = 4096;  // prompts of every length make plans
  const Key key{product.dtype, product.y_dtype,    product.rows,           product.k,
                product.m,     product.accumulate, product.bias != nullptr};
  if (const auto found = plans_.find(key); found != plans_.end()) return *found->second;
  if (plans_.size() >= kMaxPlans) plans_.clear();

  const Library& lt = library();
  auto plan = describe(product);
  if (row_invariant_) {
    plan->algorithm = *invariant_algorithm(product);
    if (!accepts(*plan, plan->algorithm))
      throw UnsupportedError("linear: deterministic: cuBLASLt's algorithm for a weight of " +
                             std::to_string(product.rows) + " x " + std::to_string(product.k) + " does not take " +
                             std::to_string(product.m) + " rows; load the model without deterministic");
    return *plans_.emplace(key, std::move(plan)).first->second;
  }
  const std::int64_t sized = sized_rows(product.m);
  if (sized != product.m) {
    Product larger = product;
    larger.m = sized;
    plan->algorithm = plan_for(larger).algorithm;
  }
  if (sized == product.m || !accepts(*plan, plan->algorithm)) {
    const std::vector<HeuristicResult> results = propose(lt, handle_, *plan, workspace_bytes_, 1, false);
    if (results.empty()) throw UnsupportedError("linear: cuBLASLt knows no algorithm for this product");
    std::ranges::copy(results[0].algorithm, plan->algorithm.data);
  }
  return *plans_.emplace(key, std::move(plan)).first->second;
}

std::unique_ptr<CublasLt::Plan> CublasLt::describe(const Product& product) const {
  const Library& lt = library();
  auto plan = std::make_unique<Plan>();
  check_status(lt.desc_create(plan->desc.out(), kCompute32f, CUDA_R_32F), "linear");
  set(lt.desc_set, plan->desc.get(), kTransposeA, kTranspose);
  set(lt.desc_set, plan->desc.get(), kEpilogue,
      static_cast<std::uint32_t>(product.bias != nullptr ? kEpilogueBias : kEpilogueDefault));
  if (product.bias != nullptr) set(lt.desc_set, plan->desc.get(), kBiasPointer, product.bias);
  const auto rows = static_cast<std::uint64_t>(product.rows), k = static_cast<std::uint64_t>(product.k),
             m = static_cast<std::uint64_t>(product.m);
  const cudaDataType_t type = data_type(product.dtype);
  check_status(lt.layout_create(plan->a.out(), type, k, rows, product.k), "linear");
  check_status(lt.layout_create(plan->b.out(), type, k, m, product.k), "linear");
  check_status(lt.layout_create(plan->d.out(), data_type(product.y_dtype), rows, m, product.rows), "linear");

  return plan;
}

bool CublasLt::accepts(const Plan& plan, const Algorithm& algorithm) const {
  HeuristicResult result{};
  const Status status = library().algorithm_check(handle_, plan.desc.get(), plan.a.get(), plan.b.get(), plan.d.get(),
                                                  plan.d.get(), &algorithm, &result);
  return status == kSuccess && result.workspace_bytes <= workspace_bytes_;
}

// An algorithm is a kernel with its tiles. Without split K one block makes an element of y, and adds over k in the
// order that the tile gives: the same for every M. Whether it takes every M is asked for many of them.
const std::optional<CublasLt::Algorithm>& CublasLt::invariant_algorithm(const Product& product) {
  constexpr std::int64_t kReferenceRows = 128;  // tiles that suit a decode step of many sequences, and prompts
  constexpr std::int64_t kRows[] = {1, 2, 3, 4, 7, 8, 9, 16, 31, 64, 100, 127, 129, 256, 300, 1000, 1024, 2048, 8192};
  constexpr int kProposals = 32;
  const Key key{product.dtype,      product.y_dtype,        product.rows, product.k, 0,
                product.accumulate, product.bias != nullptr};
  if (const auto found = invariant_.find(key); found != invariant_.end()) return found->second;

  const auto plan_of = [&](std::int64_t m) {
    Product sized = product;
    sized.m = m;
    return describe(sized);
  };
  const Library& lt = library();
  const auto reference = plan_of(kReferenceRows);
  std::vector<std::unique_ptr<Plan>> plans;
  for (const std::int64_t m : kRows) plans.push_back(plan_of(m));
  const auto value = [&](const void* algorithm, int attribute) {
    std::uint32_t number = 0;
    std::size_t written = 0;
    check_status(lt.algorithm_get(algorithm, attribute, &number, sizeof number, &written), "linear");
    return number;
  };
  std::optional<Algorithm> chosen;
  for (const HeuristicResult& result : propose(lt, handle_, *reference, 0, kProposals, true)) {
    if (value(result.algorithm, kSplitK) > 1 || value(result.algorithm, kReductionScheme) != kNoReduction) continue;
    Algorithm algorithm{};
    std::ranges::copy(result.algorithm, algorithm.data);
    if (!std::ranges::all_of(plans, [&](const auto& plan) { return accepts(*plan, algorithm); })) continue;
    chosen = algorithm;
    break;
  }
  return invariant_.emplace(key, chosen).first->second;
}

void CublasLt::matmul(cudaStream_t stream, const Product& product) {
  const Library& lt = library();
  const Plan& plan = plan_for(product);
  if (product.bias != nullptr) set(lt.desc_set, plan.desc.get(), kBiasPointer, product.bias);
  const float alpha = 1, beta = product.accumulate ? 1 : 0;
  check_status(lt.matmul(handle_, plan.desc.get(), &alpha, product.weight, plan.a.get(), product.x, plan.b.get(), &beta,
                         product.y, plan.d.get(), product.y, plan.d.get(), &plan.algorithm, workspace_,
                         workspace_bytes_, stream),
               "linear");
  note_operation("linear (cuBLASLt)", stream);
}

}  // namespace based::cuda
