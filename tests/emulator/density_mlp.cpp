// The launches of csrc/density_mlp.h and csrc/steps.h for ctypes.
#include <density_mlp.h>
#include <steps.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

using namespace fastscore;

// Tests may link one kernel family alone.
namespace fastscore {
[[gnu::weak]] void sm90_density_mlp(const DensityMlp&, const Plan&, int, int, cudaStream_t) {
  throw std::logic_error("Hopper's kernels are not linked");
}
[[gnu::weak]] void sm90_density_mlp_wide(const DensityMlp&, const Plan&, int, int, cudaStream_t) {
  throw std::logic_error("Hopper's wide kernel is not linked");
}
[[gnu::weak]] void sm80_density_mlp(const DensityMlp&, const Plan&, int, int, cudaStream_t) {
  throw std::logic_error("Ampere's kernel is not linked");
}
[[gnu::weak]] void sm90_steps_64(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {
  throw std::logic_error("The steps of width 64 are not linked");
}
[[gnu::weak]] void sm90_steps_1024(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {
  throw std::logic_error("The steps of width 1,024 are not linked");
}
[[gnu::weak]] void sm90_steps_512(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {
  throw std::logic_error("The steps of width 512 are not linked");
}
[[gnu::weak]] void sm90_steps_256(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {
  throw std::logic_error("The steps of width 256 are not linked");
}
[[gnu::weak]] void sm90_steps_128(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {
  throw std::logic_error("The steps of width 128 are not linked");
}
[[gnu::weak]] int sm90_density_mlp_clusters(const Plan&) { throw std::logic_error("Hopper's kernels are not linked"); }
[[gnu::weak]] int sm90_density_mlp_wide_clusters(const Plan&) {
  throw std::logic_error("Hopper's wide kernel is not linked");
}
[[gnu::weak]] int sm80_density_mlp_clusters(const Plan&) { throw std::logic_error("Ampere's kernel is not linked"); }
}  // namespace fastscore

// What fastscore._C.density_mlp does, on the emulated GPU; returns an error's text, or an empty one.
extern "C" const char* launch(int hidden, int data, int linears, const uint64_t* pointers, const int32_t* sizes,
                              const int32_t* operands, const char* program, int bytes, int capability, int limit,
                              int cluster, int splits) {
  static thread_local std::string message;
  try {
    Plan chosen;
    message = plan(hidden, data, linears, sizes[2], capability, limit, &chosen);
    if (message.empty()) {
      density_mlp(arguments(pointers, sizes, operands, program, bytes), chosen, {cluster, splits}, nullptr);
    }
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// What fastscore._C.plan does: a reason, or an empty text, shared memory in bytes and threads.
extern "C" const char* plan_of(int hidden, int data, int linears, int stride, int capability, int limit,
                               int32_t* found) {
  static thread_local std::string message;
  Plan chosen;
  message = plan(hidden, data, linears, stride, capability, limit, &chosen);
  found[0] = static_cast<int32_t>(chosen.shared_bytes), found[1] = chosen.threads;
  return message.c_str();
}

// What fastscore._C.steps_plan does: a reason, or an empty text and shared memory in bytes, threads, whether keys and x stay
// in shared memory, stages of weights there, and those that all weights fill.
extern "C" const char* plan_of_steps(const int32_t* shape, int capability, int limit, int32_t* found) {
  static thread_local std::string message;
  StepsPlan chosen;
  message = plan_steps(shape[0], shape[1], shape[2], shape[3], shape[4], capability, limit, &chosen);
  found[0] = static_cast<int32_t>(chosen.shared_bytes), found[1] = chosen.threads, found[2] = chosen.kept;
  found[3] = chosen.stages, found[4] = chosen.tiles;
  return message.c_str();
}

// What fastscore._C.steps does, on the emulated GPU; returns an error's text, or an empty one.
extern "C" const char* launch_of_steps(const int32_t* shape, const uint64_t* pointers, const int32_t* sizes,
                                       const int32_t* columns, const char* steps, int bytes, int capability, int limit,
                                       int cluster, int clusters) {
  static thread_local std::string message;
  try {
    StepsPlan chosen;
    message = plan_steps(shape[0], shape[1], shape[2], shape[3], shape[4], capability, limit, &chosen);
    const int32_t all[3] = {sizes[0], sizes[1], shape[4]};
    if (message.empty())
      launch_steps(step_arguments(pointers, all, columns, steps, bytes), chosen, {cluster, clusters}, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// How a plan's launch is divided on Hopper: cluster, tiles, splits and rows a block, or zeros where there is no plan.
// `active` is how many clusters of 1, 2 and 4 blocks the device runs at once.
extern "C" void division_of(int hidden, int data, int linears, int stride, int batch, int rows, int cluster, int splits,
                            const int32_t* active, int32_t* found) {
  Plan chosen;
  if (!plan(hidden, data, linears, stride, 90, 232448, &chosen).empty()) return;
  const Division divided =
      division(chosen, batch, rows, {cluster, splits}, [&](int blocks) { return active[blocks / 2]; });
  found[0] = divided.cluster, found[1] = divided.tiles, found[2] = divided.splits, found[3] = divided.rows_per_block;
}
