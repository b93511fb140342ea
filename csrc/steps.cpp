// Which kernel runs a program of steps, and how it divides shared memory.
#include "steps.h"

#include <cstring>
#include <stdexcept>

namespace fastscore {
namespace {

constexpr int kBarrierBytes = 16;  // a stage's: full and empty

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

// Divide shared memory into weights, samples, records and barriers; false if it does not hold them.
bool divide(StepsPlan* plan, uint32_t record_bytes, uint32_t limit) {
  // x, Q and M of a sample take 12 bytes a dimension.
  const uint32_t samples = plan->kept ? 12u * plan->samples * plan->data : 0;
  const bool resident = plan->stages >= plan->tiles;
  plan->samples_at = plan->stages * plan->stage_bytes;
  plan->records_at = plan->samples_at + samples;
  plan->barriers_at = plan->records_at + plan->record_stages * record_bytes;
  plan->shared_bytes = plan->barriers_at + kBarrierBytes * ((resident ? 1 : plan->stages) + plan->record_stages);
  return plan->shared_bytes <= limit;
}

// Weights stay. Beside them a tile's keys and x, which every row reads, before a third record; without them a row
// fetches its keys and x through the L1 cache. (Of 16 dimensions they are small, and always kept.)
bool fit_resident(StepsPlan* plan, uint32_t record_bytes, uint32_t limit) {
  plan->stages = plan->tiles;
  plan->cluster = 1;
  for (const bool kept : {true, false}) {
    if (!kept && plan->data == 16) break;
    plan->kept = kept;
    for (plan->record_stages = 3; plan->record_stages >= 2; --plan->record_stages) {
      if (divide(plan, record_bytes, limit)) return true;
    }
  }
  return false;
}

std::string kilobytes(uint32_t bytes) { return std::to_string((bytes + 1023) >> 10) + " KB"; }

}  // namespace

std::string plan_steps(int hidden, int data, bool padded, int linears, int record, int capability, int shared_limit,
                       StepsPlan* plan) {
  if (capability != 90) return "steps run on compute capability 9.0";
  if (hidden != 64) return "steps run at widths up to 64, the network has " + std::to_string(hidden);
  *plan = {};
  plan->hidden = hidden, plan->data = data, plan->padded = padded;
  const int blocks = hidden / 64;
  plan->tiles = 1 + (linears - 2) * blocks + blocks;
  plan->stage_bytes = 128 * hidden;
  plan->samples = 192;
  plan->threads = 512;
  const uint32_t record_bytes = round_up(4 * record, 128);
  if (fit_resident(plan, record_bytes, shared_limit)) return "";
  return "weights (" + kilobytes(plan->tiles * plan->stage_bytes) + ") and two rows' vectors (" +
         kilobytes(2 * record_bytes) + ") of steps do not fit " + kilobytes(shared_limit) + " of shared memory";
}

Steps step_arguments(const uint64_t* pointers, const int32_t* sizes, const int32_t* columns, const char* steps,
                     size_t bytes) {
  Steps p = {};
  p.x = reinterpret_cast<const float*>(pointers[0]);
  p.keys = reinterpret_cast<const uint32_t*>(pointers[1]);
  p.weights = reinterpret_cast<const uint8_t*>(pointers[2]);
  p.records = reinterpret_cast<const float*>(pointers[3]);
  p.f = reinterpret_cast<float*>(pointers[4]);
  p.batch = sizes[0], p.rows = sizes[1], p.record = sizes[2];
  p.pre_scale = columns[0], p.post_scale = columns[1], p.skip = columns[2], p.compare_at = columns[3];
  if (bytes < 2 * sizeof(Step) || bytes > (kMaxSteps + 2) * sizeof(Step) || bytes % sizeof(Step) != 0) {
    throw std::runtime_error("steps are a first, a last and up to " + std::to_string(kMaxSteps) + " between, " +
                             std::to_string(sizeof(Step)) + " bytes each, got " + std::to_string(bytes) + " bytes");
  }
  p.count = static_cast<int32_t>(bytes / sizeof(Step)) - 2;
  std::memcpy(&p.first, steps, sizeof(Step));
  std::memcpy(&p.last, steps + sizeof(Step), sizeof(Step));
  std::memcpy(p.step, steps + 2 * sizeof(Step), p.count * sizeof(Step));
  return p;
}

void launch_steps(Steps p, const StepsPlan& plan, int clusters, cudaStream_t stream) {
  if (p.batch == 0 || p.rows == 0) return;
  p.stages = plan.stages, p.tiles = plan.tiles, p.record_stages = plan.record_stages;
  p.samples_at = plan.samples_at, p.records_at = plan.records_at, p.barriers_at = plan.barriers_at;
  sm90_steps_64(p, plan, clusters, stream);
}

}  // namespace fastscore
