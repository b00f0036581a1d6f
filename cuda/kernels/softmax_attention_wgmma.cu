#include "kernels/softmax_attention.cuh"
#include "kernels/wgmma.cuh"

// Attention of prompts over contexts on Hopper. A block has a head and 128 queries. Its first warpgroup, the loaders,
// copies keys and values, 128 at a time, each into one of two places in shared memory. The others have 64 queries each
// and go on by themselves: while one weighs its scores, the other's products keep the tensor cores busy. A warpgroup
// starts the scores of a step's keys, Q Kᵀ, then the values of the step before, P V, and weighs the scores beside
// those. Steps begin at multiples of 128 tokens of the sequence: no sum depends on how a prompt was cut.

namespace based::cuda {
namespace {

constexpr int kStepKeys = 128, kStepShift = 7;
constexpr int kStages = 2;
constexpr int kGroupQueries = 64;  // of a warpgroup
constexpr int kGroups = 2;
constexpr int kQueries = kGroups * kGroupQueries;
constexpr int kThreads = (1 + kGroups) * kWarpgroup;
constexpr int kMostDim = 128;
static_assert(kStepKeys == 1 << kStepShift && kQueries == 2 * kTileTokens);

// kDim: head_dim rounded up; what is above head_dim is zero.
template <typename T, int kDim>
struct FlashShared {
  CoreMatrixOf<T> q[kGroups][kDim / 8][kGroupQueries / 8];  // (dimensions, queries), a query per row
  CoreMatrixOf<T> k[kStages][kDim / 8][kStepKeys / 8];      // (dimensions, keys), a key per row
  CoreMatrixOf<T> v[kStages][kDim / 8][kStepKeys / 8];      // (dimensions, keys), a value per row
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// d (64 × 128) = A B, or += where it `adds`: rows of A (64 × 16) and of Bᵀ (128 × 16) along K.
template <typename T>
__device__ __forceinline__ void multiply_keys(float (&d)[16][4], std::uint64_t a, std::uint64_t b, bool adds);

/// d (64 × n) += A B: A (64 × 16) in fragments, rows of B (16 × n) along N.
template <typename T, int n>
__device__ __forceinline__ void multiply_values(float (&d)[n / 8][4], const std::uint32_t (&a)[4], std::uint64_t b);

template <>
__device__ __forceinline__ void multiply_keys<bf16>(float (&d)[16][4], std::uint64_t a, std::uint64_t b, bool adds) {
  asm volatile(
      "{ .reg .pred accumulates; setp.ne.b32 accumulates, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
      "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, accumulates, 1, 1, 0, 0; "
      "}"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7]), BASED_GROUP(d[8]), BASED_GROUP(d[9]),
        BASED_GROUP(d[10]), BASED_GROUP(d[11]), BASED_GROUP(d[12]), BASED_GROUP(d[13]), BASED_GROUP(d[14]),
        BASED_GROUP(d[15])
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
}

template <>
__device__ __forceinline__ void multiply_keys<fp16>(float (&d)[16][4], std::uint64_t a, std::uint64_t b, bool adds) {
  asm volatile(
      "{ .reg .pred accumulates; setp.ne.b32 accumulates, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
      "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, accumulates, 1, 1, 0, 0; "
      "}"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7]), BASED_GROUP(d[8]), BASED_GROUP(d[9]),
        BASED_GROUP(d[10]), BASED_GROUP(d[11]), BASED_GROUP(d[12]), BASED_GROUP(d[13]), BASED_GROUP(d[14]),
        BASED_GROUP(d[15])
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
}

template <>
__device__ __forceinline__ void multiply_values<bf16, 64>(float (&d)[8][4], const std::uint32_t (&a)[4],
                                                          std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void multiply_values<fp16, 64>(float (&d)[8][4], const std::uint32_t (&a)[4],
                                                          std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void multiply_values<bf16, 80>(float (&d)[10][4], const std::uint32_t (&a)[4],
                                                          std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31, %32, %33, %34, %35, %36, %37, %38, %39}, {%40, %41, %42, %43}, %44, 1, 1, 1, 1;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7]), BASED_GROUP(d[8]), BASED_GROUP(d[9])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void multiply_values<fp16, 80>(float (&d)[10][4], const std::uint32_t (&a)[4],
                                                          std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31, %32, %33, %34, %35, %36, %37, %38, %39}, {%40, %41, %42, %43}, %44, 1, 1, 1, 1;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7]), BASED_GROUP(d[8]), BASED_GROUP(d[9])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void multiply_values<bf16, 128>(float (&d)[16][4], const std::uint32_t (&a)[4],
                                                           std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
      "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, "
      "1, 1;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7]), BASED_GROUP(d[8]), BASED_GROUP(d[9]),
        BASED_GROUP(d[10]), BASED_GROUP(d[11]), BASED_GROUP(d[12]), BASED_GROUP(d[13]), BASED_GROUP(d[14]),
        BASED_GROUP(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void multiply_values<fp16, 128>(float (&d)[16][4], const std::uint32_t (&a)[4],
                                                           std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
      "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
      "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
      "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, "
      "1, 1;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7]), BASED_GROUP(d[8]), BASED_GROUP(d[9]),
        BASED_GROUP(d[10]), BASED_GROUP(d[11]), BASED_GROUP(d[12]), BASED_GROUP(d[13]), BASED_GROUP(d[14]),
        BASED_GROUP(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/// Arrives when the copies that this thread has begun are done.
__device__ __forceinline__ void arrive_with_copies(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Whether any thread of the warpgroup has `mine`: one answer for all of them. They meet at barrier `id`.
__device__ __forceinline__ bool any_of_warpgroup(int id, bool mine) {
  int any;
  asm volatile(
      "{ .reg .pred mine, any; setp.ne.b32 mine, %2, 0; barrier.cta.red.or.pred any, %1, 128, mine; "
      "selp.b32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(id), "r"(static_cast<int>(mine))
      : "memory");
  return any != 0;
}

/// Copies rows of `from`, `stride` elements apart, in core matrices: `rows` of kRows, the others and what lies beyond
/// `width` columns as zeros. Eight lanes fill a core matrix, four such groups share 64 bytes of a row.
template <typename T, int kDim, int kRows>
__device__ __forceinline__ void copy_matrices(CoreMatrixOf<T> (*to)[kRows / 8], const T* from, std::int64_t stride,
                                              int rows, int width, int warp, int lane) {
  const int row = warp * 8 + lane % 8, part = lane / 8;
  const T* x = from + row * stride + part * 8;
#pragma unroll
  for (int i = 0; i < kRows / 32; ++i, x += 32 * stride) {
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 4) {
      if (kDim / 8 % 4 != 0 && part + j >= kDim / 8) continue;
      const bool valid = row + 32 * i < rows && (part + j) * 8 < width;
      copy_async_16(to[part + j][warp + 4 * i][lane % 8], valid ? x + j * 8 : from, valid);
    }
  }
}

#endif

// Grid: tiles · heads, of which every second tile's blocks return. The last tiles of a sequence, which have the most
// keys, begin first. Compiled for sm_90a alone: elsewhere it is empty.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) wgmma_flash_kernel(const AttentionArguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<FlashShared<T, kDim>*>(shared_bytes);
  // Of a stage's keys and values: copied by all loaders, let go by the warps of the other warpgroups.
  __shared__ std::uint64_t full_k[kStages], full_v[kStages], free_k[kStages], free_v[kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&full_k[i], kWarpgroup);
      init_barrier(&full_v[i], kWarpgroup);
      init_barrier(&free_k[i], kGroups * kWarpgroup / 32);
      init_barrier(&free_v[i], kGroups * kWarpgroup / 32);
    }
  }
  wait_for_predecessors();
  release_successors();
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.num_heads));
  const Tile tile =
      a.batch.tiles[static_cast<unsigned>(a.batch.num_tiles) - 1 - blockIdx.x / static_cast<unsigned>(a.num_heads)];
  const int tile_index = tile.first - a.batch.offsets[tile.sequence];
  if (a.batch.slots[tile.sequence] < 0 || tile_index % kQueries != 0) return;
  __syncthreads();
  const int num_queries = min(kQueries, a.batch.offsets[tile.sequence + 1] - tile.first);
  const int position = static_cast<int>(a.batch.positions[tile.sequence]) + tile_index;  // of the first query
  const int num_keys = position + num_queries, num_steps = (num_keys + kStepKeys - 1) / kStepKeys;
  const int tid = static_cast<int>(threadIdx.x) % kWarpgroup, warp = tid / 32, lane = tid % 32;

  if (threadIdx.x < kWarpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const T* const keys = reinterpret_cast<const T*>(a.ring_keys(tile.sequence)) + a.kv_head(head) * a.ring.head;
    const int width = static_cast<int>(a.ring.head);
    for (int step = 0; step < num_steps; ++step) {
      const int stage = step % kStages, parity = (step / kStages - 1) % 2, begin = step * kStepKeys;
      const T* const from = keys + a.ring_row<true>(begin);  // all rows of a step are in one piece
      if (step >= kStages) wait_for_phase(&free_k[stage], parity);
      copy_matrices<T, kDim, kStepKeys>(shared.k[stage], from, a.ring.row, num_keys - begin, width, warp, lane);
      arrive_with_copies(&full_k[stage]);
      if (step >= kStages) wait_for_phase(&free_v[stage], parity);
      copy_matrices<T, kDim, kStepKeys>(shared.v[stage], from + a.ring.values, a.ring.row, num_keys - begin, width,
                                        warp, lane);
      arrive_with_copies(&full_v[stage]);
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup - 1, g = lane / 4, t = lane % 4;
  const int rows = min(kGroupQueries, num_queries - group * kGroupQueries);  // 0 or less: this warpgroup has none
  const int first = position + group * kGroupQueries, warp_first = first + 16 * warp;
  const int own_steps = rows > 0 ? (first + rows - 1) / kStepKeys + 1 : 0;
  const auto let_go = [lane](std::uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  };

  if (own_steps > 0) {
    const int hd = a.head_dim;
    const std::int64_t token = tile.first + group * kGroupQueries;
    const T* const from = static_cast<const T*>(a.qkv.q) + token * a.qkv.q_token + head * a.qkv.q_head;
    CoreMatrixOf<T>(*const q)[kGroupQueries / 8] = shared.q[group];
    if (a.aligned) {
      copy_matrices<T, kDim, kGroupQueries>(q, from, a.qkv.q_token, rows, hd, warp, lane);
    } else if (a.in_pairs) {
      for (int i = tid; i < kGroupQueries * kDim / 2; i += kWarpgroup) {
        const int row = i / (kDim / 2), d = i % (kDim / 2) * 2;
        const bool valid = row < rows && d < hd;
        copy_async_4(&q[d / 8][row / 8][row % 8][d % 8], valid ? from + row * a.qkv.q_token + d : from, valid);
      }
    } else {
      for (int i = tid; i < kGroupQueries * kDim; i += kWarpgroup) {
        const int row = i / kDim, d = i % kDim;
        q[d / 8][row / 8][row % 8][d % 8] = row < rows && d < hd ? from[row * a.qkv.q_token + d] : from_float<T>(0);
      }
    }
    commit_copies();
    wait_for_copies<0>();
    fence_for_wgmma();
    const auto meet = [group] { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); };
    meet();

    // Of rows g and g + 8 of the warp's 16.
    float s[kStepKeys / 8][4], o[kDim / 8][4], m[2] = {-kInfinity, -kInfinity}, l[2] = {0.0f, 0.0f}, factor[2];
    std::uint32_t p[kStepKeys / 16][4];  // weights, as A fragments
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    constexpr unsigned kMatrix = sizeof(CoreMatrixOf<T>);
    constexpr unsigned kQueryColumn = kMatrix * kGroupQueries / 8, kKeyColumn = kMatrix * kStepKeys / 8;
    const std::uint64_t queries = core_matrices(q, kQueryColumn, kMatrix);

    const auto begin_scores = [&](int step) {
      wait_for_phase(&full_k[step % kStages], step / kStages % 2);
      fence_for_wgmma();
      const std::uint64_t keys = core_matrices(shared.k[step % kStages], kKeyColumn, kMatrix);
      begin_wgmma();
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i)
        multiply_keys<T>(s, queries + i * (2 * kQueryColumn / 16), keys + i * (2 * kKeyColumn / 16), i > 0);
      commit_wgmma();
    };
    const auto begin_values = [&](int step) {
      wait_for_phase(&full_v[step % kStages], step / kStages % 2);
      fence_for_wgmma();
      const std::uint64_t values = core_matrices(shared.v[step % kStages], kMatrix, kKeyColumn);
      begin_wgmma();
#pragma unroll
      for (int i = 0; i < kStepKeys / 16; ++i) multiply_values<T, kDim>(o, p[i], values + i * (2 * kMatrix / 16));
      commit_wgmma();
    };
    // s becomes the weights of a step's keys; what o and l of the steps before are to be scaled by is `factor`.
    const auto weigh = [&](int step) {
      const int base = step * kStepKeys;
      if (base + kStepKeys - 1 > warp_first) {
#pragma unroll
        for (int i = 0; i < kStepKeys / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (base + i * 8 + 2 * t + j % 2 > warp_first + g + j / 2 * 8) s[i][j] = -kInfinity;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float next = -kInfinity;
#pragma unroll
        for (int i = 0; i < kStepKeys / 8; ++i) next = fmaxf(next, fmaxf(s[i][2 * half], s[i][2 * half + 1]));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
        next = fmaxf(m[half], next * a.scale);
        const float reference = finite_maximum(next);
        factor[half] = m[half] == next ? 1.0f : fast_exp2(m[half] - reference);
        m[half] = next;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kStepKeys / 8; ++i) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            s[i][j] = fast_exp2(fmaf(s[i][j], a.scale, -reference));
            sum += s[i][j];
          }
        }
        l[half] = l[half] * factor[half] + sum;
      }
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int i = 0; i < kStepKeys / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) p[i][j] = pack<T>(s[2 * i + j / 2][j % 2 * 2], s[2 * i + j / 2][j % 2 * 2 + 1]);
    };

    begin_scores(0);
    wait_for_wgmma<0>();
    use_after_wait(s);
    let_go(&free_k[0]);
    weigh(0);
    pack_weights();
#pragma unroll 1
    for (int step = 1; step < own_steps; ++step) {
      begin_scores(step);
      begin_values(step - 1);
      wait_for_wgmma<1>();
      use_after_wait(s);
      let_go(&free_k[step % kStages]);
      weigh(step);
      // A branch ahead of the wait keeps the compiler from waiting before it weighs. Most steps change no maximum. All
      // warps of the group must come to the same wait.
      if (any_of_warpgroup(1 + group, factor[0] != 1.0f || factor[1] != 1.0f)) {
        wait_for_wgmma<0>();
        use_after_wait(o);
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) o[i][j] *= factor[j / 2];
      } else {
        wait_for_wgmma<0>();
        use_after_wait(o);
      }
      let_go(&free_v[(step - 1) % kStages]);
      pack_weights();
    }
    begin_values(own_steps - 1);
    wait_for_wgmma<0>();
    use_after_wait(o);
    let_go(&free_v[(own_steps - 1) % kStages]);

    // Through the queries' place, for whole 16-byte stores.
    meet();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] += __shfl_xor_sync(0xffffffffu, l[half], 1);
      l[half] += __shfl_xor_sync(0xffffffffu, l[half], 2);
    }
    const float inverse[2] = {1.0f / l[0], 1.0f / l[1]};
#pragma unroll
    for (int i = 0; i < kDim / 8; i += 2) {
      std::uint32_t y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        y[j] = pack<T>(o[i + j / 2][j % 2 * 2] * inverse[j % 2], o[i + j / 2][j % 2 * 2 + 1] * inverse[j % 2]);
      store_matrices(q[i + lane / 16][2 * warp + lane / 8 % 2][lane % 8], y);
    }
    __syncwarp();
    T* const out = static_cast<T*>(a.out) + (token + 16 * warp) * a.out_token + head * hd;
    const int warp_rows = min(16, rows - 16 * warp);
    const auto staged = [&](int row, int d) { return &q[d / 8][2 * warp + row / 8][row % 8][d % 8]; };
    if (a.aligned) {
      for (int row = g; row < warp_rows; row += 8)
        for (int d = 8 * t; d < hd; d += 32)
          *reinterpret_cast<uint4*>(out + row * a.out_token + d) = *reinterpret_cast<const uint4*>(staged(row, d));
    } else if (a.in_pairs) {
      for (int row = 0; row < warp_rows; ++row)
        for (int d = 2 * lane; d < hd; d += 64)
          *reinterpret_cast<std::uint32_t*>(out + row * a.out_token + d) =
              *reinterpret_cast<const std::uint32_t*>(staged(row, d));
    } else {
      for (int row = 0; row < warp_rows; ++row)
        for (int d = lane; d < hd; d += 32) out[row * a.out_token + d] = *staged(row, d);
    }
  }
  // Steps that only the other warpgroup needs.
  for (int step = own_steps; step < num_steps; ++step) {
    wait_for_phase(&full_k[step % kStages], step / kStages % 2);
    let_go(&free_k[step % kStages]);
    wait_for_phase(&full_v[step % kStages], step / kStages % 2);
    let_go(&free_v[step % kStages]);
  }
#endif
}

template <typename T, int kDim>
void launch_flash(cudaStream_t stream, const char* name, const AttentionArguments& a) {
  launch(stream, name, wgmma_flash_kernel<T, kDim>, static_cast<unsigned>(a.batch.num_tiles * a.num_heads), kThreads,
         sizeof(FlashShared<T, kDim>), a);
}

}  // namespace

template <typename T>
bool attend_by_wgmma(cudaStream_t stream, const char* name, const AttentionArguments& a) {
  if (!device_info().has_wgmma || a.ring.piece_shift < kStepShift || a.ring.head > kMostDim) return false;
  if (a.ring.head <= 64)
    launch_flash<T, 64>(stream, name, a);
  else if (a.ring.head <= 80)
    launch_flash<T, 80>(stream, name, a);
  else
    launch_flash<T, kMostDim>(stream, name, a);
  return true;
}

template bool attend_by_wgmma<bf16>(cudaStream_t, const char*, const AttentionArguments&);
template bool attend_by_wgmma<fp16>(cudaStream_t, const char*, const AttentionArguments&);

}  // namespace based::cuda
