// Parameters and launch of the kernels that run a row program as steps (fastscore/ops/steps.py, step_tables.py): what
// lies between two products taken together, with all that depends on the row alone folded beforehand.
//
//   f[b, r] = c_r^2 ||a_r eps + b_r x - F(alpha_r x + sigma_r eps)||^2 - ||keep eps - pull x + offset||^2
//
// eps is the noise without its sign: the host gives the row's sign to sigma, a and keep.
#pragma once

#include "density_mlp.h"

namespace fastscore {

enum StepKind : int32_t { kResidual, kDense, kDenseScaled };
constexpr int32_t kNoActivation = -1;

// Columns of a step's vectors follow each other from `at` on, in the order of step_tables.py, each of the padded width.
struct Step {
  StepKind kind;
  int32_t activation;  // an Activation, or none
  int32_t at;
  int32_t width;  // of its norm; 0: no norm
  float inverse;  // 1 / width: a division in the kernel would be a call
  float epsilon;  // of the norm
  float before;   // multiplies h before the activation; 1 in a residual step, whose bias has it
  float factor;   // multiplies the product
};
static_assert(sizeof(Step) == 32);

constexpr int kMaxSteps = 96;

// A row's record: alpha, sigma, a, b, c^2, eleven zeros; P of every padded dimension; the vectors of its steps; post
// shift, keep, pull and offset.
constexpr int kRecordHead = 16;

struct Steps {
  const float* x;          // (B, D), zero beyond d
  const uint32_t* keys;    // (B, 2, D): Q and M of fastscore/ops/noise.py, zero beyond d
  const uint8_t* weights;  // tiles of every part, in the order in which its evaluation of a row reads them
  const float* records;    // (R, parts, record)
  float* f;                // out, (B, R)
  int32_t batch, rows, record;
  int32_t pre_scale, post_scale, skip;  // columns of vectors of D, -1 where there is none
  int32_t compare_at;                   // of the four vectors of the comparison
  int32_t count;
  Step first, last;
  Step step[kMaxSteps];
  // Filled in by the launch.
  int32_t stages, tiles, record_stages;
  uint32_t units_each, units_left;  // units of every cluster, and clusters that take one more (common/steps/units.cuh)
  int32_t barriers;                 // pairs of them for weights: one a stage of a ring, a single one where weights stay
  uint32_t scratch_at, records_at, barriers_at;
};

// Shared memory of width 512 beside weights and records: the operand, and sums that warpgroups exchange.
constexpr uint32_t kWideScratchBytes = 64 * 512 * 2 + 1024;
// The same of width 1,024, with barriers at which two blocks meet.
constexpr uint32_t kPairScratchBytes = 64 * 1024 * 2 + 3072 + 64;

// How a kernel runs steps of padded width `hidden` on `data` padded dimensions.
struct StepsPlan {
  int hidden, data;
  bool padded;        // a norm is narrower than `hidden`
  bool kept;          // keys and x of a tile are in shared memory
  int samples;        // a block's
  int threads;        // a block's
  int tiles;          // stages that all weights fill
  int stages;         // of them in shared memory at once; all: resident
  int barriers;       // pairs of them for weights
  int record_stages;  // rows whose records are in shared memory at once
  int parts;          // blocks that divide the outputs of the same samples; each has a part of weights and records
  int cluster;        // blocks, or such parts, that share what they stream
  uint32_t stage_bytes, scratch_at, records_at, barriers_at, shared_bytes;
};

// Fill in a plan; return why there is none, or an empty string.
std::string plan_steps(int hidden, int data, bool padded, int linears, int record, int capability, int shared_limit,
                       StepsPlan* plan);

// Make parameters of what Python sends: addresses of x, keys, weights, records and f; B, R and a record's floats;
// columns of the scales of x_t and of the prediction, of its multiple of x_t, and of the comparison; the bytes of the
// first step, the last and those between.
Steps step_arguments(const uint64_t* pointers, const int32_t* sizes, const int32_t* columns, const char* steps,
                     size_t bytes);

// How blocks share the work, which changes no result; 0 where the launch chooses.
struct StepsConfig {
  int cluster;   // blocks, or parts of the outputs, that share what they stream
  int clusters;  // that share all units (common/steps/units.cuh); chosen: as many as run at a time
};

// Launch on the current device; throws std::runtime_error with the values if CUDA refuses.
void launch_steps(Steps parameters, const StepsPlan& plan, StepsConfig config, cudaStream_t stream);

// One launch function a width.
void sm90_steps_64(const Steps& parameters, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream);
void sm90_steps_128(const Steps& parameters, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream);
void sm90_steps_256(const Steps& parameters, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream);
void sm90_steps_512(const Steps& parameters, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream);
void sm90_steps_1024(const Steps& parameters, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream);

}  // namespace fastscore
