#include "step_recorder.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "cuda_error.h"

namespace based::cuda {

void StepRecorder::DestroyGraph::operator()(CUgraphExec_st* graph) const {
  const std::lock_guard lock(recording_mutex());
  keep_failure(cudaGraphExecDestroy(graph), "ending a recorded step");
}

void StepRecorder::run(const backend::StepKey& key, std::uint64_t generation, const backend::RaggedBatch& batch,
                       const std::function<void()>& operations) {
  if (generation != generation_) clear();
  generation_ = generation;

  const auto [entry, first] = records_.try_emplace(key);
  Record& step = entry->second;
  step.last_use = ++num_steps_;
  if (first) {
    if (records_.size() > kMaxRecords)
      records_.erase(std::ranges::min_element(records_, {}, [](const auto& r) { return r.second.last_use; }));
    operations();
    return;
  }
  if (!step.graph) record(step, operations);
  check(cudaGraphLaunch(step.graph.get(), stream_->get()), "a recorded step");
  note_operation("a recorded step", stream_->get());
  for (const Launched& launched : step.launched) launched(batch);
}

void StepRecorder::after_launch(const backend::RaggedBatch& batch, Launched launched) {
  if (recording_ != nullptr)
    recording_->launched.push_back(std::move(launched));
  else
    launched(batch);
}

void StepRecorder::record(Record& step, const std::function<void()>& operations) {
  const std::lock_guard lock(recording_mutex());
  step.launched.clear();  // of an attempt that failed
  check(cudaStreamBeginCapture(stream_->get(), cudaStreamCaptureModeThreadLocal), "recording a step");
  cudaGraph_t graph = nullptr;
  recording_ = &step;
  try {
    operations();
  } catch (...) {
    recording_ = nullptr;
    cudaStreamEndCapture(stream_->get(), &graph);  // its failure would only repeat the one that is thrown
    if (graph != nullptr) keep_failure(cudaGraphDestroy(graph), "recording a step");
    cudaGetLastError();
    free_waiting();
    throw;
  }
  recording_ = nullptr;
  check(cudaStreamEndCapture(stream_->get(), &graph), "recording a step");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  keep_failure(cudaGraphDestroy(graph), "recording a step");
  check(status, "recording a step");
  step.graph.reset(executable);
  free_waiting();
}

}  // namespace based::cuda
