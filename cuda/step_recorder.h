#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "stream.h"

namespace based::cuda {

/// Records decode steps as CUDA graphs and replays them. A key's first step runs unrecorded: it loads kernels and sizes
/// scratch memory. Its second is recorded. A record holds addresses and grids, so a step's operations use the same
/// memory whenever their key and the generation are equal; what changes from step to step lies in that memory. One
/// thread at a time; the work is in the order of `stream`.
class StepRecorder {
 public:
  using Launched = std::function<void(const backend::RaggedBatch&)>;

  explicit StepRecorder(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}

  /// Enqueues one step of `batch` by `operations`, or by a record of them. `generation` counts the changes of addresses
  /// that no key names: another one than the last makes all records void. When it throws while recording, nothing was
  /// enqueued.
  void run(const backend::StepKey& key, std::uint64_t generation, const backend::RaggedBatch& batch,
           const std::function<void()>& operations);

  /// Called by `operations`: calls `launched` with the batch once the step is enqueued; now, or after every replay.
  void after_launch(const backend::RaggedBatch& batch, Launched launched);

  /// Operations are being recorded: they must not allocate, and do not run.
  bool recording() const { return recording_ != nullptr; }

  /// Forgets all records. Those under way finish.
  void clear() { records_.clear(); }

 private:
  struct DestroyGraph {
    void operator()(CUgraphExec_st* graph) const;
  };
  struct Record {
    std::unique_ptr<CUgraphExec_st, DestroyGraph> graph;
    std::vector<Launched> launched;
    std::uint64_t last_use = 0;
  };
  static constexpr std::size_t kMaxRecords = 32;

  void record(Record& record, const std::function<void()>& operations);

  std::shared_ptr<Stream> stream_;
  std::map<backend::StepKey, Record> records_;
  std::uint64_t generation_ = 0;  // that the records were made with
  std::uint64_t num_steps_ = 0;
  Record* recording_ = nullptr;
};

}  // namespace based::cuda
